"""Train in pieces of limited time: every piece goes on where the last one was saved, on one GPU or several.

Files in the output folder; the first two are replaced by a rename, so that a run may be ended at any moment:
`checkpoint.pt`, everything, for going on to the bit (about 350 MB); `average.safetensors`, the moving average in 8 bits
(about 23 MB), enough to go on elsewhere; `log.json`, what the run was and its losses; `samples.png`.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .curriculum import TOY_STAGES
from .flow import HELD_OUT, held_out, mean_loss
from .model import CONFIG
from .pack import pack
from .samples import save_samples
from .textures import Photos
from .trainer import Options, Trainer

LOOK = 20  # steps between looks at the clock, which wait for the GPU
GO_ON, SAVE, STOP = 0, 1, 2
TOY_CONFIG = replace(CONFIG, dim=128, layers=2, ffn_dim=128)


def begin_processes(device: str) -> str:
    """Join the other processes if there are any (torchrun); returns this one's device."""
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        # As in tests/tiny_wan/train.py: cuDNN plans anew for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


class Piece:
    """One process's part in one piece of a run. Only the first process writes."""

    def __init__(self, trainer: Trainer, out: Path, real: Sequence[Tensor], toy: bool) -> None:
        self.trainer, self.out, self.real, self.toy = trainer, out, real, toy
        self.writes = trainer.rank == 0
        self.log: dict[str, list] = {"loss": [], "held_out": [], "pieces": []}

    def go_on(self, start: Path | None) -> None:
        """From the folder's checkpoint if there is one, else from packed weights if given, else from nothing."""
        path = self.out / "checkpoint.pt"
        if path.is_file():
            # On the CPU, where AdamW keeps its step counts: on the GPU every step would wait to read each of them.
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.trainer.load_state(saved["state"])
            self.log = json.loads(saved["log"])
        elif start is not None:
            self.trainer.start_from(start)

    def look(self, window: list[Tensor], seconds: float) -> None:
        """Note the mean loss since the last look. FloatingPointError if it is not finite; nothing is saved then."""
        loss = float(torch.stack(window).mean())
        window.clear()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.trainer.step}: loss {loss}; the last checkpoint is as it was")
        self.log["loss"].append([self.trainer.step, round(seconds, 1), round(loss, 5)])

    def ask_held_out(self) -> None:
        """Loss of the moving average on what is never trained."""
        trainer = self.trainer
        sets = (((2, 3, 4), 2),) if self.toy else HELD_OUT
        found = held_out(trainer.average, trainer.device, trainer.photos, self.real, sets)
        self.log["held_out"].append({"step": trainer.step, "losses": found})
        figures = [f"{name} {prompt} {mean_loss(v):.4f}" for name, by in found.items() for prompt, v in by.items()]
        print(f"step {trainer.step} held out: {'; '.join(figures)}", flush=True)

    def save(self) -> None:
        """Write checkpoint, packed average and log."""
        trainer, new = self.trainer, self.out / "checkpoint.new"
        torch.save({"state": trainer.state(), "log": json.dumps(self.log)}, new)
        new.replace(self.out / "checkpoint.pt")
        metadata = {"step": str(trainer.step), "clips": str(trainer.clips)}
        pack(trainer.average.state_dict(), self.out / "average.safetensors", metadata, fraction=0.0)
        options = {k: v for k, v in vars(trainer.options).items() if isinstance(v, int | float | str)}
        facts = {
            **options,
            "gpus": trainer.world,
            "gpu": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "none",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "photographs": len(trainer.photos.images),
            "steps_done": trainer.step,
            "clips": trainer.clips,
        }
        (self.out / "log.json").write_text(json.dumps(facts | self.log) + "\n", encoding="utf-8")

    def run(self, seconds: float, save_every: float, ask_every: int) -> None:
        """Train until `seconds` have passed or all steps are done; a piece ends saved."""
        trainer, began = self.trainer, time.monotonic()
        first, saved, window = trainer.step, began, []
        order = STOP if trainer.step >= trainer.options.steps else GO_ON
        while order != STOP:
            window.append(trainer.train_step())
            done = trainer.step >= trainer.options.steps
            if trainer.step % LOOK and not done:
                continue
            now = time.monotonic()
            self.look(window, now - began)
            if self.writes and (trainer.step % 200 == 0 or self.toy):
                pace = (now - began) / (trainer.step - first)
                print(f"step {trainer.step} {pace:.3f} s a step loss {self.log['loss'][-1][2]}", flush=True)
            order = STOP if done or now - began > seconds else SAVE if now - saved > save_every else GO_ON
            order = trainer.together(order)
            if self.writes and trainer.step % ask_every == 0:
                self.ask_held_out()
            if order == SAVE:
                saved = now
                if self.writes:
                    self.save()
        if self.writes:
            self.log["pieces"].append([first, trainer.step, round(time.monotonic() - began, 1)])
            self.ask_held_out()
            self.save()
            save_samples(self.out / "average.safetensors", self.out / "samples.png", str(trainer.device), self.toy)


def train(
    out: Path,
    options: Options,
    *,
    seconds: float,
    save_every: float = 120.0,
    ask_every: int = 1000,
    photos: Path | None = None,
    real: Path | None = None,
    start: Path | None = None,
    toy: bool = False,
) -> None:
    """One piece of a run: see the module. `photos`, `real`: folders; `start`: packed weights; `toy`: tiny sizes."""
    from .clips import load_clips

    out.mkdir(parents=True, exist_ok=True)
    options = replace(options, device=begin_processes(options.device))
    if toy:
        options = replace(options, config=TOY_CONFIG, stages=TOY_STAGES, tokens=128)
    trainer = Trainer(options, Photos.load(photos, options.device))
    piece = Piece(trainer, out, load_clips(real, (2, 3, 4) if toy else (16, 20, 20)), toy)
    piece.go_on(start)
    piece.run(seconds, save_every, ask_every)
    if trainer.world > 1:
        dist.destroy_process_group()
