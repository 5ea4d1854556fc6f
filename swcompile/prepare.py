"""Stabilisers in a live model: `prepare` inserts them, `strip` takes them out, `merge_layer_scale` folds them in."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from swcompile.attention import HeadSplit, attention_places, attentions
from swcompile.forward import ForwardGraph, called_in, capture_forward, path_of, producing_call
from swcompile.graph_forward import GraphForward
from swcompile.hooks import NormalizeFeatures, SiteHook, StayInPython
from swcompile.joint import raise_violations
from swcompile.passes.insert_layer_scale import insert_layer_scale
from swcompile.passes.insert_qk_layernorm import insert_qk_layernorm
from swcompile.pipeline import Pass, PassResult
from swcompile.recipe import Stabilizer, unmatched
from swcompile.report import Decision, Report
from swcompile.residual import Merge, branch_places, merges_of, residual_branches
from swcompile.stabilizers import LayerScale, LayerScaleOptions, QKLayernormOptions, QKNorm, read_options

_MARK = "_swcompile_prepared"


@dataclasses.dataclass(kw_only=True)
class _Prepared:
    """What `prepare` did to a model, kept with it."""

    report: Report
    places: list[str]
    """The new modules."""
    merges: dict[str, Merge | str]
    """Layer-scale -> the linear layer that it can be folded into, or why it cannot."""
    encoders: list[Any]
    """`nn.TransformerEncoder` that would turn padded batches into nested tensors."""


@dataclasses.dataclass(kw_only=True)
class _Site:
    """One new module and how the model comes to call it."""

    place: str
    node: str
    """What decisions call the site."""
    owner: str
    """The call in whose own forward the site is."""
    hooked: str | None
    """The call of the submodule whose output the new module is applied to; None if there is no such."""
    hook: SiteHook


def prepare(
    model: nn.Module,
    *inputs: Any,
    layer_scale: bool | Mapping[str, Any] | LayerScaleOptions = False,
    qk_layernorm: bool | Mapping[str, Any] | QKLayernormOptions = False,
    strict: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Insert zero-init layer-scale on every residual branch, and layer norm on attention's queries and keys.

    Sites are found in the graph of the forward, which is traced for the example inputs and not computed. The new
    parameters are registered beside the layers that they belong to (``layers.0.mlp_layer_scale.gamma``,
    ``layers.0.self_attn.q_norm.weight``); every other name in the state dict stays. Call it before the optimizer is
    built, before FSDP or DDP wraps the model and before `torch.compile`. The model works as before in every other
    respect: training and evaluation, other sizes, caches for generation, checkpointing.

    A norm or a layer-scale is applied to the output of the submodule that makes the value. Where no submodule does
    (``nn.MultiheadAttention``, matmuls written out), the forward of the module around it is replaced by its own
    graph, which the report says; a call of another kind than the examples is traced when it first comes, which under ``fullgraph=True`` has to be
    before it is compiled. Such a graph has the parameters of its submodules, whatever they are by then, but calls no hook
    and no other forward that they are given later, and it cannot write to its arguments (a cache of keys and values).

    Args:
        model: the model; changed in place.
        inputs: what to call it with.
        layer_scale: True, or options: `swcompile.LayerScaleOptions` or a dict of its fields.
        qk_layernorm: True, or options: `swcompile.QKLayernormOptions` or a dict of its fields.
        strict: raise if an included site cannot be taken, or if a pattern matches no site.
        kwargs: keyword arguments to call the model with.

    Returns:
        The model. `swcompile.prepared` gives the report.

    Raises:
        ValueError: neither is asked for; an unknown option; no site was found; the forward cannot be traced; the model
            is prepared already. `swcompile.StrictError` with ``strict``. The model is then as it was.
    """
    wanted: dict[Stabilizer, Any] = {
        Stabilizer.LAYER_SCALE: read_options("layer_scale", LayerScaleOptions, layer_scale),
        Stabilizer.QK_LAYERNORM: read_options("qk_layernorm", QKLayernormOptions, qk_layernorm),
    }
    wanted = {kind: options for kind, options in wanted.items() if options is not None}
    if not wanted:
        raise ValueError("nothing to insert: pass layer_scale=True, qk_layernorm=True, or both")
    for path, module in model.named_modules():
        if _MARK in module.__dict__:
            raise ValueError(f"{path or type(model).__name__} is prepared already; swcompile.strip(model) undoes it")
        if _is_changed(module):
            raise ValueError(
                f"{path or type(model).__name__} is prepared already, as a part of a larger model; swcompile.strip undoes that"
            )
    captured = capture_forward(model, *inputs, kwargs=kwargs)
    found, merges = _sites(captured)
    decisions = captured.run_passes(_passes(wanted))
    _check(model, wanted, decisions, strict)

    inserted = {name: module for name, module in captured.module.named_modules() if isinstance(module, LayerScale | QKNorm)}
    taken = [site for site in found if site.place in inserted]
    for place in inserted:
        owner, _, name = place.rpartition(".")
        if hasattr(model.get_submodule(owner), name):
            raise ValueError(f"{place} is the name of something else already; exclude {owner or 'the model'}")
    for place, module in inserted.items():
        model.set_submodule(place, module)
    encoders: list[Any] = [module for module in model.modules() if getattr(module, "use_nested_tensor", False)]
    for encoder in encoders:
        encoder.use_nested_tensor = False  # torch.nn's fused path for padded batches, whose tensors no norm takes
    merges = {place: merge for place, merge in merges.items() if place in inserted}
    state = _Prepared(report=Report("prepare", decisions), places=list(inserted), merges=merges, encoders=encoders)
    setattr(model, _MARK, state)
    try:
        by_graph = _install(model, captured.graph, taken, wanted)
        inside = {site.node for site in taken if path_of(site.owner) in by_graph}
        told = [
            dataclasses.replace(d, reason=f"{d.reason}, in its own graph") if d.rewritten and d.node in inside else d
            for d in decisions
        ]
        state.report = Report("prepare", told)
        if by_graph:
            _run_once(model, inputs, kwargs or {})
    except BaseException:
        strip(model)
        raise
    return model


def prepared(model: nn.Module) -> Report:
    """The report of `prepare`: every site, whether it was taken, and why not.

    Raises:
        ValueError: the model is not prepared.
    """
    return _prepared(model).report


def strip(model: nn.Module) -> nn.Module:
    """Take out what `prepare` inserted: the model computes what it did before, with its parameters as they are now.

    What `merge_layer_scale` has folded into weights stays in them.

    Args:
        model: a prepared model; changed in place.

    Raises:
        ValueError: the model is not prepared.
    """
    state = _prepared(model)
    for encoder in state.encoders:
        encoder.use_nested_tensor = True
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, SiteHook | StayInPython):
                del module._forward_hooks[key]
        if isinstance(forward := module.__dict__.get("forward"), GraphForward):
            forward.remove()
    for place in state.places:
        owner, _, name = place.rpartition(".")
        delattr(model.get_submodule(owner), name)
    delattr(model, _MARK)
    return model


@torch.no_grad()
def merge_layer_scale(model: nn.Module) -> Report:
    """Fold each gamma into the last linear layer of its branch, for inference: ``gamma * (W x + b)``.

    Args:
        model: a prepared model; changed in place. Where a gamma cannot be folded in, its layer-scale stays.

    Returns:
        One line a layer-scale: where it went, or why it stays.

    Raises:
        ValueError: the model is not prepared, or has no layer-scale (any more).
    """
    state = _prepared(model)
    layers = {place: layer for place in state.merges if isinstance(layer := model.get_submodule(place), LayerScale)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer-scale to merge")
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    decisions = []
    for place, layer_scale in layers.items():
        merge, gamma = state.merges[place], layer_scale.gamma
        if isinstance(merge, Merge):  # a layer that the example inputs do not reach may share its parameters
            own = [model.get_parameter(name) for name in (merge.weight, merge.bias) if name is not None]
            merge = next((f"{' and '.join(names[p])} are one parameter" for p in own if len(names[p]) > 1), merge)
        if isinstance(merge, Merge):
            weight = model.get_parameter(merge.weight)
            weight.copy_(weight * (gamma.unsqueeze(1) if merge.feature_dim == 0 else gamma))
            if merge.bias is not None:
                model.get_parameter(merge.bias).mul_(gamma)
            model.set_submodule(place, nn.Identity())
        decisions.append(
            Decision(
                node=place,
                role=Stabilizer.LAYER_SCALE,
                parameter=place,
                shape=tuple(gamma.shape),
                dtype=str(gamma.dtype).removeprefix("torch."),
                rewritten=isinstance(merge, Merge),
                reason=f"folded into {merge.weight}" if isinstance(merge, Merge) else merge,
            )
        )
    return Report("merge_layer_scale", decisions)


def _prepared(model: nn.Module) -> _Prepared:
    state = model.__dict__.get(_MARK)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not prepared; swcompile.prepare does that")
    return state


def _is_changed(module: nn.Module) -> bool:
    hooks = module._forward_hooks.values()
    return isinstance(module.__dict__.get("forward"), GraphForward) or any(isinstance(hook, SiteHook) for hook in hooks)


def _passes(wanted: Mapping[Stabilizer, Any], only: Sequence[str] | None = None) -> list[Pass]:
    passes: dict[Stabilizer, Callable[..., PassResult]] = {
        Stabilizer.LAYER_SCALE: insert_layer_scale,
        Stabilizer.QK_LAYERNORM: insert_qk_layernorm,
    }
    return [partial(passes[kind], options=options, only=only) for kind, options in wanted.items()]


def _check(model: nn.Module, wanted: Mapping[Stabilizer, Any], decisions: Sequence[Decision], strict: bool) -> None:
    """Raise for what the user asked for and does not get."""
    for kind, options in wanted.items():
        names = [d.parameter or "" for d in decisions if d.role is kind]
        what = "residual branch" if kind is Stabilizer.LAYER_SCALE else "attention"
        if not names:
            raise ValueError(f"no {what} was found in the forward of {type(model).__name__}")
        for pattern, nearest in unmatched((*(options.include or ()), *options.exclude), names).items():
            message = f"{kind.value}: pattern {pattern!r} matches no {what}; the closest is {nearest!r}"
            if strict:
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
        if not any(d.rewritten for d in decisions if d.role is kind):
            reasons = "\n".join(f"  {d.parameter or 'the model'}: {d.reason}" for d in decisions if d.role is kind)
            raise ValueError(f"{kind.value} can be inserted nowhere:\n{reasons}")
    if strict:
        raise_violations(decisions)


def _sites(captured: ForwardGraph) -> tuple[list[_Site], dict[str, Merge | str]]:
    """(every new module that the passes can make, where each layer-scale can be folded in)."""
    attending = attentions(captured.graph)
    branches = residual_branches(captured.graph, attending)
    found = []
    for branch, place in zip(branches, branch_places(branches), strict=True):
        hooked = producing_call(captured, reversed(branch.path), branch.add)
        owner, node = called_in(branch.add), branch.end.name
        found.append(_Site(place=place, node=node, owner=owner, hooked=hooked, hook=SiteHook(place)))
    merges = dict(zip((site.place for site in found), merges_of(captured, branches), strict=True))
    for attention, places in zip(attending, attention_places(attending), strict=True):
        for place, split in zip(places, (attention.query, attention.key), strict=True):
            if isinstance(split, HeadSplit):
                hooked = producing_call(captured, split.whole(), attention.node) if split.is_private else None
                owner, node, hook = called_in(attention.node), attention.node.name, NormalizeFeatures(place, split.columns)
                found.append(_Site(place=place, node=node, owner=owner, hooked=hooked, hook=hook))
    return found, merges


def _install(
    model: nn.Module, graph: fx.Graph, taken: Sequence[_Site], wanted: Mapping[Stabilizer, Any]
) -> set[str]:
    """Make the model call its new modules. Returns the modules whose forward was replaced."""
    calls: dict[str, set[str]] = {}
    for node in graph.nodes:
        for call in node.meta.get("calls", ()):
            calls.setdefault(path_of(call), set()).add(call)
    hooked: dict[tuple[str, str], set[str]] = {}
    for site in taken:
        if site.hooked is not None:
            hooked.setdefault((site.place, path_of(site.hooked)), set()).add(site.hooked)
    # A hook acts on every call of its module: each must be a site of the new module, or the graph has to do it.
    by_graph = {
        path_of(site.owner)
        for site in taken
        if site.hooked is None
        or hooked[site.place, path_of(site.hooked)] != calls[path_of(site.hooked)]
    }
    for path in sorted(by_graph):
        owner = model.get_submodule(path)
        places = [site.place.removeprefix(path).removeprefix(".") for site in taken if path_of(site.owner) == path]
        owner.forward = GraphForward(owner, path, partial(_rewrite, wanted=wanted, places=places, path=path))
        owner.register_forward_hook(StayInPython())
    done = set()
    for site in taken:
        if path_of(site.owner) in by_graph or site.place in done:
            continue
        done.add(site.place)
        assert site.hooked is not None
        owner_path, _, name = site.place.rpartition(".")
        site.hook.attach(model.get_submodule(owner_path), name)
        model.get_submodule(path_of(site.hooked)).register_forward_hook(site.hook)
    return by_graph


def _rewrite(captured: ForwardGraph, *, wanted: Mapping[Stabilizer, Any], places: Sequence[str], path: str) -> None:
    """Insert the new modules of one owner into its own graph."""
    free = {kind: dataclasses.replace(options, include=None, exclude=()) for kind, options in wanted.items()}
    captured.run_passes(_passes(free, places))
    inserted = {name for name, new in captured.module.named_modules() if isinstance(new, LayerScale | QKNorm)}
    missing = [place for place in places if place not in inserted]
    if missing:
        reasons = "; ".join(decision.reason for decision in captured.decisions if not decision.rewritten)
        raise ValueError(
            f"{path or 'the model'}: called like this, it has no place for {', '.join(missing)}. {reasons}".strip()
        )


def _run_once(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Call the model in training and in evaluation, so that both are captured; leaves it and the random state be."""
    modes = {module: module.training for module in model.modules()}
    devices = {leaf.device for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_cuda}
    try:
        for training in (True, False):
            with torch.random.fork_rng(sorted(devices, key=str)), _kept_buffers(model), torch.no_grad():
                model.train(training)(*inputs, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
