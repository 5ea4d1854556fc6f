"""Number formats as data: every fact but the bit layout is computed from the bit layout."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberFormat:
    """An 8-bit format that a scaled tensor ``x ~= x_q * scale`` may hold."""

    name: str
    """Short name, as recipes and reports spell it."""
    dtype: torch.dtype
    """The dtype that stores one element."""
    exponent_bits: int
    """Exponent bits; 0 means a two's complement integer."""
    mantissa_bits: int
    """Explicit mantissa bits; of an integer, all bits but the sign."""
    has_infinity: bool
    """True if the top exponent is kept for Inf and NaN (IEEE); False if at most its top code is NaN."""

    def __post_init__(self) -> None:
        bits = 1 + self.exponent_bits + self.mantissa_bits
        if bits != 8 * self.dtype.itemsize:
            raise ValueError(
                f"{self.name}: {bits} bits given, but {self.dtype} holds {8 * self.dtype.itemsize}"
            )

    @property
    def is_integer(self) -> bool:
        """True for a two's complement integer."""
        return self.exponent_bits == 0

    @property
    def exponent_bias(self) -> int:
        """What is subtracted from the stored exponent; 0 for an integer."""
        return 0 if self.is_integer else 2 ** (self.exponent_bits - 1) - 1

    @property
    def max_value(self) -> float:
        """Largest magnitude in use, to which absmax is mapped: an integer's range is symmetric, without -2^n."""
        if self.is_integer:
            return float(2**self.mantissa_bits - 1)
        if self.has_infinity:  # the top exponent is taken; below it every mantissa is a number
            top_exponent, top_mantissa = 2**self.exponent_bits - 2, 2**self.mantissa_bits - 1
        else:  # only the very last code is taken, by NaN
            top_exponent, top_mantissa = 2**self.exponent_bits - 1, 2**self.mantissa_bits - 2
        return (1 + top_mantissa * 2.0**-self.mantissa_bits) * 2.0 ** (top_exponent - self.exponent_bias)

    @property
    def min_positive(self) -> float:
        """Smallest positive value: 1 for an integer, the smallest subnormal for a float."""
        return 1.0 if self.is_integer else 2.0 ** (1 - self.exponent_bias - self.mantissa_bits)


INT8 = NumberFormat(name="int8", dtype=torch.int8, exponent_bits=0, mantissa_bits=7, has_infinity=False)
E4M3 = NumberFormat(name="e4m3", dtype=torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=3, has_infinity=False)
E5M2 = NumberFormat(name="e5m2", dtype=torch.float8_e5m2, exponent_bits=5, mantissa_bits=2, has_infinity=True)

FORMATS = {number_format.name: number_format for number_format in (INT8, E4M3, E5M2)}
"""All formats by name."""
