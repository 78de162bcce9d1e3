"""Attention with a planted axis order: queries, keys and values of twelve archetypal heads of a video transformer.

Every head attends by distance on the token grid along some axes, ignores others, follows the content of the sample,
and may have sink tokens or look at the text. Content changes from sample to sample, so a mask calibrated on two samples
is judged on a third. Text tokens stand in front of the grid; W is the fastest axis of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

HEAD_DIM = 128
TEXT = 64
POSITION, CONTENT = 96, 24  # channels; then one each for sinks, video to text, text queries
NOISE = 0.35 * 3 / math.sqrt(HEAD_DIM)
OUTLIERS = (18.0, -12.0, 10.0)  # added to three channels of every key: softmax does not see them, INT8 does
IGNORED = math.inf


@dataclass(frozen=True)
class Archetype:
    """One kind of head: locality lengths along F, H, W in tokens, sharpness, sink and text strength.

    orders: those that make its attention map block-diagonal; empty where none does.
    """

    name: str
    lengths: tuple[float, float, float]
    beta: float
    sink: float = 0.0
    text: float = 0.0
    orders: tuple[str, ...] = ()


ARCHETYPES = (
    Archetype("temporal", (IGNORED, 1.2, 1.2), 11, orders=("HWF", "WHF")),
    Archetype("temporal-wide", (IGNORED, 2.5, 2.5), 11, orders=("HWF", "WHF")),
    Archetype("spatial", (0.8, IGNORED, IGNORED), 9, orders=("FHW", "FWH")),
    Archetype("row", (IGNORED, 0.8, IGNORED), 9, orders=("HFW", "HWF")),
    Archetype("column", (IGNORED, IGNORED, 0.8), 9, orders=("WFH", "WHF")),
    Archetype("frame-row", (1.2, 1.5, IGNORED), 10, orders=("FHW", "HFW")),
    Archetype("frame-column", (1.2, IGNORED, 1.5), 10, orders=("FWH", "WFH")),
    Archetype("block", (2.5, 2.5, 2.5), 11),
    Archetype("stripes", (6, 1.0, 1.5), 11, orders=("HWF", "WHF")),
    Archetype("sink+spatial", (1.0, IGNORED, IGNORED), 9, sink=9, orders=("FHW", "FWH")),
    Archetype("text+temporal", (IGNORED, 1.5, 1.5), 10, text=6, orders=("HWF", "WHF")),
    Archetype("diffuse", (8, 8, 8), 3),
)


@dataclass(frozen=True)
class Level:
    """How hard: content strength, sharpness factor, and whether content is smooth or clustered."""

    name: str
    content: float
    sharpness: float
    clustered: bool


EASY = Level("easy", 2, 1.0, False)
HARD = Level("hard", 8, 0.6, True)
LEVELS = {level.name: level for level in (EASY, HARD)}


@dataclass(frozen=True)
class _Head:
    """What a head keeps over all samples: position features, content frequencies, rotation, sinks, key outliers."""

    kind: Archetype
    positions: torch.Tensor
    features: torch.Tensor
    content_frequencies: torch.Tensor
    rotation: torch.Tensor
    sinks: torch.Tensor
    outliers: torch.Tensor


def _positions(grid: tuple[int, int, int]) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3)


def _make_head(kind: Archetype, grid: tuple[int, int, int], seed: int) -> _Head:
    generator = torch.Generator().manual_seed(seed)
    positions = _positions(grid)
    sobol = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed).draw(POSITION // 2)
    lengths = torch.tensor([min(length, 1e9) for length in kind.lengths])
    frequencies = torch.special.ndtri(sobol * 0.998 + 0.001) / lengths
    angles = positions @ frequencies.T
    features = torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(POSITION // 2)
    content = torch.randn(CONTENT, 3, generator=generator) / torch.tensor([5.0, 4.0, 4.0])
    rotation = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=generator))[0]
    sinks = torch.randperm(len(positions), generator=generator)[:4]
    outliers = torch.zeros(HEAD_DIM)
    outliers[torch.randperm(HEAD_DIM, generator=generator)[:3]] = torch.tensor(OUTLIERS)
    return _Head(kind, positions, features, content, rotation, sinks, outliers)


def _content(head: _Head, grid: tuple[int, int, int], clustered: bool, generator: torch.Generator) -> torch.Tensor:
    """Unit rows `[N, 24]`: waves over the grid, or cells around random points that share ten vectors."""
    if not clustered:
        wobble = 1 + 0.3 * torch.randn(CONTENT, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(CONTENT, generator=generator)
        waves = (head.positions @ (head.content_frequencies * wobble).T + phase).cos()
        return torch.nn.functional.normalize(waves, dim=1)
    vectors = torch.nn.functional.normalize(torch.randn(10, CONTENT, generator=generator), dim=1)
    centres = torch.rand(40, 3, generator=generator) * torch.tensor(grid)
    labels = torch.randint(0, 10, (40,), generator=generator)
    squeeze = torch.tensor([1 / 3, 1.0, 1.0])
    return vectors[labels[torch.cdist(head.positions * squeeze, centres * squeeze).argmin(1)]]


def _sample(head: _Head, grid, level: Level, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind, tokens = head.kind, len(head.positions)
    content = _content(head, grid, level.clustered, generator)
    q, k = torch.zeros(TEXT + tokens, HEAD_DIM), torch.zeros(TEXT + tokens, HEAD_DIM)
    positional = head.features * math.sqrt(kind.beta * level.sharpness)
    meant = content * math.sqrt(level.content)
    for x in (q, k):
        x[TEXT:, :POSITION] = positional
        x[TEXT:, POSITION : POSITION + CONTENT] = meant
    sink, to_text, text_query = range(POSITION + CONTENT, POSITION + CONTENT + 3)
    q[TEXT:, sink] = 1
    k[TEXT + head.sinks, sink] += kind.sink
    q[TEXT:, to_text] = 1
    k[TEXT:, text_query] = 0.5 * torch.randn(tokens, generator=generator)
    k[:TEXT, to_text] = 1.6 * kind.text - 1.0 + 0.8 * torch.randn(TEXT, generator=generator)
    q[:TEXT, text_query] = 1
    k[:TEXT, text_query] = 2
    q += NOISE * torch.randn(q.shape, generator=generator)
    k += NOISE * torch.randn(k.shape, generator=generator)
    # The softmax scale is 1 / sqrt(D), so the inner product above comes out as designed.
    q = q @ head.rotation * HEAD_DIM**0.25
    k = k @ head.rotation * HEAD_DIM**0.25 + head.outliers
    v = 0.5 * torch.randn(TEXT + tokens, HEAD_DIM, generator=generator)
    v[TEXT:] += content @ torch.randn(CONTENT, HEAD_DIM, generator=generator)
    return q, k, v


@dataclass(frozen=True)
class Problem:
    """Twelve heads on one grid. Each of q, k, v is float32 `[samples, 12, 64 + F*H*W, 128]`.

    The last sample is held out: masks are calibrated on the others.
    """

    grid: tuple[int, int, int]
    level: Level
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_problem(grid: tuple[int, int, int], level: Level, seed: int = 0, samples=(1, 2, 9)) -> Problem:
    """Deterministic in its arguments. `seed` moves heads and samples together."""
    columns = []
    for number, kind in enumerate(ARCHETYPES):
        head = _make_head(kind, grid, 100 + number + 1000 * seed)
        drawn = [_sample(head, grid, level, 100_000 * (seed + 1) + 100 * sample + number) for sample in samples]
        columns.append([torch.stack(parts) for parts in zip(*drawn, strict=True)])
    q, k, v = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    return Problem(grid, level, q, k, v)
