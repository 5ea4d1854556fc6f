"""The ``"switchback"`` backend of `torch.compile`."""

import contextlib
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from swcompile.cost import rates_fingerprint
from swcompile.graph import hint
from swcompile.joint import JointPass, copy_graph, is_whole, names_in_sight, parameter_names, trace_joint
from swcompile.kernels.launch import require_supported_gpu
from swcompile.passes import joint_passes
from swcompile.pipeline import Pass, log
from swcompile.recipe import OPTIONS, Recipe, closest, make_recipe
from swcompile.report import Decision, Report

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
        ValueError: an unknown option or recipe; with ``strict``, a pattern that matches no parameter of this graph,
            or a matmul that was asked for and cannot be rewritten.
        RuntimeError: a GPU without int8 tensor cores (compute capability below 8.0).
    """
    recipe, patches = _read_options(options or {}, mode)
    names = parameter_names(gm, example_inputs)
    _check_patterns(recipe, gm, names)
    devices = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    for device in devices:
        if device.type == "cuda":
            require_supported_gpu(device.index)
    passes = joint_passes(recipe, is_whole=is_whole(gm))
    retrace = _Retrace(gm, example_inputs, passes, names)
    report = Report(recipe.name, find=retrace)
    _reports.append(report)
    joint_pass = JointPass(
        passes,
        names=names,
        identity=rates_fingerprint(devices, _dtypes(gm, devices)) if recipe.skip_slower and names else "",
        before=patches.pop("joint_custom_pre_pass", None),
        strict=recipe.strict,
        on_decisions=report.record,
    )
    compiled = compile_fx(gm, example_inputs, config_patches=patches | {"joint_custom_pre_pass": joint_pass})
    # A summary of what no pass has seen would trace the graph again: left to who asks.
    log.info("%s", report.summary() if report.is_recorded else f"{recipe.name}: from the cache; see swcompile.reports()")
    return compiled


def _dtypes(gm: fx.GraphModule, devices: Iterable[torch.device]) -> set[torch.dtype]:
    """The dtypes of a Dynamo graph's values, and autocast's."""
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    found = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    kinds = {device.type for device in devices}
    return found | {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def _read_options(options: Mapping[str, Any], mode: str | None) -> tuple[Recipe, dict[str, Any]]:
    """(recipe, Inductor's config patches)."""
    rest = dict(options)
    mode = rest.pop("mode", mode)
    inductor = rest.pop("inductor", None) or {}
    known = (*OPTIONS, "mode", "inductor")
    for option in rest:
        if option not in known:
            raise ValueError(f"unknown option {option!r}; did you mean {closest(option, known)!r}?")
    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; did you mean {closest(str(mode), modes)!r}?")
    return make_recipe(rest), {**(list_mode_options(mode) if mode else {}), **inductor}


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

    Keeps the Dynamo graph, which is small, and of its inputs only what they look like.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], passes: list[Pass], names: dict[int, str]):
        self.gm = fx.GraphModule(gm, copy_graph(gm.graph))
        self.inputs = [_describe(value) for value in inputs]
        self.passes = passes
        self.names = names
        self.grad = torch.is_grad_enabled()
        self.autocast = [
            torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
            for kind in ("cpu", "cuda")
        ]

    def __call__(self) -> list[Decision]:
        decisions: list[Decision] = []
        hook = JointPass(self.passes, names=self.names, on_decisions=decisions.extend)
        with contextlib.ExitStack() as state:
            mode = FakeTensorMode()
            inputs = [value(mode) if callable(value) else value for value in self.inputs]
            state.enter_context(torch.set_grad_enabled(self.grad))
            for autocast in self.autocast:
                state.enter_context(autocast)
            trace_joint(self.gm, inputs, hook)
        return decisions


def _describe(value: Any) -> Any:
    """A function that makes a fake tensor like `value`, symbolic sizes by their hints; a size's hint; or the value."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [hint(size) for size in value.shape]
    stride = [hint(step) for step in value.stride()]
    dtype, device, grad = value.dtype, value.device, value.requires_grad
    is_parameter = isinstance(value, torch.nn.Parameter)

    def make(mode: FakeTensorMode) -> torch.Tensor:
        with mode:
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return torch.nn.Parameter(fake, requires_grad=grad) if is_parameter else fake.requires_grad_(grad)

    return make
