"""A module's forward replaced by its own graph, rewritten: for sites that no submodule's output gives access to."""

import copy
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils._sympy.printers import PythonPrinter

from swcompile.forward import ForwardGraph, attribute, capture_forward


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """What the graph wants of one input."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    """Sizes, or names of those that are free."""
    same_as: int
    """Position of the first input that is the same tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """The graph for one mode and one kind of inputs."""

    training: bool
    spec: TreeSpec
    leaves: tuple[Any, ...]
    """Of each input: what a tensor has to be like (`_Tensor`), or the constant itself."""
    ranges: dict[str, tuple[int, int]]
    """Name of a free size -> the smallest and the largest that the graph holds for."""
    holds: Callable[..., bool]
    """What else the forward has asked about the sizes, by their names, as it was answered."""
    function: Callable[..., Any]
    with_tensors: Callable[[Sequence[torch.Tensor]], Any]

    def takes(self, training: bool, spec: TreeSpec, leaves: Sequence[Any]) -> bool:
        """Whether the graph holds for these inputs."""
        if training != self.training or spec != self.spec:
            return False
        sizes: dict[str, Any] = {}
        for leaf, known in zip(leaves, self.leaves, strict=True):
            if isinstance(leaf, torch.Tensor) != isinstance(known, _Tensor):
                return False
            if not isinstance(leaf, torch.Tensor):
                if leaf != known:
                    return False
                continue
            if leaf.dtype != known.dtype or leaf.ndim != len(known.shape) or _first(leaves, leaf) != known.same_as:
                return False
            for size, wanted in zip(leaf.shape, known.shape, strict=True):
                if isinstance(wanted, int):
                    if size != wanted:
                        return False
                elif sizes.setdefault(wanted, size) != size:
                    return False
        in_range = all(low <= sizes[name] <= high for name, (low, high) in self.ranges.items())
        return in_range and self.holds(**sizes)


MAX_VARIANTS = 64
"""Graphs that are kept of one module: objects among its inputs may differ in every call."""


def _holds_traced(value: Any, depth: int = 4) -> bool:
    """Whether an object, or one that it refers to, has kept a tensor of the tracing."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    if isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(value.values()) if isinstance(value, dict) else list(getattr(value, "__dict__", {}).values())
    return depth > 0 and any(_holds_traced(part, depth - 1) for part in parts)


def _answers(shape_env: Any, names: Sequence[str]) -> Callable[..., bool]:
    """A function of sizes that is true where a traced forward would have gone the same way."""
    known = [name for name in names if name.isidentifier()]
    conditions = []
    for guard in [] if shape_env is None else shape_env.guards:
        condition = shape_env.replace(guard.expr)
        if {str(symbol) for symbol in condition.free_symbols} <= set(known):
            conditions.append(f"({PythonPrinter().doprint(condition)})")
    source = f"lambda {', '.join([*known, '**others'])}: {' and '.join(dict.fromkeys(conditions)) or True}"
    return eval(source, {"math": math})  # Dynamo follows it, as it does no sympy


def _first(leaves: Sequence[Any], leaf: torch.Tensor) -> int:
    return next(index for index, other in enumerate(leaves) if other is leaf)


class GraphForward:
    """Takes the place of a module's forward: captures it, rewrites the graph, and runs that on the module itself.

    Parameters and submodules are looked up in the module at each call, so whoever swaps them (FSDP, ``to``,
    ``load_state_dict``) is obeyed. Inputs of another kind (training or evaluation, other arguments, another dtype)
    are captured when they first come; batch size and length are free.

    Args:
        owner: the module.
        path: its name, for errors.
        rewrite: changes the captured graph in place.
    """

    def __init__(self, owner: nn.Module, path: str, rewrite: Callable[[ForwardGraph], None]):
        self.owner = owner
        self.path = path
        self.rewrite = rewrite
        self.variants: list[_Variant] = []
        self.constants: list[str] = []
        """What the graphs refer to besides the module's own parameters, buffers and submodules."""
        self.__signature__ = inspect.signature(owner.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphForward":
        copied = GraphForward(copy.deepcopy(self.owner, memo), self.path, self.rewrite)
        copied.variants, copied.constants = list(self.variants), list(self.constants)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"variants": []}  # captured again when they are needed

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.owner.forward
        for name in self.constants:
            delattr(self.owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        for variant in self.variants:
            if variant.takes(self.owner.training, spec, leaves):
                break
        else:
            variant = self._captured(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return variant.with_tensors(variant.function(self.owner, *tensors))

    @torch.compiler.disable(reason="a prepared model is called in a new way: call it like this once before it is compiled")
    def _captured(self, args: Any, kwargs: Any) -> _Variant:
        del self.owner.forward  # its own
        try:
            variant = self._capture(args, kwargs)
        finally:
            self.owner.forward = self
        self.variants = [*self.variants[1 - MAX_VARIANTS :], variant]
        return variant

    def _capture(self, args: Any, kwargs: Any) -> _Variant:
        leaves, spec = tree_flatten((args, kwargs))
        captured = capture_forward(self.owner, *args, kwargs=kwargs, dynamic=True)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) and _holds_traced(leaf):
                raise ValueError(
                    f"{self.path or 'the model'} writes to a {type(leaf).__name__} that it is called with, which its graph "
                    "cannot do; exclude its sites from prepare, or call it without"
                )
        self.rewrite(captured)
        values = iter([node.meta["val"] for node in captured.graph.find_nodes(op="placeholder")])
        known: list[Any] = []
        ranges: dict[str, tuple[int, int]] = {}
        shape_env: Any = None
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                known.append(leaf)
                continue
            shape = next(values).shape
            for size in shape:
                if isinstance(size, torch.SymInt):
                    shape_env = size.node.shape_env
                    bounds = shape_env.bound_sympy(size.node.expr)
                    ranges[str(size)] = (int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else sys.maxsize)
            sizes = tuple(size if isinstance(size, int) else str(size) for size in shape)
            known.append(_Tensor(dtype=leaf.dtype, shape=sizes, same_as=_first(leaves, leaf)))
        return _Variant(
            training=self.owner.training,
            spec=spec,
            leaves=tuple(known),
            ranges=ranges,
            holds=_answers(shape_env, list(ranges)),
            function=self._function(captured.module),
            with_tensors=captured.with_tensors,
        )

    def _function(self, module: fx.GraphModule) -> Callable[..., Any]:
        """The graph as a function of the module and the leaves of its inputs."""
        for node in module.graph.find_nodes(op="get_attr"):
            if _is_there(self.owner, node.target):
                continue
            # A constant, or the body of a region (one without gradients, say).
            value, name = attribute(module, node.target), f"_captured_{len(self.constants)}"
            if isinstance(value, torch.Tensor):
                self.owner.register_buffer(name, value, persistent=False)
            else:
                object.__setattr__(self.owner, name, value)
            self.constants.append(name)
            setattr(module, name, value)
            node.target = name
        module.recompile()
        return type(module).forward


def _is_there(owner: nn.Module, path: str) -> bool:
    try:
        attribute(owner, path)
    except AttributeError:
        return False
    return True
