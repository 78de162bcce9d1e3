"""Whether a site's queries and keys are rotated before they are quantised, from errors measured while calibrating.

A Hadamard rotation spreads channels that are much larger than the others, so that they no longer set the scale of all;
where there are none it gains nothing and costs the pre-pass a product with a matrix. So each site is measured: the
error that INT8 makes in the logits, under the softmax, where a constant error changes nothing. It is the relative error
of the attention weights. The 4-bit precisions always rotate, the 16-bit ones never.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.statistics.logit_errors import PLAIN, ROTATED

# A site rotates if its error is above the floor and rotation divides it by the margin. Unit normal queries and keys
# have an error of 0.01.
FLOOR = 0.015
MARGIN = 1.3


def root_means(sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """Errors of sites, one per case, from each one's sums `[H, 3]` over `weight [H]` observations: the root of the mean
    over heads. Waits for the device once."""
    if not sums:
        return []
    found = [(errors / weight[:, None]).mean(0).to(sums[0][0].device) for errors, weight in sums]
    return torch.stack(found).sqrt().tolist()


def rotates(errors: Sequence[float]) -> bool:
    """Whether a site with these `root_means` should be rotated."""
    return errors[PLAIN] > FLOOR and errors[PLAIN] >= MARGIN * errors[ROTATED]
