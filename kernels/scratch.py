"""Scratch memory of the kernels: one buffer per device and stream, reused by every layer."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

ALIGNMENT = 256
# A call whose scratch would be larger does its heads in groups. Some 8,000 query tiles share this much, sixty rounds of
# an H100's multiprocessors: smaller groups would leave more of them idle at the end of each.
BUDGET = 256 << 20


class ScratchOutOfMemory(RuntimeError):  # noqa: N818
    """The scratch buffer of an attention call does not fit, not even for one key head at a time."""


class ScratchLayout:
    """Tensors that lie one behind the other in the shared buffer. shapes: name -> (shape, dtype); `bytes` in all."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self.bytes = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            self.places[name] = (self.bytes, self.bytes + size, shape, dtype)
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class _Buffer:
    memory: torch.Tensor
    # Made once per layout: views cost more time than a launch.
    views: WeakKeyDictionary[ScratchLayout, dict[str, torch.Tensor]] = field(default_factory=WeakKeyDictionary)


_buffers: dict[tuple, _Buffer] = {}
_lock = threading.Lock()


def _key(device: torch.device) -> tuple:
    # Launches on one stream run one after the other, so they may share a buffer; other streams may not.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    return device, stream


def allocate(layout: ScratchLayout, device: torch.device) -> dict[str, torch.Tensor]:
    """The layout's tensors by name, uninitialised. On torch.OutOfMemoryError the old buffer is gone."""
    key = _key(device)
    with _lock:
        buffer = _buffers.get(key)
        if buffer is None or buffer.memory.numel() < layout.bytes:
            buffer = None
            _buffers.pop(key, None)
            buffer = _buffers[key] = _Buffer(torch.empty(layout.bytes, dtype=torch.uint8, device=device))
        views = buffer.views.get(layout)
        if views is None:
            views = buffer.views[layout] = {
                name: buffer.memory[start:end].view(dtype).view(shape)
                for name, (start, end, shape, dtype) in layout.places.items()
            }
        return views


def scratch_bytes() -> int:
    """Bytes that all scratch buffers hold now."""
    with _lock:
        return sum(buffer.memory.numel() for buffer in _buffers.values())


def release_scratch() -> None:
    """Give all scratch memory back to torch's allocator (the end of a run, or when memory is short)."""
    with _lock:
        _buffers.clear()
