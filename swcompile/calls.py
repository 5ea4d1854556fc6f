"""Calls of the ops that quantise and multiply, known by sizes and layouts alone: what a device is timed by."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch

from swcompile.kernels.int8 import num_blocks
from swcompile.kernels.library import Work
from swcompile.kernels.quantize_blockwise import (
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    quantize_blockwise_transpose_work,
)
from swcompile.kernels.quantize_columnwise import (
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    quantize_columnwise_transpose_work,
)
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE, quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
    quantize_by_scale_work,
    quantize_tensorwise_work,
)
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.transpose import TRANSPOSE, transpose_work


class Op(StrEnum):
    """What is called; all but the first are ops of ours."""

    MATMUL = "matmul"
    SCALED_MM = "scaled_mm"
    SCALED_MM_BLOCKWISE = "scaled_mm_blockwise"
    QUANTIZE_ROWWISE = "quantize_rowwise"
    QUANTIZE_COLUMNWISE_TRANSPOSE = "quantize_columnwise_transpose"
    QUANTIZE_TENSORWISE = "quantize_tensorwise"
    QUANTIZE_TENSORWISE_TRANSPOSE = "quantize_tensorwise_transpose"
    QUANTIZE_BY_SCALE = "quantize_by_scale"
    QUANTIZE_BY_SCALE_TRANSPOSE = "quantize_by_scale(transpose)"
    QUANTIZE_BLOCKWISE_TRANSPOSE = "quantize_blockwise_transpose"
    TRANSPOSE = "transpose"


class Flag(StrEnum):
    """What else decides which kernel multiplies."""

    BIAS = "bias"
    COLUMN_SCALES = "a scale a column"
    """Of `scaled_mm`; without it the second operand has one scale."""
    LHS_TRANSPOSED = "lhs transposed"
    """Of `matmul`: in memory [K, M]."""
    RHS_TRANSPOSED = "rhs transposed"
    """Likewise, [N, K]."""

    @staticmethod
    def those_of(are_set: Mapping["Flag", bool]) -> tuple["Flag", ...]:
        """The ones that are set."""
        return tuple(flag for flag, is_set in are_set.items() if is_set)


class Call(NamedTuple):
    """An op, and on what it is called."""

    op: Op
    sizes: tuple[int, ...]
    """(M, N, K) where it multiplies [M, K] by [K, N], else the rows and columns that it reads."""
    dtype: torch.dtype
    """Of what is multiplied or quantised; the result of a multiplication in int8 has it."""
    flags: tuple[Flag, ...] = ()

    def __str__(self) -> str:
        return ", ".join((f"{self.op} {' x '.join(map(str, self.sizes))} {self.dtype}", *self.flags))

    @property
    def num_kernels(self) -> int:
        """How many kernels it launches."""
        return 2 if self.op in _OF_TWO_KERNELS else 1

    @property
    def num_bytes(self) -> int:
        """Bytes that a quantiser, or `transpose`, reads and writes, as its work counts them."""
        if self.op is Op.TRANSPOSE:
            return transpose_work(*self.sizes).bytes
        return _WORK[self.op](*self.sizes, self.dtype.itemsize).bytes

    def prepare(self, device: torch.device) -> "partial[Any]":
        """Make operands of normal data, and return what calls the op on them."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16 if self.dtype == torch.int8 else self.dtype)

        def rounded(*shape: int) -> torch.Tensor:
            """As a quantiser leaves them: what is multiplied decides on a GPU's clock."""
            return (normal(*shape) * 31.0).clamp(-127, 127).round().to(torch.int8)

        def scales(*shape: int) -> torch.Tensor:
            return torch.ones(shape, device=device, dtype=torch.float32)

        if self.op in (Op.MATMUL, Op.SCALED_MM, Op.SCALED_MM_BLOCKWISE):
            m, n, k = self.sizes
            bias = normal(n) if Flag.BIAS in self.flags else None
            if self.op is Op.MATMUL:
                lhs = normal(k, m).t() if Flag.LHS_TRANSPOSED in self.flags else normal(m, k)
                rhs = normal(n, k).t() if Flag.RHS_TRANSPOSED in self.flags else normal(k, n)
                return partial(torch.mm, lhs, rhs) if bias is None else partial(torch.addmm, bias, lhs, rhs)
            a, b = rounded(m, k), rounded(n, k)
            if self.op is Op.SCALED_MM_BLOCKWISE:
                return partial(SCALED_MM_BLOCKWISE, a, b, scales(num_blocks(k), n), self.dtype)
            b_scale = scales(n if Flag.COLUMN_SCALES in self.flags else 1, 1)
            return partial(SCALED_MM, a, b, scales(m, 1), b_scale, bias, self.dtype)
        if self.op is Op.TRANSPOSE:
            return partial(TRANSPOSE, rounded(*self.sizes))
        x = normal(*self.sizes)
        if self.op in (Op.QUANTIZE_BY_SCALE, Op.QUANTIZE_BY_SCALE_TRANSPOSE):
            return partial(QUANTIZE_BY_SCALE, x, scales(1, 1), self.op is Op.QUANTIZE_BY_SCALE_TRANSPOSE)
        if self.op is Op.QUANTIZE_BLOCKWISE_TRANSPOSE:
            return partial(QUANTIZE_BLOCKWISE_TRANSPOSE, x, scales(self.sizes[0], 1))
        return partial(_OF_ONE[self.op], x)


_OF_ONE: dict[Op, Callable[[torch.Tensor], Any]] = {
    Op.QUANTIZE_ROWWISE: QUANTIZE_ROWWISE,
    Op.QUANTIZE_COLUMNWISE_TRANSPOSE: QUANTIZE_COLUMNWISE_TRANSPOSE,
    Op.QUANTIZE_TENSORWISE: QUANTIZE_TENSORWISE,
    Op.QUANTIZE_TENSORWISE_TRANSPOSE: QUANTIZE_TENSORWISE_TRANSPOSE,
}
_OF_TWO_KERNELS = (Op.QUANTIZE_TENSORWISE, Op.QUANTIZE_TENSORWISE_TRANSPOSE, Op.QUANTIZE_COLUMNWISE_TRANSPOSE)
_WORK: dict[Op, Callable[..., Work]] = {
    Op.QUANTIZE_ROWWISE: quantize_rowwise_work,
    Op.QUANTIZE_COLUMNWISE_TRANSPOSE: quantize_columnwise_transpose_work,
    Op.QUANTIZE_BLOCKWISE_TRANSPOSE: quantize_blockwise_transpose_work,
    Op.QUANTIZE_TENSORWISE: quantize_tensorwise_work,
    Op.QUANTIZE_TENSORWISE_TRANSPOSE: quantize_tensorwise_work,
    Op.QUANTIZE_BY_SCALE: quantize_by_scale_work,
    Op.QUANTIZE_BY_SCALE_TRANSPOSE: quantize_by_scale_work,
}
