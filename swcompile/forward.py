"""The forward graph of a module, before autograd, and where in the module tree each of its values is made."""

import contextlib
import dataclasses
import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from swcompile.pipeline import Pass, format_graph, run_passes
from swcompile.report import Decision

aten = torch.ops.aten


@dataclasses.dataclass(kw_only=True)
class ForwardGraph:
    """The forward of a module as a graph of aten ops, for one mode and one kind of inputs."""

    module: fx.GraphModule
    """Called with the tensors among the inputs, in order; returns the tensors of the output. Its parameters and
    buffers are those of the captured module, under the same names."""
    output: list[Any]
    """The leaves of the output, `torch.Tensor` (the class) for the tensors in it."""
    output_spec: TreeSpec
    tensor_modules: set[str]
    """The submodules of which every call returned one tensor."""
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    """What the passes that ran on it decided."""

    @property
    def graph(self) -> fx.Graph:
        """The FX graph; passes rewrite it in place. Each node's ``meta["calls"]`` names the module calls that it was
        made in, outermost first."""
        return self.module.graph

    def run_passes(self, passes: Sequence[Pass]) -> list[Decision]:
        """Run passes on the graph, in place, with the checks of `swcompile.run_passes`."""
        self.decisions = run_passes(self.graph, passes)
        self.module.recompile()
        return self.decisions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the captured module returns for inputs of the same kind."""
        leaves, _ = tree_flatten((args, kwargs))
        return self.with_tensors(self.module(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The output, with these tensors in it."""
        given = iter(tensors)
        leaves = [next(given) if leaf is torch.Tensor else leaf for leaf in self.output]
        return tree_unflatten(leaves, self.output_spec)

    def __str__(self) -> str:
        return format_graph(self.graph)


def capture_forward(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, dynamic: bool = False
) -> ForwardGraph:
    """The forward of a model as a graph of aten ops before autograd: the input of `insert_layer_scale` and
    `insert_qk_layernorm`.

    ``aten.linear`` and ``aten.scaled_dot_product_attention`` are whole. Nothing is computed. The graph holds for the
    mode (training or evaluation) that the model is in.

    Args:
        model: the model.
        inputs: what to call it with.
        kwargs: keyword arguments to call it with.
        dynamic: leave the sizes of the inputs free, where the forward does; else the graph holds for these sizes.

    Raises:
        ValueError: the forward cannot be traced; it says in which submodule.
    """
    leaves, spec = tree_flatten((inputs, dict(kwargs or {})))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    free = {"tensors": tuple({dim: Dim.AUTO for dim in range(tensor.ndim)} for tensor in tensors)} if dynamic else None
    calls = _ModuleCalls()
    function = _OnTensors(model, leaves, spec)
    # A result with free sizes is never kept in the cache of fake results, but worked out for it: half of the time.
    caching = torch._dynamo.config.patch(fake_tensor_cache_enabled=not dynamic)
    with calls.recorded(model), torch.enable_grad(), _without_fast_path(), caching:
        try:
            exported = torch.export.export(function, tuple(tensors), dynamic_shapes=free, strict=False)
        except Exception as error:
            message = f"the forward of {type(model).__name__}{calls.place} cannot be traced: {_first_line(error)}"
            raise ValueError(message) from error
    traced = exported.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    named = (model.named_parameters, model.named_buffers)
    own = dict(itertools.chain(*(values(remove_duplicate=False) for values in named)))
    attributes: dict[str, Any] = {}
    for node in list(traced.graph.nodes):
        if node.target == aten._assert_tensor_metadata.default or (node.op == "get_attr" and not node.users):
            traced.graph.erase_node(node)
        elif node.target == aten.view.default:
            node.target = aten.reshape.default  # strides when it runs may be others than when it was traced
        elif node.op == "get_attr":
            value = attribute(traced, node.target)
            node.target = node.target.removeprefix("model.")
            attributes[node.target] = own.get(node.target, value)  # a constant of the forward is nobody's
        node.meta["calls"] = tuple(_calls(node))
    traced.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(attributes, traced.graph, type(model).__name__)
    _add_values(module)
    _scale_last(module.graph)
    module.recompile()
    return ForwardGraph(
        module=module,
        output=function.result.output,
        output_spec=function.result.output_spec,
        tensor_modules=calls.returning_tensors(),
    )


class _OnTensors(nn.Module):
    """A model as a function of tensors that returns tensors: `torch.export` knows few other kinds of values."""

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: TreeSpec):
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.spec = spec
        self.result = types.SimpleNamespace()  # filled while it is traced; attributes of the module are put back

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        results, result_spec = tree_flatten(self.model(*args, **kwargs))
        others = [torch.Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in results]
        self.result.output, self.result.output_spec = others, result_spec
        return tuple(leaf for leaf in results if isinstance(leaf, torch.Tensor))


def attribute(root: nn.Module, path: str) -> Any:
    """``root.a.b`` for ``"a.b"``."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def called_in(node: fx.Node) -> str:
    """The call of a module in whose own forward a value is made: ``layers.0``, ``layers.0@1`` the second one; the
    empty string for the captured module itself."""
    calls = node.meta.get("calls", ())
    return calls[-1] if calls else ""


def path_of(call: str) -> str:
    """The module of a call."""
    return call.partition("@")[0]


def join(*parts: str) -> str:
    """A module path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def places(calls_and_stems: Iterable[tuple[str, str]]) -> list[str]:
    """Where each site's new module goes: ``owner.stem``, ``owner.stem_1`` for the second in one call of the owner, and
    the same place again in another call."""
    counts: dict[tuple[str, str], int] = {}
    found = []
    for call, stem in calls_and_stems:
        count = counts[call, stem] = counts.get((call, stem), -1) + 1
        found.append(join(path_of(call), f"{stem}_{count}" if count else stem))
    return found


def producing_call(captured: ForwardGraph, nodes: Iterable[fx.Node], consumer: fx.Node) -> str | None:
    """The outermost call of a submodule that returns one of these values, and nothing else, to the module (or a module
    inside it) in whose own forward `consumer` is.

    Args:
        captured: the forward graph.
        nodes: the values, the best first.
        consumer: what reads them in the end.
    """
    around = consumer.meta.get("calls", ())
    for node in nodes:
        calls = node.meta.get("calls", ())
        if calls[: len(around)] != around:
            continue
        for call in calls[len(around) :]:
            inside = [user for user in node.users if call in user.meta.get("calls", ())]
            if path_of(call) in captured.tensor_modules and not inside:
                return call
    return None


class _ModuleCalls:
    """Records which submodules return one tensor, and which one was running when something went wrong."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.returns_tensor: dict[str, bool] = {}

    @property
    def place(self) -> str:
        """``.a.b`` for the innermost module that is running."""
        path = self.running[-1] if self.running else ""
        return f".{path}" if path else ""

    def returning_tensors(self) -> set[str]:
        return {path for path, always in self.returns_tensor.items() if always}

    @contextlib.contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():

            def enter(module: nn.Module, args: Any, path: str = path) -> None:
                self.running.append(path)

            def leave(module: nn.Module, args: Any, result: Any, path: str = path) -> None:
                self.running.pop()
                self.returns_tensor[path] = isinstance(result, torch.Tensor) and self.returns_tensor.get(path, True)

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer as Python, never as one fused inference op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _calls(node: fx.Node) -> Iterator[str]:
    """The module calls that a node was made in, outermost first: ``layers.0.mlp``, ``layers.0.mlp@1`` the second."""
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        inside = path.removeprefix("model").removeprefix(".")
        _, again, count = key.rpartition("@")
        if path.startswith("model") and inside:
            yield inside + again + count if again else inside


_VIEWS = {
    aten.contiguous.default,
    aten.permute.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.unflatten.int,
}


def _scale_last(graph: fx.Graph) -> None:
    """Move products with numbers behind views, which changes no bit: queries may be scaled before they are split into heads."""
    for node in list(graph.nodes):
        while node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node):
            view = next(iter(node.users), node)
            if len(node.users) != 1 or view.target not in _VIEWS:
                break
            if node.args[0].meta["val"].dtype != view.meta["val"].dtype:
                break
            with graph.inserting_before(view):
                moved = graph.call_function(view.target, (node.args[0], *view.args[1:]), view.kwargs)
                scaled = graph.call_function(node.target, (moved, *node.args[1:]), node.kwargs)
            moved.meta, scaled.meta = dict(view.meta), node.meta | {"val": view.meta["val"]}
            view.replace_all_uses_with(scaled)
            graph.erase_node(view)
            graph.erase_node(node)
            node = scaled


def _add_values(module: fx.GraphModule) -> None:
    """Give the attributes of a graph fake values, as its other nodes have."""
    values: Sequence[Any] = [node.meta["val"] for node in module.graph.nodes if "val" in node.meta]
    mode = torch._guards.detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])
    if mode is None:
        return
    for node in module.graph.find_nodes(op="get_attr"):
        value = attribute(module, node.target)
        if isinstance(value, torch.Tensor):
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
