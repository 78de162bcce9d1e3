"""Train tiny-Wan by flow matching on procedural videos; the committed checkpoint came from this script.

Run it as a module from the folder above the package, for instance from the repository root:
`python -m tests.tiny_wan.train --minutes 7.5 --out out/tiny`.

Schedule and learning rate follow the wall clock, so a run always ends on time and fully annealed. A
checkpoint (fp16, exponential moving average) is written every minute.
"""

import argparse
import copy
import datetime
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from . import data, recognise
from .model import TinyWan
from .optim import BatchedMuon
from .sampler import sample
from .sheet import save_sheet

# Token grids (T, h, w) with their weights in the first 40 % of the time and after it. 9x13x11 is never
# trained.
GRIDS = (
    ((8, 8, 8), 0.55, 0.20),
    ((6, 10, 14), 0.15, 0.15),
    ((8, 12, 12), 0.30, 0.30),
    ((9, 9, 15), 0.0, 0.10),
    ((12, 12, 12), 0.0, 0.15),
    ((8, 16, 16), 0.0, 0.10),
)


def parse_args() -> argparse.Namespace:
    """Command line; the defaults are the committed run's on one data-centre GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="training time, compilation included")
    parser.add_argument("--out", type=Path, default=Path("out/tiny"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eval-clips", type=int, default=64)
    return parser.parse_args()


class Trainer:
    """Model, optimisers, moving average and batch source of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = TinyWan().to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        table = torch.cat([data.text_table(), torch.zeros(1, data.TEXT_DIM)])
        self.table = table.to(self.device, torch.bfloat16)
        self.reset_optimisers()
        self.step = self.videos = 0
        self.lr_scale = 1.0

    def reset_optimisers(self) -> None:
        """Muon for all matrices inside the blocks, AdamW for everything else."""
        matrices = [p for n, p in self.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = BatchedMuon(matrices)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)

    def compile(self) -> None:
        """Compile the blocks (one graph for all layers and grids) and keep eager code if that fails."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.model.blocks:
            block.compile()
        try:
            started = time.monotonic()
            for grid, _, _ in GRIDS:
                self.loss(grid, self.batch_of(grid)).backward()
                self.synchronise()
                print(f"compiled {grid} at {time.monotonic() - started:.1f} s", flush=True)
        except Exception as error:
            print(f"compilation failed, going on eagerly: {error!r}"[:2000], flush=True)
            for block in self.model.blocks:
                block._compiled_call_impl = None
        for p in self.model.parameters():
            p.grad = None

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def batch_of(self, grid: tuple[int, int, int]) -> int:
        """Clips per step on `grid`."""
        return max(2, self.args.tokens // math.prod(grid))

    def loss(self, grid: tuple[int, int, int], batch: int) -> Tensor:
        """Flow-matching loss of one fresh batch: x_s = (1-s) x + s noise, target noise - x, mean squares.

        s = 3u/(1+2u), u the sigmoid of 1.2 * normal (one clip in ten: u uniform); one context in ten is zero.
        """
        gen, device = self.generator, self.device
        frames, height, width = grid[0], 8 * grid[1], 8 * grid[2]
        clips = data.draw_clips(batch, height, width, gen)
        clean = data.encode(data.render(clips, frames, height, width))
        words = clips.labels + torch.tensor([0, 4, 8], device=device)
        dropped = torch.rand(batch, 1, generator=gen, device=device) < 0.1
        context = self.table[torch.where(dropped, 12, words)]
        u = torch.sigmoid(1.2 * torch.randn(batch, generator=gen, device=device))
        flat = torch.rand(batch, generator=gen, device=device)
        u = torch.where(torch.rand(batch, generator=gen, device=device) < 0.1, flat, u)
        sigma = (3 * u / (1 + 2 * u))[:, None, None, None, None]
        noise = torch.randn(clean.shape, generator=gen, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = self.model((1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), context)
        return F.mse_loss(velocity.float(), noise - clean)

    def train_step(self, progress: float) -> Tensor:
        """One optimiser step at `progress` (0..1 of the time); returns the loss, still on the device."""
        weights = [late if progress >= 0.4 else early for _, early, late in GRIDS]
        # The grid comes from a stream of its own, so that choosing it never waits for the device.
        pick = torch.multinomial(torch.tensor(weights), 1, generator=self.grid_stream).item()
        grid = GRIDS[pick][0]
        batch = self.batch_of(grid)
        loss = self.loss(grid, batch)
        loss.backward()
        params = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        warm = min(1.0, (self.step + 1) / 200)
        fall = 1.0 if progress < 0.3 else max(0.005, (1 - progress) / 0.7)
        rate = self.args.lr * self.lr_scale * warm * fall
        self.muon.step(rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for p in params:
            p.grad = None
        decay = min(0.999, 1 - 1 / (self.step / 10 + 1.0001))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.videos += batch
        return loss.detach()

    def run(self) -> dict[str, object]:
        """Train until the time is up; returns the run's metrics."""
        args = self.args
        self.grid_stream = torch.Generator().manual_seed(args.seed + 1)
        started = time.monotonic()
        if args.compile:
            self.compile()
        budget, saved = 60 * args.minutes, time.monotonic()
        history: list[list[float]] = []
        window: list[Tensor] = []
        while (elapsed := time.monotonic() - started) < budget:
            window.append(self.train_step(elapsed / budget))
            if self.step % 50 and self.device.type == "cuda":
                continue
            mean = float(torch.stack(window).mean())
            window.clear()
            if not math.isfinite(mean) or (self.step > 1000 and mean > 0.9):
                self.recover(mean)
                continue
            history.append([self.step, round(elapsed, 1), round(mean, 5)])
            if self.step % 250 == 0 or self.device.type == "cpu":
                print(f"step {self.step} t {elapsed:.0f} s loss {mean:.4f} videos {self.videos}", flush=True)
            if time.monotonic() - saved > 60:
                saved = time.monotonic()
                self.save(self.metrics(elapsed, history))
        self.synchronise()
        metrics = self.metrics(time.monotonic() - started, history)
        self.save(metrics)
        return metrics

    def recover(self, mean: float) -> None:
        """After a divergence go back to the moving average saved last and halve the learning rate."""
        print(f"step {self.step}: loss {mean}, going back to the last checkpoint", flush=True)
        path = self.args.out / "paro-tiny-wan.safetensors"
        if path.exists():
            from safetensors.torch import load_file

            state = {k: v.float() for k, v in load_file(path).items()}
            self.model.load_state_dict(state)
            self.average.load_state_dict(state)
        self.reset_optimisers()
        self.lr_scale *= 0.5

    def metrics(self, elapsed: float, history: list[list[float]]) -> dict[str, object]:
        """Facts of the run as written beside the checkpoint."""
        tail = [loss for _, _, loss in history[-10:]]
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "CPU"
        return {
            "seed": self.args.seed,
            "steps": self.step,
            "videos": self.videos,
            "tokens_per_step": self.args.tokens,
            "loss_final": round(sum(tail) / max(1, len(tail)), 5),
            "loss_curve": history[:: max(1, len(history) // 40)],
            "seconds": round(elapsed, 1),
            "learning_rate": self.args.lr,
            "lr_halvings": round(-math.log2(self.lr_scale)),
            "device": gpu,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }

    def save(self, metrics: dict[str, object]) -> None:
        """Write the moving average as fp16 safetensors (by a rename, never half) and the metrics as JSON."""
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().cpu().contiguous() for k, v in self.average.state_dict().items()}
        assert all(bool(v.isfinite().all()) for v in state.values()), "the moving average is not finite"
        save_file(state, out / "new.safetensors", metadata={"format": "pt", "licence": "Apache-2.0"})
        (out / "new.safetensors").replace(out / "paro-tiny-wan.safetensors")
        (out / "paro-tiny-wan.json").write_text(json.dumps(metrics, indent=1) + "\n")


def evaluate(trainer: Trainer, clips: int) -> dict[str, object]:
    """Sample clips of known labels from the fp16-rounded average, recognise them, write contact sheets."""
    model = TinyWan().to(trainer.device)
    model.load_state_dict({k: v.half().float() for k, v in trainer.average.state_dict().items()})
    model.eval().requires_grad_(False)
    report: dict[str, object] = {}
    for grid in ((8, 8, 8), (8, 12, 12), (9, 13, 11)):
        frames, rows, cols = grid
        name = "x".join(map(str, grid))
        labels = torch.arange(clips)[:, None] // torch.tensor([1, 4, 16]) % 4
        true = data.draw_clips(clips, 8 * rows, 8 * cols, torch.Generator().manual_seed(5), labels)
        video = data.render(true, frames, 8 * rows, 8 * cols).to(trainer.device)
        report[f"{name} true clips"] = recognise.rates(video, labels)
        for steps, cfg in ((8, 1.0), (16, 1.0), (16, 2.0)):
            size = (frames, 2 * rows, 2 * cols)
            latent = sample(model, data.contexts(labels), size, steps=steps, cfg=cfg, seed=11)
            video = data.decode(latent)
            report[f"{name} {steps} steps cfg {cfg:g}"] = recognise.rates(video, labels)
            if (steps, cfg) == (16, 1.0) and grid != (8, 8, 8):
                save_sheet(trainer.args.out / f"samples-{name}.png", video[:: max(1, clips // 12)][:12])
    return report


def main() -> None:
    """Train, evaluate, and write everything to `--out`."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    metrics = trainer.run()
    print(json.dumps({k: v for k, v in metrics.items() if k != "loss_curve"}), flush=True)
    try:
        metrics["recognition"] = evaluate(trainer, args.eval_clips)
    except Exception as error:  # the checkpoint is safe already; report and end normally
        metrics["recognition"] = {"failed": repr(error)[:500]}
    trainer.save(metrics)
    print(json.dumps(metrics["recognition"], indent=1), flush=True)


if __name__ == "__main__":
    main()
