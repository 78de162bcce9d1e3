"""Make and use large-Wan, a trained video model of real sizes (`bench/large_wan`, its model card is README.md there).

    python bench/large_bed.py plan                                       what a training costs at an assumed speed
    python bench/large_bed.py train --out out/large --seconds 560 [--photos DIR] [--real DIR] [--resume-from FILE]
    torchrun --nproc_per_node 2 bench/large_bed.py train --out out/large --seconds 560
    python bench/large_bed.py pack --weights out/large/checkpoint.pt --out out/large/paro-large-wan.safetensors
    python bench/large_bed.py sheet --weights FILE --out out/large/sheet.png
    python bench/large_bed.py unpack --weights FILE --out MODEL.safetensors      for ComfyUI
    python bench/large_bed.py record --weights FILE --grid 8x12x12 --layers 1 4 6 --steps 6 --heads 0 2 --out FILE
    python bench/large_bed.py mechanisms --weights FILE --grid 16x20x28 --json OUT     what each mechanism is worth
    python bench/large_bed.py table JSON...                              the same as Markdown, at equal time
    python bench/large_bed.py attention-error --weights FILE --grid 16x20x28 --json OUT  single calls, and routing
    python bench/large_bed.py clip VIDEO --out DIR/clip.npy              frames of a real video, to hold out

Giving the same `train` command again goes on where the last piece ended. `--toy` tries everything on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

_spec = importlib.util.spec_from_file_location(
    "_checkout", Path(__file__).resolve().parent.parent / "scripts" / "_checkout.py"
)
_checkout = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_checkout)
_checkout.register()

from comfyui_paro.bench.large_wan import (  # noqa: E402
    attention_error,
    clips,
    curriculum,
    equal_time,
    mechanisms,
    pack,
    record,
    samples,
)
from comfyui_paro.bench.large_wan.model import CONFIG, load_large_wan  # noqa: E402
from comfyui_paro.bench.large_wan.train import train  # noqa: E402
from comfyui_paro.bench.large_wan.trainer import Options  # noqa: E402
from comfyui_paro.kernels.core.precision import PRECISIONS  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 20_000


def run_plan(args: argparse.Namespace) -> None:
    """Print the curriculum's cost."""
    print(curriculum.table(CONFIG, args.tokens, args.steps, args.tflops * 1e12))


def run_train(args: argparse.Namespace) -> None:
    """One piece of the training."""
    options = Options(args.steps, args.tokens, args.rate, args.seed, args.device, args.compile)
    folders = {"photos": args.photos, "real": args.real, "start": args.start}
    train(args.out, options, seconds=args.seconds, save_every=args.save_every, toy=args.toy, **folders)


def run_pack(args: argparse.Namespace) -> None:
    """The moving average of a checkpoint, or packed weights, into at most `--limit` bytes."""
    if args.weights.suffix == ".pt":
        state = torch.load(args.weights, map_location="cpu", weights_only=True)["state"]
        weights, (step, _, seen) = state["average"], state["counts"]
        metadata = {"step": str(step), "clips": str(seen)}
    else:
        weights, metadata = pack.unpack(args.weights)
    fraction = pack.pack_within(weights, args.out, {k: metadata[k] for k in ("step", "clips")}, args.limit)
    errors = pack.relative_errors(weights, pack.unpack(args.out)[0])
    mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.get)
    print(f"{args.out.stat().st_size} bytes, step {fraction} of each row's root mean square")
    print(f"relative error of the matrices: mean {mean:.4f}, worst {errors[worst]:.4f} ({worst})")


def run_unpack(args: argparse.Namespace) -> None:
    """Packed weights as an ordinary fp16 Wan 2.1 file."""
    from safetensors.torch import save_file

    state, _ = pack.unpack(args.weights)
    save_file({k: v.half().contiguous() for k, v in state.items()}, args.out, metadata={"format": "pt"})


def run_sheet(args: argparse.Namespace) -> None:
    """Samples of packed weights as a picture."""
    samples.save_samples(args.weights, args.out, args.device, args.toy)


def run_record(args: argparse.Namespace) -> None:
    """q, k, v of a few calls."""
    model = load_large_wan(args.weights, device=args.device)
    grid = tuple(int(n) for n in args.grid.split("x"))
    found = record.record(model, grid, args.seed, args.layers, args.steps, args.heads)
    facts = record.facts_of(pack.unpack(args.weights)[1]["step"], args.seed)
    print(f"{len(found)} calls, {record.save(found, args.out, facts)} bytes")


def run_clip(args: argparse.Namespace) -> None:
    """Frames of a video as an array."""
    print(clips.cut(args.video, args.out, args.frames, args.every, args.skip))


def _setup(args: argparse.Namespace) -> mechanisms.Setup:
    grid = tuple(int(n) for n in args.grid.split("x"))
    on_gpu = args.device.startswith("cuda")
    backend = args.backend or ("triton" if on_gpu else "reference")
    precision = args.precision or ("fp8" if on_gpu else "16bit")
    common = (args.clips, args.steps, args.dense_steps, args.device, backend, precision, args.repeats)
    return mechanisms.Setup(args.weights, grid, *common)


def run_mechanisms(args: argparse.Namespace) -> None:
    """Fidelity and attention time of runs with one mechanism changed."""
    setup = _setup(args)
    with torch.inference_mode():
        limits = {"only": args.only, "limit_seconds": args.limit_seconds}
        mechanisms.run(setup, args.densities, args.json, **limits, told=lambda text: print(text, flush=True))


def run_attention_error(args: argparse.Namespace) -> None:
    """Error and time of single calls: PARO's orders against block-sparse routing."""
    with torch.inference_mode():
        print(attention_error.run(_setup(args), args.densities, args.layers, args.at_steps, args.json))


def run_table(args: argparse.Namespace) -> None:
    """What `mechanisms` wrote, as Markdown."""
    print(equal_time.tables(args.files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, *arguments) -> argparse.ArgumentParser:
        made = commands.add_parser(run.__name__.removeprefix("run_").replace("_", "-"), help=run.__doc__)
        made.set_defaults(run=run)
        for name, options in arguments:
            made.add_argument(name, **options)
        return made

    out, weights = ("--out", {"type": Path, "required": True}), ("--weights", {"type": Path, "required": True})
    device, toy = ("--device", {"default": DEVICE}), ("--toy", {"action": "store_true", "help": "sizes for a try"})
    seed = ("--seed", {"type": int, "default": 0})
    steps = ("--steps", {"type": int, "default": STEPS, "help": "of the whole training, all pieces together"})
    tokens = ("--tokens", {"type": int, "default": 65536, "help": "of a step on each GPU"})

    command(run_plan, steps, tokens, ("--tflops", {"type": float, "default": 320.0, "help": "assumed, of one GPU"}))
    training = command(run_train, out, steps, tokens, seed, device, toy)
    training.add_argument("--seconds", type=float, required=True, help="of this piece, without loading and samples")
    training.add_argument("--save-every", type=float, default=120.0, help="seconds")
    training.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    training.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    training.add_argument("--photos", type=Path, help="folder of photographs for backgrounds")
    training.add_argument("--real", type=Path, help="folder of clips to ask the held-out loss of, never trained")
    resume = "packed weights to go on from where --out has no checkpoint"
    training.add_argument("--resume-from", dest="start", type=Path, help=resume)
    command(run_pack, weights, out, ("--limit", {"type": int, "default": pack.LIMIT, "help": "bytes"}))
    command(run_unpack, weights, out)
    command(run_sheet, weights, out, device, toy)
    several = {"type": int, "nargs": "+"}
    recording = command(run_record, weights, out, seed, device)
    recording.add_argument("--grid", default="8x12x12")
    for name, chosen in (("--layers", [1, 4, 6]), ("--steps", [6]), ("--heads", [0, 2])):
        recording.add_argument(name, default=chosen, **several)
    clip = command(run_clip, ("video", {"type": Path}), out)
    for name, value in (("--frames", 21), ("--every", 1), ("--skip", 0)):
        clip.add_argument(name, type=int, default=value)
    json = ("--json", {"type": Path, "required": True})
    whole, single = (command(run, weights, device, json) for run in (run_mechanisms, run_attention_error))
    for measuring, repeats in ((whole, 2), (single, 20)):
        measuring.add_argument("--grid", default="16x20x28")
        for name, value in (("--clips", 10), ("--steps", 20), ("--dense-steps", 4), ("--repeats", repeats)):
            measuring.add_argument(name, type=int, default=value)
        measuring.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
        measuring.add_argument("--backend", choices=("triton", "reference"), help="default: what suits the device")
        measuring.add_argument("--precision", choices=tuple(PRECISIONS), help="default: fp8 on a GPU, else 16bit")
    whole.add_argument(
        "--only",
        help="regular expression sought in `mechanism: NAME` or `policy: NAME`; the default is always measured",
    )
    whole.add_argument("--limit-seconds", type=float, help="begin no row that might not end by then")
    single.add_argument("--layers", default=[1, 4, 6], **several)
    single.add_argument("--at-steps", default=[4, 10, 16], help="from 0; plans are of the last dense step", **several)
    command(run_table, ("files", {"type": Path, "nargs": "+", "metavar": "JSON"}))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
