"""e4m3 matmul with a scaled epilogue, for sums over tokens.

Shapes: M rows of A, N rows of B (channels of one and the other side of a layer), K the summed dimension (tokens).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from swcompile.kernels import scaled_mm_kernels
from swcompile.kernels.formats import E4M3
from swcompile.kernels.launch import Plans, empty, nothing
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.scaled_mm import OUTPUT_DTYPES, scaled_mm_work
from swcompile.kernels.scaled_mm_kernels import MARGIN, MatmulConfig, candidates, fits_tma, launcher
from swcompile.kernels.tuning import Tuner, bucket


def scaled_mm_e4m3(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b_N1: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(a_q @ b_q.T) * scale_a * scale_b.T``: the weight's gradient from two operands in 8 bit.

    The products are added in float32, 128 or 512 of them at a time in what the tensor cores have for that (14 bits on
    Hopper), so kernels differ from the reference, and from one another, by up to some 1e-3 of the largest sum.

    Args:
        a_q_MK: [M, K] float8_e4m3fn, contiguous.
        b_q_NK: [N, K] float8_e4m3fn, contiguous.
        scale_a_M1: [M, 1] float32.
        scale_b_N1: [N, 1] float32.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`, contiguous.

    Raises:
        ValueError: a dtype other than these, or shapes that do not fit.
        RuntimeError: on a GPU older than compute capability 8.9.
    """
    return SCALED_MM_E4M3(a_q_MK, b_q_NK, scale_a_M1, scale_b_N1, out_dtype)


def scaled_mm_e4m3_reference(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b_N1: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm_e4m3` in plain PyTorch, with sums in float32."""
    _check_dtypes(a_q_MK, b_q_NK, scale_a_M1, scale_b_N1, out_dtype)
    _check_shapes(a_q_MK, b_q_NK, scale_a_M1, scale_b_N1)
    return (a_q_MK.float() @ b_q_NK.float().t()).mul_(scale_a_M1).mul_(scale_b_N1.t()).to(out_dtype)


def scaled_mm_e4m3_work(num_rows: int, num_columns: int, num_summed: int, out_itemsize: int) -> Work:
    """As for `scaled_mm_work`, with a scale for each row of B."""
    return scaled_mm_work(num_rows, num_columns, num_summed, out_itemsize, num_scales_b=num_columns)


def scaled_mm_e4m3_triton(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b_N1: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm_e4m3` by a Triton kernel: what the op does on CUDA."""
    operands = a_q_MK, b_q_NK, scale_a_M1, scale_b_N1
    launch = PLANS.find(operands, out_dtype)
    if launch is None:
        matrices = a_q_MK.contiguous(), b_q_NK.contiguous()
        return scaled_mm_e4m3_triton(*matrices, scale_a_M1.contiguous(), scale_b_N1.contiguous(), out_dtype)
    out_MN = empty((a_q_MK.shape[0], b_q_NK.shape[0]), out_dtype, a_q_MK.device)
    launch(*operands, None, out_MN)
    return out_MN


def _prepare(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b_N1: torch.Tensor,
    out_dtype: torch.dtype,
) -> Callable[..., None] | None:
    """Launches the kernel on the four operands, None and the result; None where an operand must be laid out anew."""
    operands = a_q_MK, b_q_NK, scale_a_M1, scale_b_N1
    _check_dtypes(*operands, out_dtype)
    _check_shapes(*operands)
    if not all(t.is_contiguous() for t in operands):
        return None
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    out_MN = empty((num_rows, num_columns), out_dtype, a_q_MK.device)
    if out_MN.numel() == 0:
        return nothing

    def run(config: MatmulConfig) -> None:
        launcher(config, *operands, None, out_MN)(*operands, None, out_MN)

    tma_fits = fits_tma(a_q_MK, b_q_NK, out_MN)
    # Tokens are what varies from call to call here.
    key = (bucket(num_summed), num_rows, num_columns, out_dtype, tma_fits)
    device = a_q_MK.device
    config = TUNER.choose(key, lambda: candidates(device, tma_fits, E4M3.dtype, num_rows, num_columns), run, device)
    return launcher(config, *operands, None, out_MN)


PLANS = Plans(_prepare)
TUNER: Tuner[MatmulConfig] = Tuner(
    "scaled_mm_e4m3",
    [scaled_mm_kernels.__file__]
    + [str(Path(__file__).with_name(name)) for name in ("scaled_mm_wgmma.py", "scaled_mm_e4m3_wgmma.py")],
    MARGIN,
)


def _check_dtypes(
    a_q: torch.Tensor, b_q: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> None:
    """Raise `ValueError` on a wrong dtype or rank. Looks at no size: sizes may be symbolic."""
    if a_q.dtype != E4M3.dtype or b_q.dtype != E4M3.dtype:
        raise ValueError(f"scaled_mm_e4m3: a_q and b_q must be {E4M3.dtype}, got {a_q.dtype} and {b_q.dtype}")
    if scale_a.dtype != torch.float32 or scale_b.dtype != torch.float32:
        raise ValueError(f"scaled_mm_e4m3: scales must be float32, got {scale_a.dtype} and {scale_b.dtype}")
    if {a_q.dim(), b_q.dim(), scale_a.dim(), scale_b.dim()} != {2}:
        raise ValueError("scaled_mm_e4m3: a_q, b_q and both scales must have 2 dimensions")
    if out_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"scaled_mm_e4m3: out_dtype is {out_dtype}, but must be bfloat16, float16 or float32")


def _check_shapes(a_q: torch.Tensor, b_q: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> None:
    (num_rows, num_summed), num_columns = a_q.shape, b_q.shape[0]
    if b_q.shape[1] != num_summed:
        raise ValueError(f"scaled_mm_e4m3: a_q sums over K={num_summed}, but b_q over {b_q.shape[1]}; b_q is [N, K]")
    for name, scale, size in (("scale_a", scale_a, num_rows), ("scale_b", scale_b, num_columns)):
        if scale.shape != (size, 1):
            raise ValueError(f"scaled_mm_e4m3: {name} is {tuple(scale.shape)}, but must be {(size, 1)}")


def _fake(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b_N1: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check_dtypes(a_q_MK, b_q_NK, scale_a_M1, scale_b_N1, out_dtype)
    return a_q_MK.new_empty((a_q_MK.shape[0], b_q_NK.shape[0]), dtype=out_dtype)


SCALED_MM_E4M3 = define_op(
    "scaled_mm_e4m3(Tensor a_q, Tensor b_q, Tensor scale_a, Tensor scale_b, ScalarType out_dtype) -> Tensor",
    reference=scaled_mm_e4m3_reference,
    cuda=scaled_mm_e4m3_triton,
    fake=_fake,
    number_format=E4M3,
)
