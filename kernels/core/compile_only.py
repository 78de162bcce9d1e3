"""Compiling kernels in a process that has no GPU, for one that has: launches are collected, then compiled, never run.

A process that has called `pretend` launches nothing any more. It runs the launchers on CPU tensors, which tell the
compiler all that it asks of tensors (types, alignment), and what is compiled lies in Triton's cache on disk, where
another process finds it. Nothing here may be used in a process that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import support


@dataclass
class Launches:
    """What has been launched, once each: (kernel's name, specialisation) -> a function that compiles it.

    late: those that were launched for the first time while `late_from_now` was set. begin: called with the name and
    that function as soon as there is one.
    """

    compile: dict[tuple[str, str], Callable[[], Any]] = field(default_factory=dict)
    late: set[tuple[str, str]] = field(default_factory=set)
    late_from_now: bool = False
    begin: Callable[[str, Callable[[], Any]], None] | None = None

    def add(self, name: str, specialisation: str, compile_it: Callable[[], Any]) -> None:
        key = (name, specialisation)
        if key not in self.compile:
            self.compile[key] = compile_it
            if self.late_from_now:
                self.late.add(key)
            if self.begin is not None:
                self.begin(name, compile_it)


class _Driver:
    """What Triton asks of a driver before it has compiled; there is no device behind it."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self._capability
        return GPUTarget("cuda", 10 * major + minor, 32)


def pretend(capability: tuple[int, int], begin: Callable[[str, Callable[[], Any]], None] | None = None) -> Launches:
    """From now on this process has a GPU of this compute capability as far as kernels are concerned; returns where its
    launches are collected, and tells `begin` of them (`Launches`). Raises whatever a Triton that works otherwise inside
    raises."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    support.compile_for(capability)
    support.capability_of.cache_clear()
    driver.set_active(_Driver(capability))
    launches, run = Launches(begin=begin), JITFunction.run

    def collect(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = self.device_caches[0][-1]
        _, specialization, options = binder(*args, **kwargs, debug=False)
        key = f"{specialization} {sorted(options.items(), key=str)}"
        launches.add(self.fn.__name__, key, lambda: run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = collect
    return launches
