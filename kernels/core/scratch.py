"""Scratch memory of the kernels: small calls share a buffer per device, stream and thread, large ones take theirs for
the call.

Memory that were kept between calls would stand beside the activations of the model's other layers, where its peak is.
"""

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
# Scratch up to this size is kept with its views: some thousand tokens (4,608 of 24 heads of 128 channels take 41 MiB),
# where making views takes as long as a launch and the model's peak is its weights. A call with more takes milliseconds.
LARGEST_KEPT = 64 << 20


class ScratchOutOfMemory(RuntimeError):  # noqa: N818
    """The scratch buffer of an attention call does not fit, not even for one key head at a time."""


class ScratchLayout:
    """Tensors that lie one behind the other in one buffer. shapes: name -> (shape, dtype); `bytes` in all."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self.bytes = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            self.places[name] = (self.bytes, self.bytes + size, shape, dtype)
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name in `memory`, uint8 of at least `bytes`."""
        return {
            name: memory[start:end].view(dtype).view(shape) for name, (start, end, shape, dtype) in self.places.items()
        }


@dataclass
class _Buffer:
    memory: torch.Tensor
    # Made once per layout: views cost more time than a launch.
    views: WeakKeyDictionary[ScratchLayout, dict[str, torch.Tensor]] = field(default_factory=WeakKeyDictionary)


_buffers: dict[tuple, _Buffer] = {}
_lock = threading.Lock()


def _key(device: torch.device) -> tuple:
    # Calls on one stream run one after the other, so they may share a buffer; other streams may not, and two threads
    # may launch parts of their calls in turn on the stream that both have by default.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream, threading.get_ident()


def allocate(layout: ScratchLayout, device: torch.device) -> dict[str, torch.Tensor]:
    """The layout's tensors by name, uninitialised. Raises torch.OutOfMemoryError; the kept buffer may be gone then.

    More than LARGEST_KEPT belongs to the caller alone and is free as soon as the last of these tensors is dropped,
    which may be before the kernels have run: torch's allocators give memory to later work of the same stream only, and
    that runs after them.
    """
    if layout.bytes > LARGEST_KEPT:
        return layout.views(torch.empty(layout.bytes, dtype=torch.uint8, device=device))
    key = _key(device)
    with _lock:
        buffer = _buffers.get(key)
        if buffer is None or buffer.memory.numel() < layout.bytes:
            buffer = None
            _buffers.pop(key, None)
            buffer = _buffers[key] = _Buffer(torch.empty(layout.bytes, dtype=torch.uint8, device=device))
        views = buffer.views.get(layout)
        if views is None:
            views = buffer.views[layout] = layout.views(buffer.memory)
        return views


def scratch_bytes() -> int:
    """Bytes that are kept between calls, all devices, streams and threads together."""
    with _lock:
        return sum(buffer.memory.numel() for buffer in _buffers.values())


def release_scratch() -> None:
    """Give what is kept back to torch's allocator (the end of a run, or when memory is short)."""
    with _lock:
        _buffers.clear()
