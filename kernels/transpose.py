# mypy: allow-untyped-defs
"""Transpose of an int8 matrix, for matmuls that sum over its rows: tensor cores take 8 bit only with these side by side.

Shapes: N rows (tokens), K columns; P is N rounded up to a multiple of 16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from swcompile.kernels import int8
from swcompile.kernels.int8 import padded, store_tile, with_unit_inner_stride
from swcompile.kernels.launch import Launcher, Plans, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket, worth_trying


def transpose(q_NK: torch.Tensor) -> torch.Tensor:
    """The transpose of an int8 matrix, with its rows padded.

    Args:
        q_NK: [N, K] int8, any strides.

    Returns:
        [K, P] int8, contiguous, with zeros from N to P, as tensor cores want multiples of 16.

    Raises:
        ValueError: q is of another dtype, or not a matrix.
    """
    return TRANSPOSE(q_NK)


def transpose_reference(q_NK: torch.Tensor) -> torch.Tensor:
    """`transpose` in plain PyTorch."""
    _check_input(q_NK)
    return F.pad(q_NK, (0, 0, 0, padded(q_NK.shape[0]) - q_NK.shape[0])).t().contiguous()


def transpose_work(num_rows: int, num_columns: int) -> Work:
    """Nothing computed; the matrix read once, and written once."""
    return Work(flops=0, bytes=(num_rows + padded(num_rows)) * num_columns)


def transpose_triton(q_NK: torch.Tensor) -> torch.Tensor:
    """`transpose` by the Triton kernel: what the op does on CUDA."""
    _check_input(q_NK)
    q_NK = with_unit_inner_stride(q_NK)
    launch = PLANS.find([q_NK])
    out_KP = _empty_output(q_NK)
    launch(q_NK, out_KP)
    return out_KP


def _empty_output(q_NK: torch.Tensor) -> torch.Tensor:
    return empty((q_NK.shape[1], padded(q_NK.shape[0])), torch.int8, q_NK.device)


def _prepare(q_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (q, out)."""
    if q_NK.numel() == 0:
        return nothing
    out_KP = _empty_output(q_NK)

    def run(config: TransposeConfig) -> None:
        launcher(config, q_NK)(q_NK, out_KP)

    key = (bucket(q_NK.shape[0]), q_NK.shape[1])
    return launcher(TUNER.choose(key, lambda: worth_trying(CANDIDATES, q_NK), run, q_NK.device), q_NK)


PLANS = Plans(_prepare)


class TransposeConfig(NamedTuple):
    """The tile of a program."""

    rows: int
    columns: int
    num_warps: int


CANDIDATES = [
    TransposeConfig(64, 128, 4),
    TransposeConfig(128, 128, 8),
    TransposeConfig(128, 128, 4),
    TransposeConfig(256, 64, 8),
    TransposeConfig(128, 64, 4),
]


def launcher(config: TransposeConfig, q_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (q, out) in the given configuration."""
    num_rows, num_columns = q_NK.shape
    return Launcher(
        _transpose_kernel,
        (triton.cdiv(num_rows, config.rows) * triton.cdiv(num_columns, config.columns),),
        num_rows,
        padded(num_rows),
        num_columns,
        q_NK.stride(0),
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        num_warps=config.num_warps,
    )


@triton.jit
def _transpose_kernel(
    q_ptr, out_ptr, num_rows, num_padded, num_columns, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tiles go along the columns, then down: neighbours read the same rows at the same time."""
    tiles_across = tl.cdiv(num_columns, BLOCK_K)
    rows = (tl.program_id(0) // tiles_across) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    columns = (tl.program_id(0) % tiles_across) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    column_mask = (columns < num_columns)[None, :]
    q = tl.load(
        q_ptr + (rows * stride)[:, None] + columns[None, :], mask=(rows < num_rows)[:, None] & column_mask, other=0
    )
    stored = (rows < num_padded)[:, None] & column_mask
    store_tile(q, None, out_ptr, rows, columns, num_padded, num_columns, stored, False, True)


TUNER: Tuner[TransposeConfig] = Tuner("transpose", [__file__, int8.__file__])


def _check_input(q: torch.Tensor) -> None:
    if q.dtype != torch.int8:
        raise ValueError(f"transpose: q is {q.dtype}, but must be int8; transpose other dtypes by q.t().contiguous()")
    if q.dim() != 2:
        raise ValueError(f"transpose: q has {q.dim()} dimensions, but must have 2; flatten the leading ones first")


def _fake(q_NK: torch.Tensor) -> torch.Tensor:
    _check_input(q_NK)
    return q_NK.new_empty((q_NK.shape[1], padded(q_NK.shape[0])))


TRANSPOSE = define_op(
    "transpose(Tensor q) -> Tensor", reference=transpose_reference, cuda=transpose_triton, fake=_fake
)
