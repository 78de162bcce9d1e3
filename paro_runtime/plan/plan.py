"""Plans: for one model and grid, the order, mask and tail of every head. Frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ...kernels.core.block_mask import pack_bits, unpack_bits
from ...kernels.core.layout import BLOCK_K, TokenLayout, geometry_of
from .options import query_block
from .orders import ALL_ORDERS, nearest_order


class PlanError(ValueError):
    """A plan that cannot be used; the message is one line that names what was expected and what was found."""


@dataclass(frozen=True, order=True)
class Site:
    """One self-attention call of a model: block type, block index, n-th self-attention within that block."""

    block_type: str
    block_index: int
    call: int = 0

    @property
    def name(self) -> str:
        return f"{self.block_type}.{self.block_index}.{self.call}"

    @classmethod
    def parse(cls, name: str) -> Site:
        block_type, index, call = name.rsplit(".", 2)
        return cls(block_type, int(index), int(call))


@dataclass(frozen=True)
class ModelIdentity:
    """Which model: family name, signature of its parameter names and shapes, signature of sampled weights."""

    family: str
    architecture: str
    weights: str


# What a plan says it was made by when a run made it.
IN_PASSING = "calibrated on the way"
# What a site has for each group of sparse steps.
PER_GROUP = ("packed", "tail_bias", "density", "mass_kept")


@dataclass(frozen=True, eq=False)
class SitePlan:
    """Heads of one site. orders: name per head. packed uint8 [groups, bytes]: for each group of sparse steps the bits
    of its mask `[heads, q_blocks, k_blocks]`, which is `shape`; [groups, 0] where runs measure their masks themselves
    (`routing`), as many blocks of each head as density says.

    tail_bias float32 [groups, heads] or None; density and mass_kept float32 [groups, heads], as calibrated. rotate:
    INT8 queries and keys are rotated by a Hadamard matrix first.
    """

    orders: tuple[str, ...]
    packed: torch.Tensor
    shape: tuple[int, int, int]
    tail_bias: torch.Tensor | None
    density: torch.Tensor
    mass_kept: torch.Tensor
    rotate: bool = False

    @classmethod
    def create(cls, orders, mask: torch.Tensor, tail_bias, mass_kept: torch.Tensor, rotate: bool = False) -> SitePlan:
        """One group of steps, from a bool mask `[heads, q_blocks, k_blocks]` on any device; tail_bias and mass_kept
        are [heads]."""
        heads, q_blocks, k_blocks = mask.shape
        numbers = (tail_bias, mask.float().mean((1, 2)), mass_kept)
        bias, density, kept = (None if x is None else x.float()[None].cpu() for x in numbers)
        shape = (heads, q_blocks, k_blocks)
        return cls(tuple(orders), pack_bits(mask)[None].cpu(), shape, bias, density, kept, rotate)

    @classmethod
    def joined(cls, groups: Sequence[SitePlan]) -> SitePlan:
        """One site of several groups of steps, from one of each: they differ in masks and what follows from them."""
        first, *others = groups
        if not others:
            return first
        columns = {name: [getattr(group, name) for group in groups] for name in PER_GROUP}
        whole = {name: None if parts[0] is None else torch.cat(parts) for name, parts in columns.items()}
        return SitePlan(first.orders, shape=first.shape, rotate=first.rotate, **whole)

    @property
    def groups(self) -> int:
        """Groups of sparse steps, each with a mask of its own."""
        return self.packed.shape[0]

    @property
    def has_masks(self) -> bool:
        """Whether there are masks, or runs measure them."""
        return self.packed.shape[1] > 0

    def without_masks(self) -> SitePlan:
        """The same for runs that measure their masks themselves."""
        return replace(self, packed=self.packed.new_empty(self.groups, 0))

    def of_heads(self, heads: slice) -> SitePlan:
        """The same for these of its query heads alone."""
        orders, packed = self.orders[heads], self.packed
        if self.has_masks:
            packed = torch.stack([pack_bits(self.mask(group=group)[heads]) for group in range(self.groups)])
        columns = {name: getattr(self, name) for name in PER_GROUP if name != "packed"}
        # Copies: a slice would hold every head's numbers as long as it lives.
        own = {name: None if its is None else its[:, heads].clone() for name, its in columns.items()}
        return replace(self, orders=orders, packed=packed, shape=(len(orders), *self.shape[1:]), **own)

    def mask(self, device: torch.device | str = "cpu", group: int = 0) -> torch.Tensor:
        """bool `[heads, q_blocks, k_blocks]` on `device`, of a site that has masks."""
        return unpack_bits(self.packed[group].to(device), self.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """All sites of one model on one grid.

    settings  what shapes the masks (density asked for, order, budget, tail), as a flat dict.
    made      how it was made: steps, prompts, pack version, free text; never interpreted.
    expansions  of the tail's pools, as the biases were measured with (`kernels/pooling/reference.py`).
    """

    identity: ModelIdentity
    layout: TokenLayout
    block_q: int
    sites: dict[Site, SitePlan]
    pool: int = BLOCK_K
    settings: dict = field(default_factory=dict)
    made: dict = field(default_factory=dict)
    expansions: int = 0

    @property
    def density(self) -> float:
        """Kept blocks / all blocks, mean over groups, heads and sites."""
        return sum(self.densities) / len(self.densities)

    @property
    def mass_kept(self) -> float:
        """Attention kept, mean over groups, heads and sites."""
        kept = self._by_group("mass_kept")
        return sum(kept) / len(kept)

    @property
    def groups(self) -> int:
        """Groups of sparse steps: the same for every site."""
        return next(iter(self.sites.values())).groups if self.sites else 1

    @property
    def densities(self) -> list[float]:
        """Density of each group of sparse steps, mean over heads and sites."""
        return self._by_group("density")

    def _by_group(self, name: str) -> list[float]:
        values = [getattr(site, name) for site in self.sites.values()]
        return torch.cat(values, 1).mean(1).tolist() if values else [1.0]

    def without_masks(self) -> Plan:
        """What a report tells of the plan: no masks, which are nearly all of its memory."""
        return replace(self, sites={site: entry.without_masks() for site, entry in self.sites.items()})

    def moved(self, layout: TokenLayout) -> Plan:
        """For another layout of the same model. On another grid orders (`nearest_order`), densities and biases stay,
        and runs measure their masks themselves; mass_kept is still that of the grid the plan was made on."""
        if self.layout.grid == layout.grid:
            return replace(self, layout=layout)
        g = geometry_of(layout, query_block(layout.grid_tokens))
        sites = {}
        for site, entry in self.without_masks().sites.items():
            orders = tuple(nearest_order(name, layout.grid) for name in entry.orders)
            sites[site] = replace(entry, orders=orders, shape=(len(orders), g.q_blocks, g.k_blocks))
        made = {**self.made, "moved_from": _grid(self.layout)}
        return replace(self, layout=layout, block_q=g.block_q, sites=sites, made=made)

    def of_rank(self, rank: int, ranks: int) -> Plan:
        """What one of several processes needs that share the heads of every site (`heads_of_rank`). Raises
        PlanError where a site's heads do not divide."""
        sites = {}
        for site, entry in self.sites.items():
            heads = len(entry.orders)
            if heads % ranks:
                raise PlanError(f"plan: the {heads} heads of {site.name} do not divide over {ranks} ranks")
            sites[site] = entry.of_heads(heads_of_rank(heads, rank, ranks))
        return replace(self, sites=sites)

    def orders_histogram(self) -> dict[str, int]:
        """Heads per order, in the order of `ALL_ORDERS`."""
        names = [name for site in self.sites.values() for name in site.orders]
        return {name: names.count(name) for name in ALL_ORDERS if name in names}

    def foreign(self, identity: ModelIdentity) -> str | None:
        """Why this plan cannot serve that model on any grid, in one line, or None. Other weights are no reason."""
        if self.identity.family != identity.family:
            return f"plan: made for {self.identity.family}, the model is {identity.family}"
        if self.identity.architecture != identity.architecture:
            return f"plan: made for another {identity.family} model, with layers of other sizes"
        return None

    def unsuitable(self, identity: ModelIdentity, layout: TokenLayout) -> str | None:
        """Why this plan cannot serve that model and grid as it is, in one line, or None."""
        reason = self.foreign(identity)
        if reason is None and self.layout.grid != layout.grid:
            return f"plan: made for the grid {_grid(self.layout)}, the model runs on {_grid(layout)}"
        return reason


def heads_of_rank(heads: int, rank: int, ranks: int) -> slice:
    """The heads of one of several ranks: equal runs in the model's own order, which every library that splits heads
    uses. Query heads stay with the key heads that they share wherever the key heads divide."""
    each = heads // ranks
    return slice(rank * each, (rank + 1) * each)


def _grid(layout: TokenLayout) -> str:
    return "x".join(map(str, layout.grid))
