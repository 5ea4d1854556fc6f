"""int8 matmul with scales for blocks of what is summed, for sums over tokens.

Shapes: M rows of A, N rows of B (channels of one and the other side of a layer), K the summed dimension (tokens), in B
blocks of `BLOCK_ROWS`, the last of which may be shorter.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from swcompile.kernels import scaled_mm_kernels
from swcompile.kernels.int8 import BLOCK_ROWS, num_blocks
from swcompile.kernels.launch import Plans, address, empty, nothing
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.scaled_mm import accumulate, check_dtypes, check_summed, scaled_mm_work
from swcompile.kernels.scaled_mm_kernels import MARGIN, MatmulConfig, candidates, fits_tma, launcher
from swcompile.kernels.tuning import Tuner, bucket


def scaled_mm_blockwise(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_BN: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``sum(a_q[:, b] @ b_q[:, b].T * scale[b])`` over blocks b of 1024 products.

    The weight's gradient in 8 bit: A is the gradient by `quantize_rowwise`, after `transpose`, and B the activation by
    `quantize_blockwise_transpose`, which has taken over the scales of A's tokens. The sum of a block is exact; it is scaled
    and added to those before it in float32, each operation rounded, and at the end there is one cast. Every kernel
    configuration gives the same bits.

    Args:
        a_q_MK: [M, K] int8, contiguous, without -128.
        b_q_NK: [N, K] int8, contiguous, without -128.
        scale_BN: [B, N] float32.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`, contiguous.

    Raises:
        ValueError: a dtype other than these, or shapes that do not fit.
    """
    return SCALED_MM_BLOCKWISE(a_q_MK, b_q_NK, scale_BN, out_dtype)


def scaled_mm_blockwise_reference(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_BN: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm_blockwise` in plain PyTorch, bit for bit."""
    check_dtypes("scaled_mm_blockwise", a_q_MK, b_q_NK, (scale_BN,), out_dtype)
    _check_shapes(a_q_MK, b_q_NK, scale_BN)
    out_MN = a_q_MK.new_zeros((a_q_MK.shape[0], b_q_NK.shape[0]), dtype=torch.float32)
    for block, scale_N in enumerate(scale_BN):
        summed = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        out_MN += accumulate(a_q_MK[:, summed], b_q_NK[:, summed]).mul_(scale_N)
    return out_MN.to(out_dtype)


def scaled_mm_blockwise_work(num_rows: int, num_columns: int, num_summed: int, out_itemsize: int) -> Work:
    """As for `scaled_mm_work`, with a scale for each row of B and block."""
    scales = num_blocks(num_summed) * num_columns
    return scaled_mm_work(num_rows, num_columns, num_summed, out_itemsize, num_scales=scales)


def scaled_mm_blockwise_triton(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_BN: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_mm_blockwise` by a Triton kernel: what the op does on CUDA."""
    launch = PLANS.find((a_q_MK, b_q_NK, scale_BN), out_dtype)
    if launch is None:
        return scaled_mm_blockwise_triton(a_q_MK.contiguous(), b_q_NK.contiguous(), scale_BN.contiguous(), out_dtype)
    out_MN = empty((a_q_MK.shape[0], b_q_NK.shape[0]), out_dtype, a_q_MK.device)
    launch(a_q_MK, b_q_NK, None, scale_BN, None, out_MN)
    return out_MN


def _prepare(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_BN: torch.Tensor,
    out_dtype: torch.dtype,
) -> Callable[..., None] | None:
    """Launches the kernel on (a, b, None, scale, None, out); None where an operand must be laid out anew."""
    check_dtypes("scaled_mm_blockwise", a_q_MK, b_q_NK, (scale_BN,), out_dtype)
    _check_shapes(a_q_MK, b_q_NK, scale_BN)
    if not all(t.is_contiguous() for t in (a_q_MK, b_q_NK, scale_BN)):
        return None
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    out_MN = empty((num_rows, num_columns), out_dtype, a_q_MK.device)
    if out_MN.numel() == 0:
        return nothing
    tensors = a_q_MK, b_q_NK, None, scale_BN, None, out_MN

    def run(config: MatmulConfig) -> None:
        launcher(config, *tensors, blockwise=True)(*tensors)

    tma_fits = fits_tma(a_q_MK, b_q_NK, out_MN) and _scales_fit_tma(scale_BN)
    # Tokens are what varies from call to call here.
    key = (bucket(num_summed), num_rows, num_columns, out_dtype, tma_fits)
    device = a_q_MK.device
    size = num_rows, num_columns, bucket(num_summed)
    config = TUNER.choose(key, lambda: candidates(device, tma_fits, *size, out_dtype, blockwise=True), run, device)
    return launcher(config, *tensors, blockwise=True)


def _scales_fit_tma(scale_BN: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes: from elsewhere the TMA copies no row, but fails."""
    return (address(scale_BN) | 4 * scale_BN.shape[1]) % 16 == 0


PLANS = Plans(_prepare)
TUNER: Tuner[MatmulConfig] = Tuner(
    "scaled_mm_blockwise",
    [scaled_mm_kernels.__file__]
    + [str(Path(__file__).with_name(name)) for name in ("scaled_mm_wgmma.py", "scaled_mm_blockwise_wgmma.py")],
    MARGIN,
)


def _check_shapes(a_q: torch.Tensor, b_q: torch.Tensor, scale: torch.Tensor) -> None:
    check_summed("scaled_mm_blockwise", a_q, b_q)
    expected = num_blocks(b_q.shape[1]), b_q.shape[0]
    if scale.shape != expected:
        raise ValueError(
            f"scaled_mm_blockwise: scale is {tuple(scale.shape)}, but must be {expected}: a row for each {BLOCK_ROWS} products"
        )


def _fake(
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_BN: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_dtypes("scaled_mm_blockwise", a_q_MK, b_q_NK, (scale_BN,), out_dtype)
    return a_q_MK.new_empty((a_q_MK.shape[0], b_q_NK.shape[0]), dtype=out_dtype)


SCALED_MM_BLOCKWISE = define_op(
    "scaled_mm_blockwise(Tensor a_q, Tensor b_q, Tensor scale, ScalarType out_dtype) -> Tensor",
    reference=scaled_mm_blockwise_reference,
    cuda=scaled_mm_blockwise_triton,
    fake=_fake,
)
