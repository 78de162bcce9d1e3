"""Makes the names of compiled kernels in Triton's cache the same in every process.

Triton names a kernel by its source and by the constants that it and the functions it calls use, but it counts those of
a function only if that function was looked at before, by another kernel. So the name depends on which kernel a process
launches first, and what one process has compiled another would not find. Each module of kernels looks at its functions
when it is imported, in the order of their definition, and those that it calls come from modules imported before.
"""

from __future__ import annotations

from typing import Any


def settle(module: dict[str, Any]) -> None:
    """Call at the end of a module of kernels with its `globals()`."""
    for value in list(module.values()):
        # Absent under Triton's interpreter, whose functions are never compiled.
        getattr(value, "cache_key", None)
