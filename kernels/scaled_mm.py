"""int8 matmul with a scaled epilogue.

Shapes: M rows of A (tokens), N rows of B (out features), K the summed dimension.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from swcompile.kernels import scaled_mm_kernels
from swcompile.kernels.launch import Plans, empty, nothing
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.scaled_mm_kernels import MARGIN, MatmulConfig, candidates, fits_tma, launcher
from swcompile.kernels.tuning import Tuner, bucket

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_K = (2**31 - 1) // 127**2
"""The longest sum of products of two int8 in [-127, 127] that an int32 always holds: 133,144."""


def scaled_mm(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(a_q @ b_q.T) * scale_a * scale_b.T + bias``, exact in int32 up to the first scale.

    Then ``(acc * scale_a) * scale_b + bias`` in float32, each operation rounded, in this order, and one cast. Every
    kernel configuration gives the same bits. SwitchBack's matmul of the output and of the gradient of the input
    (arXiv 2304.13013, section 2.2); only ``A @ B.T`` with both operands contiguous along K is fast in int8.

    Args:
        a_q_MK: [M, K] int8, contiguous, without -128.
        b_q_NK: [N, K] int8, contiguous, without -128.
        scale_a_M1: [M, 1] float32.
        scale_b: [1, 1] or [N, 1] float32.
        bias_N: [N] bfloat16, float16 or float32, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`, contiguous.

    Raises:
        ValueError: a dtype other than these, shapes that do not fit, or K above 133,144, where an int32 may overflow.
    """
    return SCALED_MM(a_q_MK, b_q_NK, scale_a_M1, scale_b, bias_N, out_dtype)


def scaled_mm_reference(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm` in plain PyTorch, bit for bit."""
    check_dtypes("scaled_mm", a_q_MK, b_q_NK, (scale_a_M1, scale_b), out_dtype, bias_N)
    _check_shapes(a_q_MK, b_q_NK, scale_a_M1, scale_b, bias_N)
    out_MN = accumulate(a_q_MK, b_q_NK).mul_(scale_a_M1).mul_(scale_b.t())
    if bias_N is not None:
        out_MN.add_(bias_N.float())
    return out_MN.to(out_dtype)


def scaled_mm_work(
    num_rows: int, num_columns: int, num_summed: int, out_itemsize: int, *, num_scales: int | None = None
) -> Work:
    """M * N * K multiply-adds; both operands and the scales read once, the result written once (M, N, K order).

    Where the number of scales is not given it is one for each row of A, and one for B.
    """
    operands = (num_rows + num_columns) * num_summed
    scales = num_rows + 1 if num_scales is None else num_scales
    return Work(
        flops=2 * num_rows * num_columns * num_summed,
        bytes=operands + num_rows * num_columns * out_itemsize + 4 * scales,
    )


def scaled_mm_triton(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm` by a Triton kernel: what the op does on CUDA."""
    operands = a_q_MK, b_q_NK, scale_a_M1, scale_b, bias_N
    launch = PLANS.find(operands, out_dtype)
    if launch is None:
        matrices = a_q_MK.contiguous(), b_q_NK.contiguous()
        bias_N = None if bias_N is None else bias_N.contiguous()
        return scaled_mm_triton(*matrices, scale_a_M1.contiguous(), scale_b.contiguous(), bias_N, out_dtype)
    out_MN = empty((a_q_MK.shape[0], b_q_NK.shape[0]), out_dtype, a_q_MK.device)
    launch(*operands, out_MN)
    return out_MN


def _prepare(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> Callable[..., None] | None:
    """Launches the kernel on the five operands and the result; None where one must be laid out anew."""
    operands = a_q_MK, b_q_NK, scale_a_M1, scale_b, bias_N
    check_dtypes("scaled_mm", a_q_MK, b_q_NK, (scale_a_M1, scale_b), out_dtype, bias_N)
    _check_shapes(*operands)
    if not all(t is None or t.is_contiguous() for t in operands):
        return None
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    out_MN = empty((num_rows, num_columns), out_dtype, a_q_MK.device)
    if out_MN.numel() == 0:
        return nothing

    def run(config: MatmulConfig) -> None:
        launcher(config, *operands, out_MN)(*operands, out_MN)

    tma_fits = fits_tma(a_q_MK, b_q_NK, out_MN)
    flags = (bias_N is not None, scale_b.numel() > 1, tma_fits)
    key = (bucket(num_rows), num_columns, num_summed, out_dtype, *flags)
    device = a_q_MK.device
    size = bucket(num_rows) // 2, num_columns, num_summed
    config = TUNER.choose(key, lambda: candidates(device, tma_fits, *size, out_dtype), run, device)
    return launcher(config, *operands, out_MN)


PLANS = Plans(_prepare)
TUNER: Tuner[MatmulConfig] = Tuner(
    "scaled_mm", [scaled_mm_kernels.__file__, str(Path(__file__).with_name("scaled_mm_wgmma.py"))], MARGIN
)


def accumulate(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` of int8, exact, then as float32: rounded once, where a sum exceeds 2^24."""
    (num_rows, num_summed), num_columns = a_MK.shape, b_NK.shape[0]
    if a_MK.device.type == "cpu":
        if num_summed == 0:
            return a_MK.new_zeros((num_rows, num_columns), dtype=torch.float32)
        # The vector instructions' library takes neither empty operands nor strides that say little of the layout.
        if _cpu_multiplies_int8() and min(num_rows, num_columns, num_summed) > 1:
            return torch._int_mm(a_MK.contiguous(), b_NK.contiguous().t()).float()
        parts = zip(a_MK.split(_EXACT_IN_FLOAT32, 1), b_NK.split(_EXACT_IN_FLOAT32, 1), strict=True)
        products = (a.float() @ b.float().t() for a, b in parts)
        accumulator = next(products)
        if num_summed > _EXACT_IN_FLOAT32:
            accumulator = accumulator.to(torch.int32)
            for product in products:
                accumulator += product.to(torch.int32)
        return accumulator.float()
    # cuBLAS wants more than 16 rows, sizes that are multiples of 8 and no transposes; zeros add nothing to a sum.
    pad_M = max(17 - num_rows, 0)
    pad_N, pad_K = (max(-size % 8, 8 - size) for size in (num_columns, num_summed))
    a_padded, b_padded = F.pad(a_MK, (0, pad_K, 0, pad_M)), F.pad(b_NK, (0, pad_K, 0, pad_N))
    product = torch._int_mm(a_padded.contiguous(), b_padded.contiguous().t())
    return product[:num_rows, :num_columns].float()


_EXACT_IN_FLOAT32 = 2**24 // 127**2
"""Any partial sum of so many products is an integer that float32 holds, in whatever order a matmul adds."""


@cache
def _cpu_multiplies_int8() -> bool:
    """True if `torch._int_mm` is fast here. Without VNNI it is a plain loop, 30 times slower than float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def check_dtypes(
    op: str,
    a_q: torch.Tensor,
    b_q: torch.Tensor,
    scales: Sequence[torch.Tensor],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> None:
    """Raise `ValueError` on a wrong dtype or rank. Looks at no size: sizes may be symbolic."""
    if a_q.dtype != torch.int8 or b_q.dtype != torch.int8:
        raise ValueError(f"{op}: a_q and b_q must be int8, got {a_q.dtype} and {b_q.dtype}")
    if any(scale.dtype != torch.float32 for scale in scales):
        raise ValueError(f"{op}: scales must be float32, got {' and '.join(str(scale.dtype) for scale in scales)}")
    if any(operand.dim() != 2 for operand in (a_q, b_q, *scales)):
        raise ValueError(f"{op}: a_q, b_q and scales must have 2 dimensions")
    if bias is not None and bias.dim() != 1:
        raise ValueError(f"{op}: bias has {bias.dim()} dimensions, but must have 1")
    if bias is not None and not bias.dtype.is_floating_point:
        raise ValueError(f"{op}: bias must be floating point, got {bias.dtype}")
    if out_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"{op}: out_dtype is {out_dtype}, but must be bfloat16, float16 or float32")


def check_summed(op: str, a_q: torch.Tensor, b_q: torch.Tensor) -> None:
    """Raise `ValueError` unless both operands sum over as many products."""
    if a_q.shape[1] != b_q.shape[1]:
        raise ValueError(f"{op}: a_q sums over K={a_q.shape[1]}, but b_q over {b_q.shape[1]}; b_q is [N, K]")


def _check_shapes(
    a_q: torch.Tensor,
    b_q: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_summed("scaled_mm", a_q, b_q)
    (num_rows, num_summed), num_columns = a_q.shape, b_q.shape[0]
    if num_summed > MAX_K:
        raise ValueError(f"scaled_mm: K={num_summed} may overflow int32; split the sum at {MAX_K} or below")
    if scale_a.shape != (num_rows, 1):
        raise ValueError(f"scaled_mm: scale_a is {tuple(scale_a.shape)}, but must be {(num_rows, 1)}")
    if scale_b.shape not in ((1, 1), (num_columns, 1)):
        raise ValueError(
            f"scaled_mm: scale_b is {tuple(scale_b.shape)}, but must be (1, 1) or {(num_columns, 1)}"
        )
    if bias is not None and bias.shape[0] != num_columns:
        raise ValueError(f"scaled_mm: bias has {bias.shape[0]} elements for {num_columns} columns")


def _fake(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_dtypes("scaled_mm", a_q_MK, b_q_NK, (scale_a_M1, scale_b), out_dtype, bias_N)
    return a_q_MK.new_empty((a_q_MK.shape[0], b_q_NK.shape[0]), dtype=out_dtype)


SCALED_MM = define_op(
    "scaled_mm(Tensor a_q, Tensor b_q, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor",
    reference=scaled_mm_reference,
    cuda=scaled_mm_triton,
    fake=_fake,
)
