"""Sizes that may be symbolic: the values that decisions take for them."""

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from swcompile.kernels.tuning import bucket


def hint(size: int | torch.SymInt) -> int:
    """The size itself, or the example value behind a symbolic one."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return int(known) if known is not None else 8192  # data-dependent: any plausible number of tokens
    return size


def bucketed(size: int | torch.SymInt) -> int:
    """The size itself, or of a symbolic one its value where each symbol is its hint rounded up to a power of two.

    Decisions rest on these values, and a cache key holds them (`size_buckets`): a graph that is compiled once for
    any number of tokens then gets the same decisions from every number in the bucket.
    """
    if not isinstance(size, torch.SymInt):
        return size
    node = size.node
    hints = {symbol: bucket(_symbol_hint(symbol, node.shape_env)) for symbol in node.expr.free_symbols}
    return int(node.expr.subs(hints))


def symbolic_sizes(values: Iterable[Any]) -> list[torch.SymInt]:
    """The symbolic ones among numbers and the sizes of tensors."""
    shapes = (value.shape if isinstance(value, torch.Tensor) else (value,) for value in values)
    return [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]


def size_buckets(values: Iterable[Any]) -> dict[str, int]:
    """Name -> bucketed hint of each symbol in numbers and the sizes of tensors."""
    nodes = [size.node for size in symbolic_sizes(values)]
    symbols = {symbol: node.shape_env for node in nodes for symbol in node.expr.free_symbols}
    return dict(sorted((str(symbol), bucket(_symbol_hint(symbol, env))) for symbol, env in symbols.items()))


def _symbol_hint(symbol: sympy.Symbol, shape_env: ShapeEnv) -> int:
    return hint(torch.SymInt(SymNode(symbol, shape_env, int, None)))
