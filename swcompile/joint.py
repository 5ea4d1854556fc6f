"""Where Inductor and the passes meet: the hook on the joint graph, and tracing a joint graph without compiling it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from swcompile import graph as facts
from swcompile.graph_pass import GraphPass
from swcompile.pipeline import Pass, run_passes
from swcompile.recipe import OPTIONS, Recipe, Role, check_options, closest, make_recipe
from swcompile.report import Decision


class StrictError(ValueError):
    """A matmul that was asked for could not be rewritten, and the recipe is strict."""


class JointPass(GraphPass):
    """Runs passes on each joint (or inference) graph that Inductor makes of one Dynamo graph.

    Args:
        passes: what to run.
        names: index among the graph's inputs -> qualified name, for the parameters.
        identity: what decides on the result besides the passes, their options and `names`.
        before: what the user has hooked in at the same place (`GraphPass`).
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
        identity = repr((identity, sorted(names.items())))
        super().__init__(passes, hook="joint_custom_pre_pass", identity=identity, before=before)
        self.names = names
        self.strict = strict
        self.on_decisions = on_decisions

    def run(self, graph: fx.Graph) -> None:
        """Run the passes on a graph, in place, and tell what they decided."""
        facts.name_parameters(graph, self.names)
        decisions = run_passes(graph, self.passes)
        if self.on_decisions:
            self.on_decisions(decisions)
        if self.strict:
            raise_violations(decisions)


def raise_violations(decisions: Sequence[Decision]) -> None:
    """Raise `StrictError` if a matmul (or a stabiliser's site) that was asked for is not rewritten."""
    violations = [d for d in decisions if d.violation]
    if violations:
        lines = "\n".join(f"  {d.parameter or d.node} ({d.role.value} {d.shape}): {d.reason}" for d in violations)
        what = "matmuls" if isinstance(violations[0].role, Role) else "sites"
        raise StrictError(
            f"{len(violations)} {what} that were asked for are not rewritten:\n{lines}\n"
            "Exclude them, or leave strict out."
        )


def read_options(options: Mapping[str, Any], mode: str | None = None) -> tuple[Recipe, dict[str, Any]]:
    """(recipe, Inductor's config patches) from the options of `torch.compile`.

    Raises:
        ValueError: an unknown option, recipe or mode, naming the closest legal one; a value of the wrong type;
            ``micro_batches`` with CUDA graphs.
    """
    rest = dict(options)
    check_options(rest, (*OPTIONS, "mode", "inductor"))
    mode, inductor = rest.pop("mode", mode), rest.pop("inductor", None)
    inductor = {} if inductor is None else inductor
    if not isinstance(inductor, Mapping):
        raise ValueError(f"option 'inductor' is {inductor!r}; it takes a dict of Inductor's own options")  # noqa: TRY004
    for option in map(str, inductor):
        try:
            attrgetter(option)(inductor_config)  # its dict of options lacks those with a second name
        except AttributeError as error:
            nearest = closest(option, inductor_config.get_config_copy())
            raise ValueError(f"unknown option {option!r} of Inductor; did you mean {nearest!r}?") from error
    modes = list_mode_options()
    if mode is not None and mode not in list(modes):
        raise ValueError(f"unknown mode {mode!r}; did you mean {closest(str(mode), modes)!r}?")
    recipe, patches = make_recipe(rest), {**(list_mode_options(mode) if mode else {}), **inductor}
    if recipe.micro_batches > 1 and patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs):
        raise ValueError(
            "option 'micro_batches' keeps quantised weights from one call to the next, but a CUDA graph (mode "
            "'reduce-overhead' or 'max-autotune') makes them in every call: leave out one of the two"
        )
    return recipe, patches


def parameter_names(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """Index among a Dynamo graph's inputs -> qualified name, for those that are parameters.

    Names come from Dynamo's sources (``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``) and start
    below the variable that holds the module. Where two parameters would get one name (two layers ``body`` and
    ``head`` that a function calls), all names below their variables start with the variable.
    """
    depths = _depths(gm)
    names = {}
    for index, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if isinstance(value, nn.Parameter):
            origin = _origin(node)
            names[index] = origin.name(depths.get(origin.root, 0)) if origin else node.name
    assert len(set(names.values())) == len(names), f"two parameters have one name: {sorted(names.values())}"
    return names


class _Origin(NamedTuple):
    """Where an input comes from: a variable, and the way from there."""

    source: str
    """Dynamo's expression for the input."""
    root: str
    """Dynamo's expression for the variable, the start of `source`."""
    variables: tuple[str, ...]
    """The local or global variable; of one in a function's closure, that of the function first."""
    path: str
    """From the variable to the input: attributes, keys and indices, without the dicts in which modules keep things."""

    def name(self, depth: int) -> str:
        """The path, below so many variables. A variable that is the parameter itself is its name."""
        depth = depth if self.path else max(depth, 1)
        return ".".join([*self.variables[len(self.variables) - depth :], *filter(None, [self.path])])


_ROOT = re.compile(
    r"(?:G\['__import_\w+'\]\.(\w+)|[LG]\['(\w+)'\])(?:\.__closure__\[\d+\]\.cell_contents|\.__self__)*"
)
_CELL = re.compile(r"\.__closure__\[(\d+)\]\.cell_contents")
_STEP = re.compile(
    r"\.(?:_modules|_parameters|_buffers|__dict__)\b|(?:\[|, )'([^']+)'|(?:\[|, )(\d+)|\.([^\W\d]\w*)"
)


def _origin(node: fx.Node) -> _Origin | None:
    """Where an input comes from, if Dynamo knows."""
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    root = _ROOT.search(source)
    if root is None:
        return None
    variables = [root[1] or root[2]]
    for cell in _CELL.finditer(root[0]):
        function = _value_of(root[0][: cell.start()])
        variables += [function.__code__.co_freevars[int(cell[1])]] if function is not None else []
    steps = ("".join(found.groups("")) for found in _STEP.finditer(source, root.end()))
    return _Origin(source, root[0], tuple(variables), ".".join(step for step in steps if step))


def _depths(gm: fx.GraphModule) -> dict[str, int]:
    """Expression of a variable -> how many variables the names below it start with, so that no two names are equal."""
    graph = _dynamo_graph() if _is_bucket(gm) else gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    parameters = [node for node in placeholders if isinstance(node.meta.get("example_value"), nn.Parameter)]
    origins = [origin for node in parameters if (origin := _origin(node))]
    depths = dict.fromkeys((origin.root for origin in origins), 0)
    for _ in range(max((len(origin.variables) for origin in origins), default=0)):
        count = Counter(origin.name(depths[origin.root]) for origin in origins)
        colliding = {o.root: len(o.variables) for o in origins if count[o.name(depths[o.root])] > 1}
        depths |= {root: min(depths[root] + 1, most) for root, most in colliding.items()}
    return depths


def is_buffer(node: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a module's buffer."""
    origin = _origin(node)
    return origin is not None and "._buffers[" in origin.source


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

    A module whose parameters are among the graph's inputs is seen whole, also where the graph, of one of its methods,
    uses a part. It is not all of the model before and after a graph break. Of a DDP bucket the graph that it was cut
    from counts.
    """
    is_bucket = _is_bucket(gm)
    nodes = (_dynamo_graph() if is_bucket else gm.graph).find_nodes(op="placeholder")
    origins = [origin for node in nodes if (origin := _origin(node))]
    depths = _depths(gm)
    known = set(names)
    for origin in origins:
        if is_bucket:
            known.add(origin.name(depths.get(origin.root, 0)))
    for origin in {origin.root: origin for origin in origins}.values():
        module = _value_of(origin.root)
        if isinstance(module, nn.Module):
            below = (origin._replace(path=name) for name, _ in module.named_parameters(remove_duplicate=False))
            known.update(parameter.name(depths.get(origin.root, 0)) for parameter in below)
    if is_bucket:
        return sorted(known), True
    reason = getattr(gm, "compile_subgraph_reason", None)
    resumes = reason is not None and InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume")
    return sorted(known), not resumes and (reason is None or not reason.graph_break)


def _value_of(expression: str) -> Any:
    """The value of a variable of the function that Dynamo traces, by Dynamo's expression; None where it traces none."""
    try:
        frame = InstructionTranslator.current_tx().output.root_tx
        return eval(expression, {"L": frame.f_locals, "G": frame.f_globals})  # as guards do
    except (AttributeError, KeyError, ValueError):  # no frame, a variable that Dynamo made, an empty cell
        return None


def _is_bucket(gm: fx.GraphModule) -> bool:
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and "DDPOptimizer" in reason.reason


def _dynamo_graph() -> fx.Graph:
    """The graph that Dynamo is compiling now, whole where DDP's buckets have cut it."""
    return InstructionTranslator.current_tx().output.graph


def trace_joint(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    hook: Callable[[fx.Graph], None],
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Take a Dynamo graph through AOTAutograd as Inductor does, with `hook` on the joint graph, and no further.

    Args:
        gm: the graph.
        inputs: what it takes.
        hook: called with each joint graph.
        options: of Inductor. Only the one that the cost rule reads is applied.

    Returns:
        A callable that runs the graph, gradients included.
    """
    from torch._inductor.compile_fx import compile_fx  # as in the backend

    patches: dict[str, Any] = {key: value for key, value in (options or {}).items() if key == "triton.cudagraphs"}
    # The graphs of control flow inside are joint graphs of their own, and come first.
    is_one = not any(isinstance(part, fx.GraphModule) for part in gm.modules() if part is not gm)

    def hook_and_stop(graph: fx.Graph) -> None:
        hook(graph)
        raise _Seen

    patches["joint_custom_pre_pass"] = hook_and_stop if is_one else hook
    with functorch_config.patch(enable_autograd_cache=False):  # else a warm cache would skip the hook
        try:
            return compile_fx(gm, inputs, inner_compile=_run_node_by_node, config_patches=patches)
        except _Seen:
            return gm.forward


class _Seen(BaseException):
    """The only joint graph has been seen: what Inductor would do with it, to partition it first, is nobody's wish."""


def _run_node_by_node(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
    return make_boxed_func(gm.forward)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that shares nothing but the values in ``meta``."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta = dict(graph.output_node().meta)
    return copied
