"""Write a contact sheet of videos as PNG with the standard library alone."""

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor


def save_sheet(path: Path, videos: Tensor, gap: int = 2) -> None:
    """Write `videos` `[B, T, H, W]` (grey) or `[B, T, 3, H, W]` in [-1, 1]: a row per clip, a column per frame."""
    clips, frames, *_, height, width = videos.shape
    pixels = ((videos.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    if pixels.ndim == 5:
        pixels = pixels.movedim(2, -1)
    sheet = pixels.new_full((clips * (height + gap), frames * (width + gap), *pixels.shape[4:]), 128)
    for row in range(clips):
        for col in range(frames):
            top, left = row * (height + gap), col * (width + gap)
            sheet[top : top + height, left : left + width] = pixels[row, col]
    write_png(path, sheet)


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image `[H, W]` (grey) or `[H, W, 3]` as an 8-bit PNG (ISO/IEC 15948, filter 0)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = image.shape[:2]
    colour_type = 2 if image.ndim == 3 else 0
    raw = b"".join(b"\0" + image[y].numpy().tobytes() for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
