"""Where Inductor and the passes meet: the hook on the joint graph, and tracing a joint graph without compiling it."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from swcompile import graph as facts
from swcompile.pipeline import Pass, pass_identity, run_passes, source_fingerprint
from swcompile.report import Decision


class StrictError(ValueError):
    """A matmul that was asked for could not be rewritten, and the recipe is strict."""


class JointPass(CustomGraphPass):
    """Runs passes on each joint (or inference) graph that Inductor makes of one Dynamo graph.

    Args:
        passes: what to run.
        names: index among the graph's inputs -> qualified name, for the parameters.
        identity: what decides on the result besides the passes, their options and `names`.
        before: what the user has hooked in at the same place, a pass or several; it runs first. Left out, it is what
            Inductor's config holds.
        strict: raise `StrictError` for a matmul that was asked for and is not rewritten.
        on_decisions: called with the decisions about each graph.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        names: dict[int, str],
        identity: str = "",
        before: Any = None,
        strict: bool = False,
        on_decisions: Callable[[list[Decision]], None] | None = None,
    ):
        self.passes = list(passes)
        self.names = names
        self.identity = identity
        self.strict = strict
        self.on_decisions = on_decisions
        before = inductor_config.joint_custom_pre_pass if before is None else before
        self.before = [p for p in (before if isinstance(before, (list, tuple)) else [before]) if p is not None]

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.before:
            other(graph)
        facts.name_parameters(graph, self.names)
        decisions = run_passes(graph, self.passes)
        if self.on_decisions:
            self.on_decisions(decisions)
        if self.strict:
            raise_violations(decisions)

    def uuid(self) -> str | None:
        """What stands for this pass in Inductor's cache key; None (no caching) where one of the passes has no identity."""
        before = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.before]
        passes = [pass_identity(rewrite) for rewrite in self.passes]
        if None in before or None in passes:
            return None
        key = repr((source_fingerprint(), passes, self.identity, sorted(self.names.items()), before))
        return hashlib.sha256(key.encode()).hexdigest()


def raise_violations(decisions: Sequence[Decision]) -> None:
    """Raise `StrictError` if a matmul that was asked for is not rewritten."""
    violations = [d for d in decisions if d.violation]
    if violations:
        lines = "\n".join(f"  {d.parameter} ({d.role.value} {d.shape}): {d.reason}" for d in violations)
        raise StrictError(
            f"{len(violations)} matmuls that the recipe asks for are not rewritten:\n{lines}\n"
            "Exclude them, or compile without strict."
        )


def parameter_names(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """Index among a Dynamo graph's inputs -> qualified name, for those that are parameters.

    Names come from Dynamo's sources (``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``); they
    start at the module whose forward Dynamo traces.
    """
    names = {}
    for index, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if isinstance(value, nn.Parameter):
            names[index] = _source_name(node) or node.name
    return names


def is_whole(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph ends where its function returns: not at a graph break, nor at the edge of a DDP bucket."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return True
    if not _is_bucket(gm):
        return False
    values = [
        {id(node.meta.get("example_value")) for node in graph.output_node().all_input_nodes}
        for graph in (_dynamo_graph(), gm.graph)
    ]
    return not values[0].isdisjoint(values[1])


def names_in_sight(gm: fx.GraphModule, names: Iterable[str]) -> tuple[list[str], bool]:
    """(the parameters of the model as far as Dynamo sees it, whether that is all of it).

    It is not all of it before and after a graph break. Of a DDP bucket the graph that it was cut from counts.
    """
    if _is_bucket(gm):
        return [name for node in _dynamo_graph().find_nodes(op="placeholder") if (name := _source_name(node))], True
    reason = getattr(gm, "compile_subgraph_reason", None)
    resumes = reason is not None and InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume")
    return list(names), not resumes and (reason is None or not reason.graph_break)


def _is_bucket(gm: fx.GraphModule) -> bool:
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and "DDPOptimizer" in reason.reason


def _dynamo_graph() -> fx.Graph:
    """The graph that Dynamo is compiling now, whole where DDP's buckets have cut it."""
    return InstructionTranslator.current_tx().output.graph


def _source_name(node: fx.Node) -> str | None:
    """The qualified name of an input, where Dynamo knows where it came from."""
    origin = getattr(node.meta.get("grapharg"), "source", None)
    if origin is None:
        return None
    source = origin.name
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) if parts else re.sub(r"^[LG]\['\w+'\]\.?", "", source)


def trace_joint(gm: fx.GraphModule, inputs: Sequence[Any], hook: Callable[[fx.Graph], None]) -> Any:
    """Take a Dynamo graph through AOTAutograd as Inductor does, with `hook` on the joint graph, and compile nothing.

    Returns:
        A callable that runs the graphs node by node, gradients included.
    """
    patches = {"joint_custom_pre_pass": hook}
    with functorch_config.patch(enable_autograd_cache=False):  # else a warm cache would skip the hook
        return compile_fx(gm, inputs, inner_compile=_run_node_by_node, config_patches=patches)


def _run_node_by_node(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
    return make_boxed_func(gm.forward)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that shares nothing but the values in ``meta``."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta = dict(graph.output_node().meta)
    return copied
