"""Forward hooks by which a live model calls the modules that `swcompile.prepare` registers in it."""

from typing import Any

import torch
from torch import nn

from swcompile.stabilizers import Over, QKNorm


class SiteHook:
    """Applies a new module, found by its name in its owner at each call, to the output of another one.

    Args:
        place: the new module's qualified name.
    """

    def __init__(self, place: str):
        self.place = place
        self.owner: nn.Module | None = None
        self.name = ""

    def attach(self, owner: nn.Module, name: str) -> None:
        """Say where the new module is."""
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.apply(getattr(self.owner, self.name), output)

    def apply(self, new: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """What the module's output becomes."""
        return new(output)


class NormalizeFeatures(SiteHook):
    """A norm of those features of a projection that are queries, or keys.

    Args:
        place: the norm's qualified name.
        columns: [heads, channels], int64: the numbers of the features in the projection's output.
    """

    def __init__(self, place: str, columns: torch.Tensor):
        super().__init__(place)
        self.num_heads, self.num_channels = columns.shape
        self.first = int(columns[0, 0])
        self.stride = int(columns[1, 0]) - self.first if self.num_heads > 1 else self.num_channels
        heads = torch.arange(self.num_heads).unsqueeze(1) * self.stride
        self.is_strided = torch.equal(columns, self.first + heads + torch.arange(self.num_channels))
        self.columns = columns.flatten()

    def apply(self, new: nn.Module, output: torch.Tensor) -> torch.Tensor:
        row, column = divmod(self.first, self.stride)
        fits = self.is_strided and output.shape[-1] % self.stride == 0 and column + self.num_channels <= self.stride
        if not fits:
            columns = self.columns.to(output.device)
            heads = output.index_select(-1, columns).unflatten(-1, (self.num_heads, self.num_channels))
            return output.index_copy(-1, columns, _normalized(new, heads).flatten(-2))
        rows = output.unflatten(-1, (-1, self.stride))
        if rows.shape[-2:] == (self.num_heads, self.num_channels):
            return _normalized(new, rows).flatten(-2)
        heads = rows.narrow(-2, row, self.num_heads)
        normalized = _normalized(new, heads.narrow(-1, column, self.num_channels))
        if self.stride > self.num_channels:
            normalized = heads.slice_scatter(normalized, -1, column, column + self.num_channels)
        return rows.slice_scatter(normalized, -2, row, row + self.num_heads).flatten(-2)


def _normalized(norm: nn.Module, heads: torch.Tensor) -> torch.Tensor:
    """A norm of [..., heads, channels], over the channels or over both."""
    if isinstance(norm, QKNorm) and norm.over is Over.MODEL:
        return norm(heads.flatten(-2)).unflatten(-1, heads.shape[-2:])
    return norm(heads)


class StayInPython:
    """A hook that does nothing: `torch.nn` takes no fused inference path past a module with hooks."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None
