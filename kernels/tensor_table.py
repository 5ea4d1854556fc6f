"""Many tensors for one launch: their addresses in a table on the device, cut into chunks of equal length.

Shapes: T tensors, C chunks of all of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

CHUNK = 16384
"""Elements of a chunk, which one program works on; the last of a tensor may have fewer."""


class TensorTable(NamedTuple):
    """Lists of T tensors each, as kernels want them. Tensors with the same position have the same size and layout."""

    addresses: torch.Tensor
    """[columns, T] int64; 0 where there is no tensor."""
    num_elements: torch.Tensor
    """[T] int64."""
    chunks: torch.Tensor
    """[C, 2] int32: number of the tensor, number of the chunk in it."""
    first_chunks: torch.Tensor
    """[T + 1] int32: where a tensor's chunks begin."""


def make_table(like: Sequence[torch.Tensor], columns: Sequence[Sequence[torch.Tensor]], device: torch.device) -> TensorTable:
    """The table of `columns`, on `device`.

    Args:
        like: T tensors that have the sizes and the layouts of all others.
        columns: lists of T tensors, of which some may be empty; or of none, for a column that nobody reads.
        device: where the tensors are.

    Raises:
        ValueError: a tensor has gaps between its elements, or another layout than its counterpart in `like`.
    """
    num_elements = torch.tensor([tensor.numel() for tensor in like], dtype=torch.int64)
    num_chunks = (num_elements + CHUNK - 1) // CHUNK
    first_chunks = torch.zeros(len(like) + 1, dtype=torch.int64)
    first_chunks[1:] = num_chunks.cumsum(0)
    owners = torch.repeat_interleave(torch.arange(len(like)), num_chunks)
    numbers = torch.arange(len(owners)) - first_chunks[owners]
    addresses = [[0] * len(like) for _ in columns]
    for row, tensors in zip(addresses, columns, strict=True):
        if tensors:
            row[:] = map(address, tensors, like)
    return TensorTable(
        torch.tensor(addresses, dtype=torch.int64).to(device),
        num_elements.to(device),
        torch.stack([owners, numbers], 1).to(device, torch.int32),
        first_chunks.to(device, torch.int32),
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps, in any order of the dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def are_aligned(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all begin at a multiple of 16 bytes, as the allocator's do: the widest loads need it."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def address(tensor: torch.Tensor, like: torch.Tensor) -> int:
    """Where a tensor begins; 0 if it is empty.

    Raises:
        ValueError: it is not laid out as `like`, without gaps.
    """
    if tensor.numel() == 0:
        return 0
    if tensor.shape != like.shape or tensor.stride() != like.stride() or not is_dense(tensor):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} does not lie in memory as one of "
            f"shape {tuple(like.shape)} and strides {like.stride()} does, without gaps"
        )
    return tensor.data_ptr()
