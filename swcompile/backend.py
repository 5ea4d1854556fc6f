"""The ``"switchback"`` backend of `torch.compile`."""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.async_compile import maybe_warm_pool
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from swcompile.graph_pass import LateGraphPass
from swcompile.joint import (
    JointPass,
    copy_graph,
    is_whole,
    names_in_sight,
    parameter_names,
    read_options,
    trace_joint,
)
from swcompile.kernels.launch import require_supported_gpu
from swcompile.kernels.workers import prepare, threads
from swcompile.passes import joint_passes, post_grad_passes
from swcompile.pipeline import log, target_name
from swcompile.rates import rates_identity, start_measuring
from swcompile.recipe import Recipe
from swcompile.report import Decision, Report
from swcompile.symbolic import size_buckets, symbolic_sizes

_LATE = "post_grad_custom_post_pass"
"""Inductor's hook behind its own passes on the forward graph and on the backward graph."""
_reports: deque[Report] = deque(maxlen=64)


def reports() -> list[Report]:
    """Reports of the last 64 graphs that this process compiled with the backend, oldest first.

    A model without graph breaks makes one graph for training and one for inference, and again for each recompile.
    """
    return list(_reports)


def switchback(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile a Dynamo graph by Inductor, with the matmuls of its linear layers in int8.

    Use it by name: ``torch.compile(model, backend="switchback", options={"recipe": "switchback_m"})``.

    Args:
        gm: the graph, from Dynamo.
        example_inputs: its inputs; parameters are `torch.nn.Parameter`.
        options: those of `swcompile.recipe.make_recipe`, and ``mode`` (as `torch.compile` takes one or the other) and
            ``inductor`` (a dict of Inductor's own options).
        mode: one of `torch.compile`'s modes.

    Raises:
        ValueError: an unknown option or recipe; ``micro_batches`` with a mode that uses CUDA graphs; with ``strict``, a
            pattern that matches no parameter of this graph, or a matmul that was asked for and cannot be rewritten.
        RuntimeError: a GPU without int8 tensor cores (compute capability below 8.0).
    """
    from torch._inductor.compile_fx import compile_fx  # 1.5 s to import: not where kernels are compiled

    recipe, patches = read_options(options or {}, mode)
    names = parameter_names(gm, example_inputs)
    _check_patterns(recipe, gm, names)
    devices = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    for device in devices:
        if device.type == "cuda":
            require_supported_gpu(device.index)
            # As Inductor does, but not before its own first kernel: else the next process looks for some of ours elsewhere.
            os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))
            _start_compilers(device)
    passes = joint_passes(recipe, is_whole=is_whole(gm))
    joint_pass = JointPass(
        passes,
        names=names,
        identity=_cost_identity(gm, example_inputs, names, recipe) if recipe.skip_slower and names else "",
        before=patches.get("joint_custom_pre_pass"),
        strict=recipe.strict,
    )
    report = Report(recipe.name, find=_Retrace(gm, example_inputs, joint_pass, patches))
    joint_pass.on_decisions = report.record
    _reports.append(report)
    hooks: dict[str, Any] = {"joint_custom_pre_pass": joint_pass}
    late_passes = post_grad_passes(recipe)
    if late_passes:
        hooks[_LATE] = LateGraphPass(late_passes, hook=_LATE, before=patches.get(_LATE))
    compiled = compile_fx(gm, example_inputs, config_patches=patches | hooks)
    # A summary of what no pass has seen would trace the graph again: left to who asks.
    log.info("%s", report.summary() if report.is_recorded else f"{recipe.name}: from the cache; see swcompile.reports()")
    return compiled


def _start_compilers(device: torch.device) -> None:
    """Start what takes seconds before the first kernel can be compiled, while the graph is traced.

    That is Inductor's processes, as its own backend does, and what Triton finds out in this one.
    """
    maybe_warm_pool()
    threads.submit(prepare, device)


def _cost_identity(gm: fx.GraphModule, inputs: Sequence[Any], names: Iterable[int], recipe: Recipe) -> str:
    """What the cost rule's decisions rest on, besides the graph: the devices' rates, and hints of symbolic sizes.

    Rates that are not known yet will be measured when the rule asks for them; what that takes is compiled meanwhile.
    """
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    measured = devices, _dtypes(gm, devices, names), recipe.scales_by_block
    start_measuring(*measured)
    return repr((rates_identity(*measured), size_buckets(_symbolic(gm, inputs))))


def _symbolic(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with Dynamo's fake tensor in place of a real one some of whose sizes are symbolic in the graph."""
    traced = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    return [fake if symbolic_sizes([fake]) else value for fake, value in zip(traced, inputs, strict=True)]


def _dtypes(gm: fx.GraphModule, devices: Iterable[torch.device], names: Iterable[int]) -> set[torch.dtype]:
    """The dtypes of a Dynamo graph's matmuls, of what it computes from weights (by number of their inputs), and autocast's.

    To measure a device for a dtype takes seconds; norms compute in float32 in models whose matmuls never do, and so do
    matmuls on which no weight has an effect, of rotary embeddings.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    weights = [inputs[number] for number in names]
    nodes = [user for weight in weights for user in weight.users if _rank(weight) > 1 and not _is_lookup(user)]
    for part in gm.modules():
        if isinstance(part, fx.GraphModule):  # the whole, and what is checkpointed
            among = _depending_on(weights, gm.graph) if part is gm else part.graph.nodes
            nodes += [node for node in among if any(name in target_name(node.target) for name in _MATMULS)]
    values = (node.meta.get("example_value") for node in nodes)
    found = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    kinds = {device.type for device in devices}
    return found | {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def _is_lookup(node: fx.Node) -> bool:
    return "embedding" in target_name(node.target)


def _depending_on(sources: Iterable[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """What is computed from any of the nodes, in graph order."""
    reached = set(sources)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return [node for node in graph.nodes if node in reached]


_MATMULS = ("linear", "matmul", "addmm", "bmm", "mm", "einsum", "attention")


def _rank(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _check_patterns(recipe: Recipe, gm: fx.GraphModule, names: Mapping[int, str]) -> None:
    """Patterns that match nothing: an error if strict and this is the whole model, else a warning."""
    if not names:
        return
    known, is_all = names_in_sight(gm, names.values())
    for pattern, nearest in recipe.unmatched_patterns(known).items():
        message = f"pattern {pattern!r} matches no parameter of this graph; the closest is {nearest!r}"
        if recipe.strict and is_all:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


class _Retrace:
    """Finds the decisions about a graph again, for a compilation that came from Inductor's cache and ran no pass.

    Keeps the Dynamo graph, which is small, and of its inputs only what they look like, symbolic sizes included.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: JointPass, options: Mapping[str, Any]
    ):
        self.gm = fx.GraphModule(gm, copy_graph(gm.graph))
        traced = _symbolic(gm, inputs)
        self.inputs = [_describe(value, fake) for value, fake in zip(inputs, traced, strict=True)]
        self.shape_env = next((size.node.shape_env for size in symbolic_sizes(traced)), None)
        self.joint_pass = joint_pass
        self.options = options
        self.grad = torch.is_grad_enabled()
        self.autocast = [
            torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
            for kind in ("cpu", "cuda")
        ]

    def __call__(self) -> list[Decision]:
        decisions: list[Decision] = []
        ran = self.joint_pass
        hook = JointPass(ran.passes, names=ran.names, before=ran.before, on_decisions=decisions.extend)
        with contextlib.ExitStack() as state:
            mode = FakeTensorMode(shape_env=self.shape_env)
            inputs = [value(mode) if callable(value) else value for value in self.inputs]
            state.enter_context(torch.set_grad_enabled(self.grad))
            for autocast in self.autocast:
                state.enter_context(autocast)
            trace_joint(self.gm, inputs, hook, self.options)
        return decisions


def _describe(value: Any, fake: Any) -> Any:
    """A function that makes a fake tensor like `value`, with the sizes of `fake`; or the value, if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = tuple(fake.shape), fake.stride()
    dtype, device, grad = value.dtype, value.device, value.requires_grad
    is_parameter = isinstance(value, torch.nn.Parameter)

    def make(mode: FakeTensorMode) -> torch.Tensor:
        with mode:
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return torch.nn.Parameter(fake, requires_grad=grad) if is_parameter else fake.requires_grad_(grad)

    return make
