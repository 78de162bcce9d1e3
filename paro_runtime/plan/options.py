"""What shapes a plan's masks: density, its fall over the steps, the size of query blocks."""

from __future__ import annotations

from dataclasses import dataclass

# Above this many grid tokens queries are masked in rows of 128: the kernels' tiles are that tall, and with hundreds of
# blocks a side the finer mask no longer pays.
WIDE_QUERY_TOKENS = 8192
# Where the density follows from a target, orders are compared at this one or at the most allowed, if that is less.
COMPARED_DENSITY = 0.2
# A run's sparse steps fall into so many groups, and the first keeps FALL times as many blocks as the last: what early
# steps get wrong every later one builds on.
GROUPS = 3
FALL = 2.0
# Where no step is dense there is more to be got right early.
STEEP_FALL = 4.0


@dataclass(frozen=True)
class MaskOptions:
    """What shapes a plan's masks: two plans with equal options for one model and grid are interchangeable.

    pool: tokens per pooled key of the tail, or None to drop what is not kept. mass_target: share of the attention to
    keep with as few blocks as that takes, `density` being the most; 0 takes `density` as it is. density_schedule: one
    mask for all sparse steps (constant), or one for each group of them (falling; steep for runs without dense steps),
    `density` being their mean.
    """

    density: float
    order: str
    budget: str
    pool: int | None
    mass_target: float = 0.0
    density_schedule: str = "constant"

    def densities(self, density: float) -> tuple[float, ...]:
        """Densities of the groups of sparse steps whose mean is `density`."""
        fall = {"falling": FALL, "steep": STEEP_FALL}.get(self.density_schedule)
        return (density,) if fall is None else falling_densities(density, fall)

    @property
    def compared_density(self) -> float:
        """Density at which orders are compared: with a target it is not known yet, and at most it says little."""
        return min(self.density, COMPARED_DENSITY) if self.mass_target else self.density

    def as_dict(self) -> dict:
        """Flat, for the plan's metadata."""
        return {
            "density": self.density,
            "order": self.order,
            "budget": self.budget,
            "pool": self.pool or 0,
            "mass_target": self.mass_target,
            "density_schedule": self.density_schedule,
        }


def falling_densities(density: float, fall: float = FALL) -> tuple[float, ...]:
    """Densities of the GROUPS groups of sparse steps: they fall by equal factors, and their mean is `density`.

    A group that would need more than every block keeps every block, and the others share what is left.
    """
    weights = [fall ** (-group / (GROUPS - 1)) for group in range(GROUPS)]
    for full in range(GROUPS):
        rest = weights[full:]
        unit = (density * GROUPS - full) / sum(rest)
        if unit * rest[0] <= 1:
            return (1.0,) * full + tuple(unit * weight for weight in rest)
    return (1.0,) * GROUPS


def query_block(grid_tokens: int) -> int:
    """Query rows per mask block for a grid of this size."""
    return 128 if grid_tokens > WIDE_QUERY_TOKENS else 64
