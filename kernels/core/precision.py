"""The number formats of the two products of attention, and all that follows from them outside of the kernels' own code.

Nothing else compares their names: a format that is added here needs Triton code that multiplies it, and tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Format:
    """How one operand of a product is rounded.

    bits: of a value. storage: dtype in which it is stored; None: in the input's own 16 bits, not rounded. largest: what
    the largest value that shares a scale becomes. largest_weight: likewise of attention weights, which have no sign.
    error_bound: largest relative L2 error that a healthy kernel may show on the self-check's data. multiplied_as: the
    format whose code multiplies such values; None: code of its own.
    """

    bits: int
    storage: torch.dtype | None
    largest: float
    largest_weight: float
    error_bound: float
    multiplied_as: str | None = None

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded, to values that share a scale."""
        return self.storage is not None

    @property
    def is_integer(self) -> bool:
        """Whether the rounded values are whole numbers."""
        return self.rounds and not self.storage.is_floating_point


# Measured on the self-check's data (`paro_runtime/compiling/self_check.py`): 16 bits 3e-3, INT8 9e-3 (PV in 8 bits
# 1.4e-2), FP8 3.3e-2, INT4 0.18 (PV in 4 bits 0.23).
# INT4 is nowhere faster than INT8 here: sm_80, 86 and 89 have 4-bit integer tensor cores and Blackwell has block-scaled
# FP4, but Triton reaches neither in a form that these kernels use; elsewhere 4-bit integer instructions are emulated.
# It is multiplied as INT8. What it saves is memory: keys are stored two a byte.
FORMATS = {
    "16": Format(16, None, 0.0, 1.0, error_bound=1e-2),
    "int8": Format(8, torch.int8, 127.0, 127.0, error_bound=4e-2),
    "fp8": Format(8, torch.float8_e4m3fn, 448.0, 448.0, error_bound=8e-2),
    "int4": Format(4, torch.int8, 7.0, 15.0, error_bound=0.35, multiplied_as="int8"),
}


@dataclass(frozen=True)
class Precision:
    """Formats of the two products, by their names in `FORMATS`.

    qk: of queries and keys, which are multiplied as integers or in 16 bits; pv: of attention weights and values.
    hadamard: rotate Q and K by an orthonormal Hadamard matrix before they are rounded (spreads channel outliers).
    """

    qk: str = "int8"
    pv: str = "16"
    hadamard: bool = False

    @property
    def keys(self) -> Format:
        """Of queries, keys and pooled keys."""
        return FORMATS[self.qk]

    @property
    def values(self) -> Format:
        """Of attention weights and values."""
        return FORMATS[self.pv]

    @property
    def rotates(self) -> bool:
        """Whether Q and K are rotated; where they are not rounded it would change nothing."""
        return self.hadamard and self.keys.rounds

    @property
    def rotated(self) -> Precision | None:
        """The same with rotation, where a plan may ask for it: of 8-bit keys that are not always rotated; else None."""
        return replace(self, hadamard=True) if self.keys.bits == 8 and not self.hadamard else None

    @property
    def multiplied_values(self) -> str:
        """`PV` of the Triton kernels: the format whose code multiplies the values."""
        return self.values.multiplied_as or self.pv

    @property
    def weights_log2(self) -> float:
        """`P_LOG2` of the attention kernels: 2 to this power is what the largest weight becomes."""
        return math.log2(self.values.largest_weight)

    @property
    def needs_fp8(self) -> bool:
        """Whether a GPU must multiply 8-bit floats."""
        return any(x.bits == 8 and x.rounds and not x.is_integer for x in (self.keys, self.values))

    @property
    def error_bound(self) -> float:
        """Largest relative L2 error of a healthy kernel on the self-check's data."""
        return max(self.keys.error_bound, self.values.error_bound)


# What a user may choose; `auto` is resolved by `dispatch.resolve_precision`.
PRECISIONS = {
    "16bit": Precision("16", "16"),
    "int8": Precision("int8", "16"),
    "int8_pv8": Precision("int8", "int8"),
    "fp8": Precision("int8", "fp8"),
    "int4": Precision("int4", "int8", hadamard=True),
    "int4_pv4": Precision("int4", "int4", hadamard=True),
}
