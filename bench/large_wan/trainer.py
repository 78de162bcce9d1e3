"""One training run: model, optimisers, moving average and a state that goes on to the bit where it was saved.

Everything random of a step comes from (seed, step, rank), so that nothing but tensors and the step need saving.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...tests.tiny_wan.model import TinyWanConfig
from ...tests.tiny_wan.optim import BatchedMuon
from .curriculum import STAGES, Grid, Stage, clips, stage_at
from .flow import training_loss
from .model import CONFIG, new_model
from .pack import unpack
from .textures import Photos

WARM_UP = 200


@dataclass(frozen=True)
class Options:
    """What a run is. steps: of the whole schedule, all pieces together; tokens: of a step on each GPU."""

    steps: int
    tokens: int = 65536
    rate: float = 1.5e-3
    seed: int = 0
    device: str = "cuda"
    compiled: bool = False
    config: TinyWanConfig = CONFIG
    stages: tuple[Stage, ...] = STAGES


class Trainer:
    """State of a run on this process's GPU. `step` is how many steps are done, `fresh` at which the optimiser began."""

    def __init__(self, options: Options, photos: Photos) -> None:
        self.options, self.photos = options, photos
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.model = new_model(options.config).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.network: nn.Module = self.model
        if self.world > 1:
            self.network = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if options.compiled:
            torch._dynamo.config.recompile_limit = 64
            # It would cut the blocks' graphs at its buckets; a block is small enough to be sent when it is done.
            torch._dynamo.config.optimize_ddp = False
            for block in self.model.blocks:
                block.compile()
        matrices = [p for n, p in self.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = BatchedMuon(matrices)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.generator = torch.Generator(self.device)
        self.step = self.fresh = self.clips = 0

    def start_from(self, path: Path) -> None:
        """Go on from packed weights (see `pack`) at their step, with optimisers that begin anew."""
        state, metadata = unpack(path)
        self.model.load_state_dict(state)
        self.average.load_state_dict(state)
        self.step = self.fresh = int(metadata["step"])
        self.clips = int(metadata["clips"])

    def state(self) -> dict[str, object]:
        """All that the next step depends on, beside the options."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "muon": self.muon.buffers,
            "adam": self.adam.state_dict(),
            "counts": (self.step, self.fresh, self.clips),
        }

    def load_state(self, state: dict) -> None:
        """Undo `state`. The options must be those it was saved under, but for `steps`, which may be planned anew."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for group, saved in zip(self.muon.buffers, state["muon"], strict=True):
            for own, value in zip(group, saved, strict=True):
                own.copy_(value)
        self.adam.load_state_dict(state["adam"])
        self.step, self.fresh, self.clips = state["counts"]

    def grid(self) -> Grid:
        """The token grid of the next step, the same on all GPUs."""
        grids = stage_at(self.step, self.options.steps, self.options.stages).grids
        stream = torch.Generator().manual_seed(self.options.seed * 2**32 + self.step)
        return grids[int(torch.randint(len(grids), (), generator=stream))]

    def rate(self) -> float:
        """Learning rate of the next step: a linear rise from where the optimisers began, a cosine over all steps."""
        rise = min(1.0, (self.step - self.fresh + 1) / WARM_UP)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.options.steps)))
        return self.options.rate * rise * (0.005 + 0.995 * fall)

    def train_step(self, loss_of: Callable[[nn.Module], Tensor] | None = None) -> Tensor:
        """One step on a fresh batch, or of `loss_of(network)`; returns this GPU's loss `[]`, still on the device."""
        grid = self.grid()
        batch = clips(grid, self.options.tokens)
        self.generator.manual_seed((self.options.seed * 2**32 + self.step) * 1024 + self.rank + 1)
        if loss_of is None:
            loss = training_loss(self.network, batch, grid, self.photos, self.generator)
        else:
            loss = loss_of(self.network)
        loss.backward()
        params = list(self.model.parameters())
        nn.utils.clip_grad_norm_(params, 1.0)
        rate = self.rate()
        self.muon.step(rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for p in params:
            p.grad = None
        decay = min(0.999, 1 - 1 / (self.step / 10 + 1.0001))
        torch._foreach_lerp_(list(self.average.parameters()), params, 1 - decay)
        self.step += 1
        self.clips += batch * self.world
        return loss.detach()

    def together(self, value: int) -> int:
        """The first process's `value` on all of them."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)
