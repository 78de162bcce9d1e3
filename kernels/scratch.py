"""Scratch memory of the kernels: one buffer per device and stream, reused by every layer."""

from __future__ import annotations

import threading

import torch

ALIGNMENT = 256


class ScratchOutOfMemory(RuntimeError):  # noqa: N818
    """The scratch buffer of an attention call does not fit, not even for one key head at a time."""


_buffers: dict[tuple, torch.Tensor] = {}
_lock = threading.Lock()


def _key(device: torch.device) -> tuple:
    # Launches on one stream run one after the other, so they may share a buffer; other streams may not.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    return device, stream


class Scratch:
    """Hands out tensors that lie one behind the other in the shared buffer; ask for all of them, then `allocate`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self._requests: list[tuple[int, tuple[int, ...], torch.dtype]] = []

    def ask(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Reserve room for a tensor; returns its number."""
        self._requests.append((self.bytes, shape, dtype))
        count = 1
        for size in shape:
            count *= size
        self.bytes += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return len(self._requests) - 1

    def allocate(self) -> list[torch.Tensor]:
        """The tensors, uninitialised, in the order asked. On torch.OutOfMemoryError the old buffer is gone."""
        with _lock:
            key = _key(self.device)
            buffer = _buffers.get(key)
            if buffer is None or buffer.numel() < self.bytes:
                _buffers.pop(key, None)
                del buffer
                buffer = _buffers[key] = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        result = []
        for start, shape, dtype in self._requests:
            count = 1
            for size in shape:
                count *= size
            result.append(buffer[start : start + count * dtype.itemsize].view(dtype).view(shape))
        return result


def scratch_bytes() -> int:
    """Bytes that all scratch buffers hold now."""
    with _lock:
        return sum(buffer.numel() for buffer in _buffers.values())


def release_scratch() -> None:
    """Give all scratch memory back to torch's allocator (the end of a run, or when memory is short)."""
    with _lock:
        _buffers.clear()
