"""What a host that records the allocations of a forward would see: memory that outlives it (see `Evaluation`)."""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.kernels.core.scratch import release_scratch
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIGMAS = [1.0, 0.8, 0.6, 0.0]
LAYOUT = TokenLayout(3, (3, 7, 11), 2)
SITES = [Site("double", i) for i in range(2)]
_OWN = ("__torch_dispatch__", "_place")
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
    # The checkout may hold the environment that the tests run in.
    own = [f for f in traceback.extract_stack() if f.filename.startswith(PACK) and "site-packages" not in f.filename]
    frames = [f for f in own if f.name not in _OWN]
    if all("/tests/" in f.filename.removeprefix(PACK) for f in frames):
        return []
    return [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:])]


@torch.inference_mode()  # as the host runs every node
def recorded_run(
    recording: Callable[[], AbstractContextManager],
    lasting: Callable[[], AbstractContextManager],
    backend: str,
    *,
    store=None,
    plan=None,
    layout: TokenLayout = LAYOUT,
    sites: list[Site] = SITES,
    device: str = "cpu",
    **settings,
) -> Session:
    """Every step and site of a run with one dense step, each evaluation in `recording`."""
    common = {"preset": "custom", "density": 0.4, "strict": True, "min_tokens": 0, "dense_steps": 1}
    settings = Settings(**{**common, "backend": backend, **settings})
    policy = Policy(ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), settings, plan, store, remember=True)
    session = Session(policy, sigmas=SIGMAS, lasting=lasting)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, layout.length, 32, generator=generator)
    q, k, v = (x.to(device, torch.float16) for x in (q, k, v))
    for sigma in SIGMAS[:-1]:
        evaluation = session.begin(layout=layout, sigma=sigma)
        with recording():
            for site in sites:
                evaluation.attend(site, q, k, v, dense=lambda: sdpa(q, k, v))
        assert not evaluation.end()
    return session
