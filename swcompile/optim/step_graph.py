"""The optimizer's step as a graph: emitted for the buckets at hand, run as it is on the CPU, lowered on CUDA.

In an emitted graph a placeholder may stand for a list of tensors: a bucket of hundreds is one node. `lower_to_tables`
replaces the lists by tables of addresses, so that the host passes a handful of tensors.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swcompile.kernels.stable_adamw import (
    SECOND_MOMENT_RATIOS,
    SECOND_MOMENT_RATIOS_OF_TABLE,
    STABLE_ADAMW_UPDATE,
    STABLE_ADAMW_UPDATE_OF_TABLE,
)
from swcompile.kernels.tensor_table import TensorTable

OPTIONS = ("lr", "beta1", "beta2", "eps", "clipped_decay", "free_decay", "clip_threshold", "beta2_warmup", "scale")
"""Columns of `options`, the numbers of each parameter group.

The learning rate after clipping is multiplied by `clipped_decay`, the one before by `free_decay`. Where `beta2_warmup` is
above 0, β̂2 is ``1 - t^-beta2_warmup``. Gradients are multiplied by `scale`.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that share their launches: those of one device with the same dtypes and the same sharding."""

    name: str
    """Before the names of its inputs in the graph."""
    num_tensors: int
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    is_aligned: bool
    """Whether all tensors begin at multiples of 16 bytes."""
    has_remainders: bool
    """Whether bfloat16 parameters carry the lower halves of float32 ones."""
    process_groups: tuple[str, ...] = ()
    """Over which each tensor is sharded, one after the other."""


def emit_step(buckets: Sequence[Bucket], *, num_groups: int, with_ratios: bool) -> fx.Graph:
    """StableAdamW's step (arXiv 2304.13013, Algorithm 2) for the given buckets.

    Inputs, of T tensors in a bucket and G parameter groups:

    * ``options`` [G, len(OPTIONS)] float64; ``grad_scale`` and ``found_inf`` [1], of `torch.amp.GradScaler`;
    * of a bucket ``b``: ``b_groups`` [T] int64, its tensors' parameter groups; ``b_sizes`` [T] float64, their elements
      over all shards; ``b_present`` [T] bool, whether there is a gradient; ``b_steps`` and ``b_skipped`` [T] float32,
      updated; the lists ``b_params``, ``b_grads``, ``b_exp_avgs``, ``b_exp_avg_sqs`` and ``b_remainders``.

    Outputs, a pair a bucket: [T] float64, the RMS of ``g / sqrt(u)``, and [T] float32, the squared norm of the update.

    Args:
        buckets: all on one device.
        num_groups: parameter groups, G.
        with_ratios: whether some tensor is clipped, or skipped where its gradient is not finite. Without, the step is
            AdamW's, the RMS is NaN, and no gradient is read twice.
    """
    graph = _Emitter(buckets).emit(with_ratios)
    _note_values(graph, buckets, num_groups)
    return graph


Value = Any
"""A value of the graph while it is emitted: a proxy that takes a tensor's operations."""


class _Emitter:
    def __init__(self, buckets: Sequence[Bucket]):
        self.buckets = buckets
        self.graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)

    def emit(self, with_ratios: bool) -> fx.Graph:
        shared = {name: self.input(name) for name in ("options", "grad_scale", "found_inf")}
        inputs = [self.inputs_of(bucket) for bucket in self.buckets]
        numbers = [self.numbers_of(own, shared) for own in inputs]
        ratios: list[Any] = [None] * len(self.buckets)
        if with_ratios:
            ratios = [self.ratios(*of) for of in zip(self.buckets, inputs, numbers, strict=True)]
            self.add_shards(ratios)
        outputs = [self.update(*of, shared) for of in zip(self.buckets, inputs, numbers, ratios, strict=True)]
        self.graph.output(tuple((rms.node, changes.node) for rms, changes in outputs))
        self.graph.lint()
        return self.graph

    def input(self, name: str, bucket: Bucket | None = None) -> Value:
        node = self.graph.placeholder(name)
        node.meta["bucket"], node.meta["input"] = bucket, name
        return fx.Proxy(node, self.tracer)

    def call(self, name: str, target: Any, *args: Any) -> Value:
        return self.tracer.create_proxy("call_function", target, args, {}, name=name)

    def inputs_of(self, bucket: Bucket) -> dict[str, Value]:
        names = ["groups", "sizes", "present", "steps", "skipped", "params", "grads", "exp_avgs", "exp_avg_sqs"]
        if bucket.has_remainders:
            names.append("remainders")
        return {name: self.input(f"{bucket.name}_{name}", bucket) for name in names}

    def numbers_of(self, own: dict[str, Value], shared: dict[str, Value]) -> dict[str, Value]:
        """Of each tensor: its group's options, and the weights of the new values in its moments."""
        columns = shared["options"].index_select(0, own["groups"]).unbind(1)
        numbers = {name: columns[index] for index, name in enumerate(OPTIONS)}
        t = own["steps"].double() + 1
        beta1, beta2, warmup = numbers["beta1"], numbers["beta2"], numbers["beta2_warmup"]
        # De-biased as they are, so that the moments need no correction: 1 - β̂ = (1 - β) / (1 - β^t).
        numbers["weights1"] = ((1 - beta1) / (1 - beta1**t)).float()
        numbers["weights2"] = torch.where(warmup > 0, t**-warmup, (1 - beta2) / (1 - beta2**t)).float()
        numbers["scale"] = (numbers["scale"] / shared["grad_scale"]).float()
        numbers["eps"] = numbers["eps"].float()
        return numbers

    def ratios(self, bucket: Bucket, own: dict[str, Value], numbers: dict[str, Value]) -> Value:
        coefficients = [numbers[name] for name in ("weights2", "scale", "eps")]
        return self.call(
            f"{bucket.name}_ratios", SECOND_MOMENT_RATIOS, *coefficients, own["grads"], own["exp_avg_sqs"]
        )

    def add_shards(self, ratios: list[Any]) -> None:
        """Sum over the shards, with one collective for all buckets that are sharded alike."""
        for groups in dict.fromkeys(bucket.process_groups for bucket in self.buckets):
            alike = [index for index, bucket in enumerate(self.buckets) if bucket.process_groups == groups]
            if not groups:
                continue
            together = torch.cat([ratios[index] for index in alike])
            for group in groups:
                reduced = self.call("all_reduce", torch.ops._c10d_functional.all_reduce.default, together, "sum", group)
                together = self.call("all_reduced", torch.ops._c10d_functional.wait_tensor.default, reduced)
            parts = together.split([self.buckets[index].num_tensors for index in alike])
            for position, index in enumerate(alike):
                ratios[index] = parts[position]

    def update(
        self,
        bucket: Bucket,
        own: dict[str, Value],
        numbers: dict[str, Value],
        ratios: Value | None,
        shared: dict[str, Value],
    ) -> tuple[Value, Value]:
        takes, rates = own["present"] & (shared["found_inf"] == 0), numbers["lr"]
        if ratios is None:
            rms = torch.full_like(rates, torch.nan)
        else:
            rms = (ratios / own["sizes"]).sqrt()
            takes = takes & rms.isfinite()
            rates = rates / (rms / numbers["clip_threshold"]).clamp(min=1)
        decays = numbers["clipped_decay"] * rates + numbers["free_decay"] * numbers["lr"]
        coefficients = [numbers[name] for name in ("weights1", "weights2", "scale", "eps")]
        lists = [own[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
        changes = self.call(
            f"{bucket.name}_update",
            STABLE_ADAMW_UPDATE,
            takes,
            rates.float(),
            decays.float(),
            *coefficients,
            *lists,
            own.get("remainders", []),
        )
        own["steps"].add_(takes)
        own["skipped"].add_(own["present"] & ~takes)
        return rms, changes


def lower_to_tables(graph: fx.Graph) -> fx.Graph:
    """A copy of an emitted graph in which each bucket's lists are one table of addresses.

    The lists' inputs give way to ``b_addresses``, ``b_num_elements``, ``b_chunks`` and ``b_first_chunks``, the fields of
    `TensorTable`.
    """
    lowered, values = fx.Graph(), dict[fx.Node, fx.Node]()
    lowered.output(lowered.graph_copy(graph, values))
    for node, copied in values.items():
        copied.meta = dict(node.meta)
    tables: dict[str, list[fx.Node]] = {}
    for node in list(lowered.nodes):
        if node.target not in (SECOND_MOMENT_RATIOS, STABLE_ADAMW_UPDATE):
            continue
        is_update = node.target is STABLE_ADAMW_UPDATE
        num_coefficients = 7 if is_update else 3
        bucket: Bucket = node.args[num_coefficients].meta["bucket"]
        if bucket.name not in tables:
            with lowered.inserting_before(next(iter(lowered.nodes))):
                tables[bucket.name] = [_table_input(lowered, bucket, field) for field in TensorTable._fields]
        facts: list[Any] = [bucket.grad_dtype, bucket.is_aligned]
        if is_update:
            facts = [bucket.param_dtype, *facts, bucket.has_remainders]
        node.args = (*node.args[:num_coefficients], *tables[bucket.name], *facts)
        node.target = STABLE_ADAMW_UPDATE_OF_TABLE if is_update else SECOND_MOMENT_RATIOS_OF_TABLE
    for node in reversed(list(_lists(lowered))):
        lowered.erase_node(node)
    lowered.lint()
    return lowered


def _table_input(graph: fx.Graph, bucket: Bucket, field: str) -> fx.Node:
    node = graph.placeholder(name := f"{bucket.name}_{field}")
    node.meta["bucket"], node.meta["input"] = bucket, name
    return node


def _lists(graph: fx.Graph) -> Iterable[fx.Node]:
    return (node for node in graph.find_nodes(op="placeholder") if node.name.endswith(tuple(_LISTS)))


_LISTS = ("_params", "_grads", "_exp_avgs", "_exp_avg_sqs", "_remainders")
_DTYPES = {"groups": torch.int64, "sizes": torch.float64, "present": torch.bool}


def _note_values(graph: fx.Graph, buckets: Sequence[Bucket], num_groups: int) -> None:
    """Give each node its value's shape and dtype, in ``meta["val"]``; a list says what it is a list of."""
    with FakeTensorMode():
        examples: dict[str, Any] = {
            "options": torch.empty(num_groups, len(OPTIONS), dtype=torch.float64),
            "grad_scale": torch.empty(1),
            "found_inf": torch.empty(1),
        }
        for bucket in buckets:
            for node in graph.find_nodes(op="placeholder"):
                if node.meta["bucket"] is bucket:
                    dtype = _DTYPES.get(node.name.removeprefix(f"{bucket.name}_"), torch.float32)
                    example = torch.empty(bucket.num_tensors, dtype=dtype)
                    examples[node.name] = [example] if node in set(_lists(graph)) else example
        names = [node.name for node in graph.find_nodes(op="placeholder")]
        _NoteValues(fx.GraphModule(nn.Module(), graph)).run(*(examples[name] for name in names))
    for node in _lists(graph):
        bucket = node.meta["bucket"]
        dtypes = {"params": bucket.param_dtype, "grads": bucket.grad_dtype, "remainders": torch.int16}
        dtype = dtypes.get(node.name.removeprefix(f"{bucket.name}_"), torch.float32)
        node.meta["val"] = f"{bucket.num_tensors} x {str(dtype).removeprefix('torch.')}"


class _NoteValues(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value
