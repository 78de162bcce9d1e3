"""Times of one attention call that are to be expected of cards nobody measured, from the recorded machine code.

For `bench/report.py`. Per softmax element a loop takes so many issue slots, of which a multiprocessor has 128 a cycle,
and its two products so many operations of the tensor cores. The longer of these two times, over all multiprocessors at
the boost clock, is the least that a call can take; their sum is what it takes if nothing overlaps. How much longer it
takes than either is known of measured cards only.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

# Warp instructions that a multiprocessor issues a cycle, times the threads of a warp.
SLOTS_PER_CYCLE = 4 * 32
TOKENS, HEADS, DIM, DENSITIES = 75600, 40, 128, (1.0, 0.3)
# Of the second product, and of the first.
PRODUCTS = {"16bit": ("16", "16"), "int8": ("16", "int8"), "int8_pv8": ("int8", "int8"), "fp8": ("fp8", "int8")}
# What `auto` is on cards that are not of compute capability 9 or 10 (`kernels.core.dispatch.resolve_precision`).
AUTO = "int8_pv8"


@dataclass(frozen=True)
class Card:
    """boost: GHz. rates: operations (a product and a sum are two) per cycle and multiprocessor with 32-bit sums, dense,
    by the type of the factors: what NVIDIA's architecture papers and data sheets give as peak, divided by clock."""

    name: str
    capability: int
    multiprocessors: int
    boost: float
    rates: dict[str, int]


CARDS = (
    Card("RTX 3090", 86, 82, 1.695, {"16": 512, "int8": 2048}),
    Card("A100 SXM", 80, 108, 1.41, {"16": 2048, "int8": 4096}),
    Card("RTX 4090", 89, 128, 2.52, {"16": 512, "int8": 2048, "fp8": 1024}),
    Card("L40S", 89, 142, 2.52, {"16": 1024, "int8": 2048, "fp8": 2048}),
    Card("RTX 5090", 120, 170, 2.407, {"16": 512, "int8": 2048, "fp8": 1024}),
)
# Those that were measured, by the beginning of the name in their results.
HOPPER = Card("", 90, 132, 1.98, {"16": 4096, "int8": 8192, "fp8": 8192})
MEASURED = ("NVIDIA H100", "NVIDIA H200")


def tile_of(tiles: dict[str, dict], card: Card, precision: str, density: float) -> dict:
    """The recorded entry of such a call with query blocks of 128 rows."""
    start = f"sm_{card.capability} D{DIM} {precision}"
    if density == 1:
        return tiles[f"{start} dense"]
    if "gluon" in precision:
        return tiles[f"{start} list"]
    # One tile for query blocks of either size is recorded once.
    return tiles.get(f"{start} list of 128 rows") or tiles[f"{start} list of 64 rows"]


def times_of(tile: dict, card: Card, precision: str, density: float, heads: int = HEADS) -> tuple[float, float]:
    """Milliseconds of issue slots and of tensor cores that a call needs, without pre-pass and tail."""
    tensor = sum(2 * DIM / card.rates[kind] for kind in PRODUCTS[precision.split()[0]])
    elements = heads * TOKENS**2 * density
    issue_ms, tensor_ms = (
        elements * cycles / (card.multiprocessors * card.boost * 1e6)
        for cycles in (tile["slots"] / SLOTS_PER_CYCLE, tensor)
    )
    return issue_ms, tensor_ms


@dataclass(frozen=True)
class Ratio:
    """One measured call, in ms, beside what its issue slots and tensor cores need."""

    gpu: str
    precision: str
    density: float
    needs: tuple[float, float]
    measured: float

    @property
    def to_longest(self) -> float:
        return self.measured / max(self.needs)

    @property
    def to_sum(self) -> float:
        return self.measured / sum(self.needs)


def ratios(tiles: dict[str, dict], attention: list[dict], rounds: list[dict]) -> list[Ratio]:
    """Every measured call of this shape without a tail: kernels of `bench/attention.py`, whole calls of the rounds'
    unchanged kernels. tiles: recorded with the Triton that they ran with."""
    found = []

    def add(gpu: str, precision: str, density: float, heads: int, ms: float) -> None:
        tile = tile_of(tiles, HOPPER, precision, density)
        found.append(Ratio(gpu, precision, density, times_of(tile, HOPPER, precision, density, heads), ms))

    for report in attention:
        for row in report["rows"] if report["gpu"].startswith(MEASURED) else ():
            if row["shape"] == "wan720p" and row["heads"] == HEADS and "kernel_ms" in row and not row["tail"]:
                precision = row["name"].removeprefix("paro ") + " gluon" * ("gluon" in row["tile"])
                add(report["gpu"], precision, row["kept"], row["heads"], row["kernel_ms"])
    for report in rounds:
        for row in report["rows"]:
            if row["dim"] == DIM and not row["tail"] and row["variant"] in ("old", "triton"):
                precision = row["precision"] + " gluon" * (row["variant"] == "old")
                add(report["gpu"], precision, row["density"], report["heads"], row["ms"])
    return found


def expected_tables(record: dict, attention: list[dict], rounds: list[dict]) -> list[str]:
    """Markdown. record: `bench/results/kernel_code.json`."""
    version = "3.6.0"
    tiles = record[version]["tiles"]
    checked = ratios(tiles, attention, rounds)
    longest, both = [each.to_longest for each in checked], [each.to_sum for each in checked]
    low, high = min(both), max(both)
    lines = [
        "# Expected of other cards",
        "",
        f"Nothing here is measured. {TOKENS:,} tokens, {HEADS} heads, D = {DIM}, query blocks of 128 rows, without "
        "pre-pass and tail. A call needs two times at the card's boost clock: issue slots of the compiled loop "
        f"(`bench/results/kernel_code.json`, Triton {version}) over the {SLOTS_PER_CYCLE} that a multiprocessor has a "
        "cycle, and operations of both products over what its tensor cores do, with 32-bit sums. `Least` is the longer "
        f"of the two. {len(checked)} measured calls of H100 and H200 (below) took {min(longest):.2f} to "
        f"{max(longest):.2f} times as long, {median(longest):.2f} in the median, and {low:.2f} to {high:.2f} times the "
        "sum of both, which follows them more closely: softmax and products overlap in part only, and power lowers the "
        "clock. `Expected` is the sum of both times these. Other generations overlap in other ways, so a time may lie "
        "outside.",
        "",
        "| card | precision | issue slots, dense and list | programs a multiprocessor | binds | least ms, dense "
        "| expected | least ms, density 0.3 | expected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for precision, kinds in PRODUCTS.items():
            if set(kinds) <= set(card.rates):
                lines.append(_line(tiles, card, precision, low, high))
    lines += [
        "",
        f"`auto` takes {AUTO} on all of these cards.",
        "",
        "The measured calls, and what the same formula gives for them at 1.98 GHz:",
        "",
        "| card | kernel | density | issue slots, ms | tensor cores, ms | measured ms | to the longer | to the sum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.gpu} | {each.precision} | {each.density:.2g} | {each.needs[0]:.1f} | {each.needs[1]:.1f} "
        f"| {each.measured:.1f} | {each.to_longest:.2f} | {each.to_sum:.2f} |"
        for each in checked
    ]
    return [*lines, ""]


def _line(tiles: dict[str, dict], card: Card, precision: str, low: float, high: float) -> str:
    found = [tile_of(tiles, card, precision, density) for density in DENSITIES]
    cells = [card.name, precision, ", ".join(f"{tile['slots']:.1f}" for tile in found)]
    cells.append(", ".join(f"{tile['programs']}" for tile in found))
    needs = [times_of(tile, card, precision, density) for tile, density in zip(found, DENSITIES, strict=True)]
    cells.append(" and ".join(dict.fromkeys(("issue slots", "tensor cores")[ms[1] > ms[0]] for ms in needs)))
    for ms in needs:
        cells += [f"{max(ms):.0f}", f"{low * sum(ms):.0f} to {high * sum(ms):.0f}"]
    return "| " + " | ".join(cells) + " |"
