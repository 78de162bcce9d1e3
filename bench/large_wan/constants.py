"""Small tables on the training device, copied there once: a copy in every step would wait for the one before it."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values`, numbers or tuples of them, as a tensor on `device`. Not to be changed."""
    return torch.tensor(values, dtype=dtype, device=device)
