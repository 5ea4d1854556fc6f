"""Where Inductor and the passes meet: the hook on the joint graph, and tracing a joint graph without compiling it."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from swcompile import graph as facts
from swcompile.pipeline import Pass, run_passes, source_fingerprint
from swcompile.report import Decision


class StrictError(ValueError):
    """A matmul that was asked for could not be rewritten, and the recipe is strict."""


class JointPass(CustomGraphPass):
    """Runs passes on each joint (or inference) graph that Inductor makes of one Dynamo graph.

    Args:
        passes: what to run.
        names: index among the graph's inputs -> qualified name, for the parameters.
        identity: everything that decides what the passes do, but for their source and `names`.
        strict: raise `StrictError` for a matmul that was asked for and is not rewritten.
        on_decisions: called with the decisions about each graph.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        names: dict[int, str],
        identity: str = "",
        strict: bool = False,
        on_decisions: Callable[[list[Decision]], None] | None = None,
    ):
        self.passes = list(passes)
        self.names = names
        self.identity = identity
        self.strict = strict
        self.on_decisions = on_decisions
        self.before = inductor_config.joint_custom_pre_pass
        """A pass that the user has hooked in: it runs first."""

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.before if isinstance(self.before, (list, tuple)) else (self.before,):
            if other is not None:
                other(graph)
        facts.name_parameters(graph, self.names)
        decisions = run_passes(graph, self.passes)
        if self.on_decisions:
            self.on_decisions(decisions)
        if self.strict:
            raise_violations(decisions)

    def uuid(self) -> str | None:
        """What stands for this pass in Inductor's cache key; None (no caching) if a user's pass has no uuid."""
        others = self.before if isinstance(self.before, (list, tuple)) else (self.before,)
        before = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in others if other]
        if None in before:
            return None
        key = repr((source_fingerprint(), self.identity, sorted(self.names.items()), before))
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
            source = getattr(node.meta.get("grapharg"), "source", None)
            names[index] = node.name if source is None else _qualified(source.name)
    return names


def is_whole(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph ends where its function returns: not at a graph break, nor at the edge of a DDP bucket."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return True
    if "DDPOptimizer" not in reason.reason:
        return False
    whole = InstructionTranslator.current_tx().output.graph  # of which DDP's buckets made this graph a piece
    values = [
        {id(node.meta.get("example_value")) for node in graph.output_node().all_input_nodes}
        for graph in (whole, gm.graph)
    ]
    return not values[0].isdisjoint(values[1])


def _qualified(source: str) -> str:
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
