"""Bit widths of the two products of attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bit widths of the two products.

    qk: `16` (the input's dtype), `int8`, `int4`; pv: `16`, `fp8`, `int8`, `int4`.
    hadamard: rotate Q and K by an orthonormal Hadamard matrix before quantising (spreads channel outliers).
    """

    qk: str = "int8"
    pv: str = "16"
    hadamard: bool = False


# What a user may choose. `auto` is resolved by the runtime before a kernel is asked.
PRECISIONS = {
    "16bit": Precision("16", "16"),
    "int8": Precision("int8", "16"),
    "int8_pv8": Precision("int8", "int8"),
    "fp8": Precision("int8", "fp8"),
    "int4": Precision("int4", "int8", hadamard=True),
    "int4_pv4": Precision("int4", "int4", hadamard=True),
}
