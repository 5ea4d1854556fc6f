# mypy: allow-untyped-defs
"""The rounding rule of e4m3, as `int8.py` has that of int8: the same scales, with 448 in the place of 127.

    x_q = round_to_nearest(x * inverse)    to a float8_e4m3fn; 0 if scale is NaN

|x * inverse| <= 448 but for the last bit of a float32, which rounds to 448: no value overflows to NaN.
"""

import torch

from swcompile.kernels.formats import E4M3
from swcompile.kernels.launch import tl, triton

MAX_VALUE = tl.constexpr(E4M3.max_value)


def round_reference(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn of `x` by an `inverse` that broadcasts against it; where `inverse` is 0, NaN and Inf give 0."""
    return (x.float() * inverse).nan_to_num_(nan=0.0).to(E4M3.dtype)


@triton.jit
def round_to_e4m3(x, inverse):
    """float8_e4m3fn of `x`, with `inverse` broadcast against it by the caller. Launch with `enable_fp_fusion=False`."""
    return tl.where(inverse != 0.0, x.to(tl.float32) * inverse, 0.0).to(tl.float8e4nv)
