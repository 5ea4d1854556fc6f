"""Runs passes over a graph, and checks after each one that the graph is legal. Prints graphs."""

import dataclasses
import enum
import functools
import hashlib
import inspect
import logging
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import swcompile.kernels.library
from swcompile import graph as facts
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.transpose import TRANSPOSE
from swcompile.report import Decision

log = logging.getLogger("swcompile")


@dataclasses.dataclass(kw_only=True, slots=True)
class PassResult:
    """What a pass did."""

    rewrites: int = 0
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    """One for each matmul that the pass looked at."""
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Node name -> what to add to the reason that an earlier pass gave for it."""


Pass = Callable[[fx.Graph], PassResult]


def run_passes(graph: fx.Graph, passes: Sequence[Pass]) -> list[Decision]:
    """Run passes in order, in place, and return the decisions about the graph's matmuls.

    After each pass: dead code out, lint, `verify`.

    Args:
        graph: a joint or inference graph of AOTAutograd, each node with ``meta["val"]``.
        passes: functions from a graph to a `PassResult`; their options are bound with `functools.partial`.
    """
    decisions: list[Decision] = []
    for rewrite in passes:
        start = time.perf_counter()
        before = set(graph.nodes)
        result = rewrite(graph)
        if result.rewrites:
            graph.eliminate_dead_code()
            graph.lint()
            verify(node for node in graph.nodes if node not in before)
        decisions = [
            dataclasses.replace(d, reason=f"{d.reason}; {result.notes[d.node]}") if d.node in result.notes else d
            for d in (*decisions, *result.decisions)
        ]
        log.debug("%s: %d rewrites in %.2f s", _name(rewrite), result.rewrites, time.perf_counter() - start)
    return decisions


def _name(rewrite: Pass) -> str:
    function = rewrite.func if isinstance(rewrite, functools.partial) else rewrite
    return getattr(function, "__name__", type(function).__name__)


def verify(new: Iterable[fx.Node]) -> None:
    """Check the nodes that a pass made.

    Each has ``meta["val"]``, equal to what its op gives for its arguments' values, and a quantised value reaches
    only ops that also take its own scale, or leave it to the other operand.
    """
    for node in new:
        if node.op != "call_function":
            continue
        assert "val" in node.meta, f"{node.format_node()} has no meta['val']"
        expected = fake_result(node.target, node.args, node.kwargs)
        for want, have in zip(_tensors(expected), _tensors(node.meta["val"]), strict=True):
            same = (want.shape, want.dtype, want.device) == (have.shape, have.dtype, have.device)
            assert same, f"{node.format_node()} has meta {have}, but its op gives {want}"
        if "quantized_with" in node.meta:
            scale = node.meta["quantized_with"]
            for user in node.users:
                assert _takes(user, scale), f"{user.format_node()} reads {node} without its scale {scale}"


def _takes(user: fx.Node, scale: fx.Node) -> bool:
    """Whether what reads a quantised value takes its scale, too.

    A sum over tokens cannot: what is transposed for it leaves its scales to the other operand, which is multiplied by them
    before it is quantised (`SCALED_MM_BLOCKWISE`).
    """
    if user.target == TRANSPOSE:
        factors = [matmul.args[1].args[0].args[1] for matmul in user.users]  # type: ignore[union-attr]
    else:
        factors = user.args[1:2] if user.target == QUANTIZE_BLOCKWISE_TRANSPOSE else []  # type: ignore[assignment]
    return scale in user.all_input_nodes or (
        bool(factors) and all(scale is factor or scale in factor.all_input_nodes for factor in factors)  # type: ignore[union-attr]
    )


def fake_result(target: Any, args: Any, kwargs: Any) -> Any:
    """What an op gives for the values of its argument nodes, without computing it."""
    values, keywords = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    mode = torch._guards.detect_fake_mode([values, keywords])
    assert mode is not None, f"no fake tensor among the arguments of {target}"
    with mode, torch.no_grad():
        return target(*values, **keywords)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def emit(
    graph: fx.Graph, target: Any, *args: Any, like: fx.Node, only_in_backward: bool = False, **kwargs: Any
) -> fx.Node:
    """Add ``target(*args, **kwargs)`` at the insertion point, with a value and the origin of `like`.

    Args:
        graph: where to; set the insertion point with ``graph.inserting_before``.
        target: the op.
        args: its arguments, nodes or constants.
        like: the node that the new one does the work of: stack trace, module, checkpointing tag, forward or backward.
        only_in_backward: the partitioner must compute the node in the backward, not keep it from the forward.
        kwargs: its keyword arguments.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in _ORIGIN if key in like.meta}
    if only_in_backward:
        node.meta["partitioner_tag"] = "must_be_in_backward"
        node.meta.pop("recompute", None)
    node.meta["val"] = fake_result(target, args, kwargs)
    return node


def emit_module(graph: fx.Graph, path: str, module: nn.Module, argument: fx.Node) -> fx.Node:
    """Add a call of a module, registered in the graph's own under `path`, that keeps its argument's shape and dtype.

    Args:
        graph: where to, at its insertion point.
        path: the module's name; one that is there already is called again.
        module: the module.
        argument: what to call it with.
    """
    root = graph.owning_module
    assert root is not None
    if path not in dict(root.named_modules()):
        root.add_submodule(path, module)
    node = graph.call_module(path, (argument,))
    node.meta = {key: argument.meta[key] for key in _ORIGIN if key in argument.meta}
    node.meta["val"] = argument.meta["val"].clone()
    return node


_ORIGIN = (
    "calls",
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "source_fn_stack",
    "fwd_source_fn_stack",
    "seq_nr",
    "partitioner_tag",
    "autograd_backward",
    "recompute",
    "ac_graph_id",
    "custom",
)


@functools.cache
def source_fingerprint() -> str:
    """A hash of every source file of this package: the part of a cache key that stands for our code."""
    digest = hashlib.sha256()
    package, kernels = Path(__file__).parent, Path(swcompile.kernels.library.__file__).parent
    for folder in (package, package / "passes", kernels):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def pass_identity(rewrite: Pass) -> str | None:
    """What a pass does, as text for a cache key: equal exactly for passes that do the same. None if nobody can tell.

    A function is its name and defaults and, if it is not one of ours, its source; one with a closure, which can hold
    anything, is nothing, and neither is a lambda, whose source is all of its line. Any other callable is its
    ``uuid()``. `functools.partial` adds what it binds.
    """
    if isinstance(rewrite, functools.partial):
        parts = [pass_identity(rewrite.func), _value_identity(rewrite.args), _value_identity(rewrite.keywords)]
    elif not isinstance(rewrite, types.FunctionType):
        kind, uuid = type(rewrite), getattr(rewrite, "uuid", None)
        parts = [f"{kind.__module__}.{kind.__qualname__}", uuid() if callable(uuid) else None]
    elif rewrite.__closure__ or rewrite.__name__ == "<lambda>":
        return None
    else:
        parts = [f"{rewrite.__module__}.{rewrite.__qualname__}", _value_identity(rewrite.__defaults__)]
        parts.append(_value_identity(rewrite.__kwdefaults__))
        if not rewrite.__module__.startswith("swcompile."):  # whose source is part of the key already
            parts.append(_source(rewrite))
    return None if None in parts else repr(parts)


def _value_identity(value: Any) -> str | None:
    """A value bound to a pass as text: plain data, dataclasses and containers of it, and functions."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        parts = [_value_identity(item) for item in value]
    elif isinstance(value, dict):
        parts = [_value_identity(pair) for pair in value.items()]
    elif isinstance(value, (set, frozenset)):
        parts = sorted((_value_identity(item) for item in value), key=str)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [_value_identity((field.name, getattr(value, field.name))) for field in dataclasses.fields(value)]
    else:
        return pass_identity(value) if callable(value) else None
    return None if None in parts else f"{type(value).__qualname__}{parts!r}"


def _source(function: types.FunctionType) -> str | None:
    try:
        return inspect.getsource(function)
    except OSError:  # typed at a prompt
        return None


_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "e4m3",
    torch.bool: "b8",
}


def format_graph(graph: fx.Graph) -> str:
    """The graph as text, one node a line, in names that do not depend on FX's.

    ::

        %0: f32[64, 32] = parameter fc.weight
        %1: f32[8, 32] = input
        %2: f32[32, 64] = aten.permute(%0, [1, 0])
        %3: f32[8, 64] = aten.mm(%1, %2)
        return %3
    """
    names: dict[fx.Node, str] = {}
    known = facts.parameters(graph)
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args
            lines.append("return " + ", ".join(_format_argument(value, names) for value in values))
            continue
        names[node] = f"%{len(names)}"
        if node.op == "placeholder":
            what = f"parameter {known[node]}" if node in known else _placeholder_kind(node)
        elif node.op == "get_attr":
            what = f"attribute {node.target}"
        elif node.op == "call_module":
            what = f"{node.target}({', '.join(_format_argument(value, names) for value in node.args)})"
        else:
            arguments = [_format_argument(value, names) for value in node.args]
            arguments += [f"{key}={_format_argument(value, names)}" for key, value in node.kwargs.items()]
            what = f"{target_name(node.target)}({', '.join(arguments)})".replace(", \n", ",\n")
        lines.append(f"{names[node]}: {_format_value(node.meta.get('val'))} = {what}")
    return "\n".join(lines)


def _placeholder_kind(node: fx.Node) -> str:
    kind = "tangent" if str(node.target).startswith("tangents") else "input"
    return f"{kind} {node.meta['input']}" if "input" in node.meta else kind


def target_name(target: Any) -> str:
    """The operator, function or method that a node calls, by the name that it has in a printed graph."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _format_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        short = _SHORT_DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{short}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_format_value(item) for item in value)})"
    return "?" if value is None else str(value)


def _format_argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_format_argument(item, names) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _SHORT_DTYPES.get(value, str(value))
    if isinstance(value, str) and value.startswith("%0: "):  # a row program, which is a graph itself
        return "\n" + "\n".join(f"    {line}" for line in value.split("; "))
    return str(value)
