"""What a host that records the allocations of a forward would see: memory that outlives it (see `Evaluation`)."""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from comfyui_paro.kernels.scratch import release_scratch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACK = str(Path(__file__).resolve().parent.parent)


def forget_everything() -> None:
    """Empty PARO's caches, so that what fills them is allocated again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("comfyui_paro."):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    release_scratch()


class Recorder(TorchDispatchMode):
    """Memory that was allocated while PARO was at work, in `recording` and not in `pause`. device: of this kind only.

    places: names of the files of the pack, tests included, that allocated any.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self._recording = self._paused = False
        self._seen: list[tuple[StorageWeakRef, str]] = []
        self.places: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A forward. Raises AssertionError if memory allocated in it outlives it."""
        self._seen, self._recording = [], True
        try:
            with self:
                yield
        finally:
            self._recording = False
        if self._device == "cpu":
            gc.collect()  # Triton's interpreter leaves cycles
        alive = [where for storage, where in self._seen if not storage.expired()]
        assert not alive, "memory outlives the forward:\n" + "\n".join(alive)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """As the host's, which does not nest."""
        assert not self._paused, "a pause within a pause would end both"
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self._recording and not self._paused:
            given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            for tensor in _tensors(result):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and tensor.device.type == self._device and storage.nbytes():
                    place = _place()
                    if place:
                        self.places.add(place[0].partition(":")[0])
                        where = f"{function} {list(tensor.shape)} {' < '.join(place)}"
                        self._seen.append((StorageWeakRef(storage), where))
        return result


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _place() -> list[str]:
    """The innermost lines of the pack, tests included; none where PARO is not at work, but the model alone."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACK) and f.filename != __file__]
    if all("/tests/" in f.filename.removeprefix(PACK) for f in frames):
        return []
    return [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:])]
