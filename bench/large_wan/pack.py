"""Weights in 8-bit codes per row, entropy coded: 16 MiB hold all 27.6 million, about 5.3 bits each.

Every matrix row is rounded to whole multiples of a step of its own, which is a common fraction of the row's root mean
square, and the multiples (-127 to 127) are Huffman coded (DEFLATE, RFC 1951, through zlib). For numbers that are near
normal this is within 0.25 bit of the best that any code of single numbers can do (Gish and Pierce 1968), and finer
than a fixed number of bits at the same size. Vectors and modulations stay fp16. Of the first text layer only the
columns of the vocabulary are stored, as fp16; the others are zero.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .words import WORDS

LIMIT = 16 * 2**20
TEXT_TABLE = "text_embedding.0.weight"
CODES, STEPS = ".codes", ".steps"
# From what 8 bits a row give anyway to where the model would suffer: the relative error is 0.29 times these.
FRACTIONS = (0.0, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.18, 0.20)


def _to_codes(matrix: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Codes int8 `[rows, columns]` and steps fp16 `[rows]`; a step is never so fine that the largest would not fit."""
    rows = matrix.flatten(1).float()
    steps = torch.maximum(rows.square().mean(1).sqrt() * fraction, rows.abs().amax(1) / 127)
    # Rounded up to what is stored, so that 127 steps are never too few.
    steps = (steps * 1.001).clamp_min(6e-8).half()
    return (rows / steps.float()[:, None]).round().clamp(-127, 127).to(torch.int8), steps


def _deflate(codes: Tensor) -> Tensor:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    stream = coder.compress(codes.contiguous().numpy().tobytes()) + coder.flush()
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _inflate(stream: Tensor, rows: int) -> Tensor:
    plain = bytearray(zlib.decompress(stream.numpy().tobytes(), -15))
    return torch.frombuffer(plain, dtype=torch.int8).view(rows, -1)


def pack(state: dict[str, Tensor], path: Path, metadata: dict[str, str], fraction: float) -> int:
    """Write a state dict at a step of `fraction` of each row's root mean square; returns the file's bytes.

    Raises ValueError for weights that are not finite and for a text layer with weights beyond the vocabulary.
    """
    tensors, shapes = {}, {}
    for key, value in state.items():
        value = value.detach().cpu().float()
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key}: not finite")
        shapes[key] = list(value.shape)
        if key == TEXT_TABLE:
            if bool(value[:, WORDS:].any()):
                raise ValueError(f"{key}: weights beyond the vocabulary of {WORDS} words")
            tensors[key] = value[:, :WORDS].half().contiguous()
        elif value.ndim < 2 or "modulation" in key:
            tensors[key] = value.half()
        else:
            codes, tensors[key + STEPS] = _to_codes(value, fraction)
            tensors[key + CODES] = _deflate(codes)
    metadata = metadata | {"shapes": json.dumps(shapes), "fraction": str(fraction), "licence": "Apache-2.0"}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # renamed when it is whole: a run may be stopped at any moment
    save_file(tensors, new, metadata=metadata)
    new.replace(path)
    return path.stat().st_size


def pack_within(state: dict[str, Tensor], path: Path, metadata: dict[str, str], limit: int = LIMIT) -> float:
    """Write a state dict with the finest of FRACTIONS that fits `limit` bytes, and return that. ValueError if none."""
    for fraction in FRACTIONS:
        if pack(state, path, metadata, fraction) <= limit:
            return fraction
    path.unlink()
    raise ValueError(f"no step of at most {FRACTIONS[-1]} makes the file {limit} bytes or smaller")


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in fp32, and the file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    state = {}
    for key, shape in json.loads(metadata["shapes"]).items():
        if key == TEXT_TABLE:
            state[key] = torch.zeros(shape)
            state[key][:, :WORDS] = stored[key].float()
        elif key in stored:
            state[key] = stored[key].float()
        else:
            codes = _inflate(stored[key + CODES], shape[0])
            state[key] = (codes.float() * stored[key + STEPS].float()[:, None]).view(shape)
    return state, metadata


def relative_errors(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Of each matrix: root mean square of the difference over that of the weights."""
    return {
        key: float((other[key] - value.cpu().float()).norm() / value.cpu().float().norm().clamp_min(1e-30))
        for key, value in state.items()
        if value.ndim >= 2
    }
