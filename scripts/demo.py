"""The main job, end to end: the same clip dense and with PARO, and what the difference is.

python scripts/demo.py [--out DIR] [--host auto|comfyui|embedded] [--density 0.7] [--precision int8] [--seed N]
                       [--size FxHxW]

Writes report.json, dense.webp, paro.webp, difference.png and plan.png to DIR. With a ComfyUI the clips come from a
workflow sent to the real server; without one, from the runtime's session and a small sampler.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import _checkout
from _environment import BASE_MODULES, ensure
from _host import clone_host, find_host, host_version


def parse_size(text: str) -> tuple[int, int, int]:
    """`8x12x12` -> token grid (F, H, W)."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match or min(int(n) for n in match.groups()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not FxHxW, such as 8x12x12")
    return tuple(int(n) for n in match.groups())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument("--host", choices=("auto", "comfyui", "embedded"), default="auto")
    parser.add_argument(
        "--density", type=float, help="share of blocks kept, above 0 up to 1 (default: the preset balanced)"
    )
    parser.add_argument("--precision", default="int8", help="auto, 16bit, int8, int8_pv8, fp8, int4 or int4_pv4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=parse_size, default=(8, 12, 12), help="tokens FxHxW (default: 8x12x12)")
    return parser.parse_args()


def progress(text: str) -> None:
    """One line of progress, rewritten in place on a terminal."""
    if sys.stdout.isatty():
        print(f"\r\x1b[2K{text}", end="", flush=True)
    else:
        print(text, flush=True)


def choose_host(wanted: str) -> Path | None:
    """The ComfyUI to use, or None for the embedded host."""
    if wanted == "embedded":
        return None
    host = find_host()
    if host is None and wanted == "comfyui":
        print("no ComfyUI found: cloning one", flush=True)
        host = clone_host()
    if host is None:
        print("no ComfyUI found: using the embedded sampler (set COMFYUI_PATH to use a real one)", flush=True)
    return host


def main() -> int:
    args = arguments()
    path = choose_host(args.host)
    ensure(BASE_MODULES, path)
    _checkout.register()
    from _demo_output import write_results
    from comfy_server import ComfyError
    from comfyui_paro.paro_runtime.config.settings import Settings, SettingsError
    from comfyui_paro.tests.tiny_wan.data import BACKGROUNDS, DIRECTIONS, SHAPES

    preset = "balanced" if args.density is None else "custom"
    settings = Settings(preset=preset, density=args.density, precision=args.precision, min_tokens=0)
    try:
        settings.validated()
    except SettingsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    # The server runs in a folder of its own, where a relative path would mean another place.
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    labels = (
        SHAPES[args.seed % len(SHAPES)],
        DIRECTIONS[args.seed // 4 % len(DIRECTIONS)],
        BACKGROUNDS[args.seed // 2 % len(BACKGROUNDS)],
    )
    if path is None:
        from _demo_embedded import EmbeddedHost as Host
    else:
        from _demo_comfyui import ComfyHost as Host
    try:
        host = Host(path, args.size, args.seed, args.out, progress)
        try:
            runs = {
                "dense": host.run(labels, None, "dense"),
                "paro": host.run(labels, settings, "PARO"),
                "identity": host.run(labels, replace(settings, order="original"), "original order"),
            }
        finally:
            host.close()
    except ComfyError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    version = host_version(path) if path else host.version
    report = write_results(args.out, runs, labels, host.name, version, args)
    print(json.dumps({key: report[key] for key in ("tokens", "density", "psnr_db", "identity_order_psnr_db")}))
    for reason, count in report["passed"] + report["fallbacks"]:
        print(f"{count} attention calls ran dense: {reason}")
    print(f"wrote {', '.join(sorted(p.name for p in args.out.iterdir() if p.is_file()))} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
