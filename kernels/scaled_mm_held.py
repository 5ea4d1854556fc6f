"""`scaled_mm` by a weight that may be quantised already.

Shapes: M rows of A (tokens), N rows of B (out features), K the summed dimension.
"""

import torch

from swcompile.kernels.held_weights import quantized_weight
from swcompile.kernels.library import define_op
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import QUANTIZE_TENSORWISE, QUANTIZE_TENSORWISE_TRANSPOSE
from swcompile.kernels.scaled_mm import SCALED_MM

WEIGHT_QUANTIZERS = {
    op._schema.name.removeprefix("swcompile::"): op
    for op in (QUANTIZE_TENSORWISE, QUANTIZE_TENSORWISE_TRANSPOSE, QUANTIZE_ROWWISE, QUANTIZE_COLUMNWISE_TRANSPOSE)
}
"""Name -> op, of those that make B of a weight."""
_TRANSPOSED = ("quantize_tensorwise_transpose", "quantize_columnwise_transpose")


def scaled_mm_held(
    a_q_MK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    weight: torch.Tensor,
    quantizer: str,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``scaled_mm(a_q, b_q, scale_a, scale_b, bias, out_dtype)`` with ``b_q, scale_b = quantizer(weight)``, bit for bit.

    Within `swcompile.gradient_accumulation` the weight is quantised once. The work is that of `scaled_mm`, and of the
    quantiser where the weight is not held.

    Args:
        a_q_MK: [M, K] int8, contiguous, without -128.
        scale_a_M1: [M, 1] float32.
        weight: [N, K], or [K, N] for a quantiser that transposes; bfloat16, float16 or float32.
        quantizer: a name in `WEIGHT_QUANTIZERS`.
        bias_N: [N] bfloat16, float16 or float32, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`, contiguous.

    Raises:
        ValueError: an unknown quantiser, or what `scaled_mm` and the quantiser do not take.
    """
    return SCALED_MM_HELD(a_q_MK, scale_a_M1, weight, quantizer, bias_N, out_dtype)


def _run(
    a_q_MK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    weight: torch.Tensor,
    quantizer: str,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    b_q_NK, scale_b = quantized_weight(weight, _quantizer(quantizer))
    return SCALED_MM(a_q_MK, b_q_NK, scale_a_M1, scale_b, bias_N, out_dtype)


def _fake(
    a_q_MK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    weight: torch.Tensor,
    quantizer: str,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _quantizer(quantizer)
    num_columns = weight.shape[1 if quantizer in _TRANSPOSED else 0]
    return a_q_MK.new_empty((a_q_MK.shape[0], num_columns), dtype=out_dtype)


def _quantizer(name: str) -> torch._ops.OpOverload:
    if name not in WEIGHT_QUANTIZERS:
        raise ValueError(f"scaled_mm_held: {name!r} is none of {', '.join(WEIGHT_QUANTIZERS)}")
    return WEIGHT_QUANTIZERS[name]


SCALED_MM_HELD = define_op(
    "scaled_mm_held(Tensor a_q, Tensor scale_a, Tensor weight, str quantizer, Tensor? bias, ScalarType out_dtype) -> Tensor",
    reference=_run,
    cuda=_run,
    fake=_fake,
)
