"""Calls of the ops that quantise and multiply, known by sizes alone: what a device is timed by."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import torch

from swcompile.kernels.int8 import num_blocks
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import QUANTIZE_BY_SCALE, QUANTIZE_TENSORWISE
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.transpose import TRANSPOSE


class Op(StrEnum):
    """What is called; all but the first are ops of ours."""

    MATMUL = "matmul"
    SCALED_MM = "scaled_mm"
    SCALED_MM_BLOCKWISE = "scaled_mm_blockwise"
    QUANTIZE_ROWWISE = "quantize_rowwise"
    QUANTIZE_TENSORWISE = "quantize_tensorwise"
    QUANTIZE_BY_SCALE = "quantize_by_scale"
    QUANTIZE_COLUMNWISE_TRANSPOSE = "quantize_columnwise_transpose"
    QUANTIZE_BLOCKWISE_TRANSPOSE = "quantize_blockwise_transpose"
    TRANSPOSE = "transpose"


class Call(NamedTuple):
    """An op, and on what it is called."""

    op: Op
    sizes: tuple[int, ...]
    """(M, N, K) where it multiplies [M, K] by [K, N], else the rows and columns that it reads."""
    dtype: torch.dtype
    """Of what is multiplied or quantised; the result of a multiplication in int8 has it."""

    def __str__(self) -> str:
        return f"{self.op} {' x '.join(map(str, self.sizes))} {self.dtype}"

    @property
    def num_kernels(self) -> int:
        """How many kernels it launches."""
        return 2 if self.op in (Op.QUANTIZE_TENSORWISE, Op.QUANTIZE_COLUMNWISE_TRANSPOSE) else 1

    def prepare(self, device: torch.device) -> Callable[[], object]:
        """Make operands of normal data, and return what calls the op on them."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype)

        def rounded(*shape: int) -> torch.Tensor:
            """As a quantiser leaves them: what is multiplied decides on a GPU's clock."""
            return (normal(*shape) * 31.0).clamp(-127, 127).round().to(torch.int8)

        def scales(*shape: int) -> torch.Tensor:
            return torch.ones(shape, device=device, dtype=torch.float32)

        if self.op in (Op.MATMUL, Op.SCALED_MM, Op.SCALED_MM_BLOCKWISE):
            m, n, k = self.sizes
            if self.op is Op.MATMUL:
                return partial(torch.mm, normal(m, k), normal(n, k).t())
            a, b = rounded(m, k), rounded(n, k)
            if self.op is Op.SCALED_MM:
                return partial(SCALED_MM, a, b, scales(m, 1), scales(1, 1), None, self.dtype)
            return partial(SCALED_MM_BLOCKWISE, a, b, scales(num_blocks(k), n), self.dtype)
        if self.op is Op.TRANSPOSE:
            return partial(TRANSPOSE, rounded(*self.sizes))
        x = normal(*self.sizes)
        if self.op is Op.QUANTIZE_BY_SCALE:
            return partial(QUANTIZE_BY_SCALE, x, scales(1, 1), True)
        if self.op is Op.QUANTIZE_BLOCKWISE_TRANSPOSE:
            return partial(QUANTIZE_BLOCKWISE_TRANSPOSE, x, scales(self.sizes[0], 1))
        return partial(_OF_ONE[self.op], x)


_OF_ONE = {
    Op.QUANTIZE_ROWWISE: QUANTIZE_ROWWISE,
    Op.QUANTIZE_TENSORWISE: QUANTIZE_TENSORWISE,
    Op.QUANTIZE_COLUMNWISE_TRANSPOSE: QUANTIZE_COLUMNWISE_TRANSPOSE,
}
