"""Faults that come at any moment of a run: memory that is out, and functions of PARO's own that raise."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACK = str(Path(__file__).resolve().parent.parent.parent)
RUNTIME = (f"{PACK}/paro_runtime/", f"{PACK}/kernels/")
TESTS = str(Path(__file__).resolve().parent.parent)
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB (a test's)"


class OutOfMemory(TorchDispatchMode):
    """Raises torch.OutOfMemoryError in the place of PARO's allocations on a device, of this thread.

    host     folder of the host: what it allocates while PARO calls it is the host's.
    fails    numbers of allocations, from 0; none: they are counted only.
    places   of every allocation, in turn: the innermost two lines of PARO's code.
    """

    def __init__(self, device: str, host: Path, fails: range = range(0)) -> None:
        super().__init__()
        self._device, self._host, self._fails = device, str(host), fails
        self.places: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = (t for t in _tensors(result) if t.device.type == self._device and t.layout == torch.strided)
        if any(t.untyped_storage()._cdata not in given and t.untyped_storage().nbytes() for t in made):
            place = self._place()
            if place:
                self.places.append(place)
                if len(self.places) - 1 in self._fails:
                    raise torch.OutOfMemoryError(MESSAGE)
        return result

    @property
    def failed(self) -> bool:
        """Whether an allocation failed."""
        return any(number < len(self.places) for number in self._fails)

    def first_of_each_place(self, most: int) -> list[int]:
        """Numbers of the first allocation at every place, at most so many of them, evenly spread."""
        numbers = sorted({place: number for number, place in reversed(list(enumerate(self.places)))}.values())
        return [numbers[i * len(numbers) // most] for i in range(most)] if len(numbers) > most else numbers

    def _place(self) -> tuple[str, ...]:
        """Empty where the innermost code that is PARO's or the host's is the host's, or a test's."""
        found: list[str] = []
        frame = sys._getframe(2)
        while frame is not None and len(found) < 2:
            name = frame.f_code.co_filename
            if name.startswith(self._host) or name.startswith(TESTS):
                break
            # The checkout may hold the environment that the tests run in.
            if name.startswith(PACK) and "site-packages" not in name:
                found.append(f"{Path(name).name}:{frame.f_lineno}")
            frame = frame.f_back
        return tuple(found)


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Raising:
    """Raises in the place of a call of a function of PARO's, in this thread.

    error    what is raised.
    place    file and name of the function; None: calls are counted only.
    number   of the call of that function, from 0.
    calls    of every function, by place.
    """

    def __init__(self, error: Exception | None = None, place: tuple[str, str] | None = None, number: int = 0) -> None:
        self._error, self._place, self._number = error, place, number
        self.calls: Counter[tuple[str, str]] = Counter()
        self.failed = False

    def __enter__(self) -> Raising:
        sys.settrace(self._called)
        return self

    def __exit__(self, *raised) -> None:
        sys.settrace(None)

    def _called(self, frame, event, argument) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(RUNTIME):
            return
        place = (name.removeprefix(f"{PACK}/"), frame.f_code.co_qualname)
        if place == self._place and self.calls[place] == self._number:
            self.failed = True
            raise self._error
        self.calls[place] += 1
