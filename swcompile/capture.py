"""Look at a model without compiling it: `explain` says what would be rewritten, `capture` gives the joint graph."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors

from swcompile import graph as facts
from swcompile.joint import (
    JointPass,
    copy_graph,
    is_buffer,
    is_whole,
    names_in_sight,
    parameter_names,
    raise_violations,
    read_options,
    trace_joint,
)
from swcompile.passes import joint_passes
from swcompile.pipeline import Pass, format_graph, run_passes
from swcompile.report import Decision, Report


def explain(
    model: Callable[..., Any], *inputs: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Report:
    """What ``torch.compile(model, backend="switchback", options=options)`` would rewrite, and why not the rest.

    Runs the forward once, uncompiled, and leaves parameters, buffers, gradients and random state as they were.

    Args:
        model: the model, or a function that calls one.
        inputs: what to call it with, as in training.
        kwargs: keyword arguments to call it with.
        options: as for the backend: ``recipe``, ``include``, ``exclude``, ``strict``, ``skip_slower``, ``fuse``,
            ``micro_batches``; ``mode`` and ``inductor``, too, as CUDA graphs decide whether the time of launching counts.

    Returns:
        One report over all graphs of the model.

    Raises:
        ValueError: an unknown option; with ``strict``, a pattern that matches no parameter, or a matmul that was
            asked for and cannot be rewritten.
    """
    recipe, patches = read_options(options)
    report = Report(recipe.name, [])
    names: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        known = parameter_names(gm, example_inputs)
        names.update(names_in_sight(gm, known.values())[0])
        passes = joint_passes(recipe, is_whole=is_whole(gm))
        before = patches.get("joint_custom_pre_pass")
        hook = JointPass(passes, names=known, before=before, on_decisions=report.record)
        return trace_joint(gm, example_inputs, hook, patches)

    _call_with(backend, model, inputs, kwargs, fullgraph=False)
    unmatched = recipe.unmatched_patterns(names)
    if recipe.strict and unmatched:
        listed = ", ".join(f"{pattern!r} (closest: {name!r})" for pattern, name in unmatched.items())
        raise ValueError(f"patterns that match no parameter: {listed}")
    report.unmatched = unmatched
    if recipe.strict:
        raise_violations(report.decisions)
    return report


@dataclasses.dataclass(kw_only=True)
class JointGraph:
    """The joint graph of a model's forward and backward, as AOTAutograd gives it to Inductor."""

    module: fx.GraphModule
    inputs: list[Any]
    """What the graph's ``primals`` were when it was captured: parameters, buffers and example inputs."""
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    """What the passes that ran on it decided."""

    @property
    def graph(self) -> fx.Graph:
        """The FX graph; passes rewrite it in place."""
        return self.module.graph

    def run_passes(self, passes: Sequence[Pass]) -> list[Decision]:
        """Run passes on the graph, in place, with the checks of `swcompile.run_passes`."""
        self.decisions = run_passes(self.graph, passes)
        self.module.recompile()
        return self.decisions

    def __call__(self, *tangents: torch.Tensor) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """Run the graph on the captured inputs.

        Args:
            tangents: gradient of each differentiable output; ones where none is given.

        Returns:
            The model's outputs, and each parameter's gradient by name.

        Raises:
            ValueError: another number of tangents than of differentiable outputs.
        """
        wanted = sum(isinstance(node.meta.get("desc"), descriptors.TangentAOTInput) for node in self.graph.nodes)
        if tangents and len(tangents) != wanted:
            raise ValueError(
                f"{len(tangents)} tangents for a graph with {wanted} differentiable outputs; give one for each, or none"
            )
        arguments: list[Any] = []
        given = iter(tangents)
        for node in self.graph.find_nodes(op="placeholder"):
            source = node.meta.get("desc")
            if isinstance(source, descriptors.PlainAOTInput):
                arguments.append(self.inputs[source.idx])
                continue
            if not isinstance(source, descriptors.TangentAOTInput):
                raise TypeError(f"the graph takes {source!r}, which only a compiled model has")
            value = node.meta["val"]
            ones = torch.ones(facts.sizes(node), dtype=value.dtype, device=value.device)
            arguments.append(next(given) if tangents else ones)
        with torch.no_grad():
            results = self.module(*arguments)
        names = {node.meta["desc"].idx: name for node, name in facts.parameters(self.graph).items()}
        outputs, gradients = [], {}
        for value, target in zip(results, self.graph.output_node().meta["desc"], strict=True):
            if isinstance(target, descriptors.PlainAOTOutput):
                outputs.append(value)
            elif not isinstance(target, descriptors.GradAOTOutput):
                continue  # nothing that the model returns: the place of a gradient that an input does not need
            elif isinstance(target.grad_of, descriptors.PlainAOTInput) and target.grad_of.idx in names:
                gradients[names[target.grad_of.idx]] = value
        return outputs, gradients

    def __str__(self) -> str:
        return format_graph(self.graph)


def capture(model: Callable[..., Any], *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> JointGraph:
    """The joint graph of a model, before any pass.

    Under `torch.no_grad`, or where nothing requires a gradient, it is the forward alone.

    Args:
        model: the model; it must trace without a graph break.
        inputs: what to call it with.
        kwargs: keyword arguments to call it with.
    """
    captured: list[JointGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        names = parameter_names(gm, example_inputs)

        def keep(graph: fx.Graph) -> None:
            facts.name_parameters(graph, names)
            assert graph.owning_module is not None
            module = fx.GraphModule(graph.owning_module, copy_graph(graph))
            captured.append(JointGraph(module=module, inputs=list(example_inputs)))

        return trace_joint(gm, example_inputs, keep)

    _call_with(backend, model, inputs, kwargs, fullgraph=True)
    if len(captured) != 1:
        raise ValueError(f"the model made {len(captured)} graphs, and capture needs one")
    return captured[0]


def _call_with(
    backend: Callable[..., Any],
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    fullgraph: bool,
) -> None:
    """Trace and call a model once, and leave no trace of it in the model or in Dynamo's caches."""
    model = getattr(model, "_orig_mod", model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps what it compiled, and which sizes it saw change, with the code object: give it one of our own.
    call.__code__ = call.__code__.replace()
    devices = {value.device for value in torch.utils._pytree.tree_leaves((inputs, kwargs)) if _on_gpu(value)}
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    kept = {id(buffer): (buffer, buffer.clone()) for buffer in buffers}

    def keep_and_trace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
            if is_buffer(node) and id(value) not in kept:  # of a module that a function calls
                kept[id(value)] = value, value.clone()
        return backend(gm, example_inputs)

    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            torch.compile(call, backend=keep_and_trace, fullgraph=fullgraph, dynamic=False)(*inputs, **(kwargs or {}))
        finally:
            _restore(kept.values())


def _on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _restore(kept: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
