"""The cost rule: what is predicted from the rates of a device."""

import copy
import dataclasses
import importlib
import math
import random
import statistics
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import Role, cost, make_recipe
from swcompile.backend import _dtypes
from swcompile.calls import Call, Flag, Op
from swcompile.cost import Candidate, Prediction
from swcompile.graph import Matmul, matmuls
from swcompile.joint import parameter_names
from swcompile.kernels.int8 import num_blocks
from swcompile.measuring import DeviceRates
from swcompile.rates import call_seconds
from swcompile.values import is_column_major

RATES = DeviceRates(
    matmul=1e12, output=0.0, quantized_matmul=2e12, quantized_output=0.0, quantize=1e12, quantize_columns=5e11, transpose=8e11, kernel=1e-6,
    matmul_call=1e-6, quantize_call=2e-6,
)  # fmt: skip


class Cast(nn.Module):
    """A weight that reaches its matmul in another dtype, after other steps, in a checkpoint, or beside a matmul of its own dtype."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.weight = how, nn.LayerNorm(8), nn.Parameter(torch.randn(8, 8))
        self.words = nn.Embedding(8, 8)
        self.register_buffer("frequencies", torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "embedding":
            return nn.functional.linear(self.words(x.argmax(-1)).bfloat16(), self.weight.bfloat16())
        if self.how == "rotary":
            angles = self.frequencies @ torch.arange(8.0)[:, None]
            return nn.functional.linear(x, self.weight.bfloat16()) * angles[:, 0].cos().bfloat16()
        x = self.norm(x.float()).bfloat16()
        if self.how == "checkpoint":
            return checkpoint(lambda y: y @ self.weight.bfloat16(), x, use_reentrant=False)
        weight = {"scaled": self.weight * 2, "turned": self.weight.t()}.get(self.how, self.weight)
        return nn.functional.linear(x, weight.bfloat16())


@pytest.mark.parametrize("how", ["cast", "scaled", "turned", "checkpoint", "bfloat16", "rotary", "embedding"])
def test_rates_are_for_the_dtypes_of_matmuls(how: str) -> None:
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        found.append(_dtypes(gm, [torch.device("cpu")], parameter_names(gm, inputs)))
        return gm

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16() if how == "bfloat16" else Cast(how)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 8, dtype=torch.bfloat16))
    assert torch.bfloat16 in found[0]
    assert how not in ("bfloat16", "embedding") or found[0] == {torch.bfloat16}
    assert how != "rotary" or model.frequencies.dtype not in found[0]
    assert _dtypes(torch.fx.symbolic_trace(model), [torch.device("cpu")], []) == set(), "a graph that Dynamo has not made"


def test_an_activation_that_its_own_kernel_quantises_costs_the_bytes_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "device_rates", lambda *of: RATES)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    x = torch.randn(1024, 256)
    speedups = {}
    for fuse in (True, False):
        report = swcompile.explain(model, x, include="*", fuse=fuse)
        speedups[fuse] = {(d.parameter, d.role.value): d.speedup for d in report.decisions if d.speedup is not None}
    assert speedups[True]["0.weight", "output"] == speedups[False]["0.weight", "output"], "an input"
    seconds = 2 * 1024 * 512 * 256 / RATES.matmul + RATES.kernel
    multiply = max(seconds - RATES.kernel, 0) / 2 + RATES.kernel
    rounds = (256 * 512 * (4 + 1) + 4) / RATES.quantize + RATES.kernel
    finds = 256 * 512 * 4 / RATES.quantize + RATES.kernel
    # Who computes the activation writes int8 as well; a gradient that comes in is read.
    roles = {"output": 1024 * (512 + 4) / RATES.quantize, "grad_input": 1024 * (256 * (4 + 1) + 4) / RATES.quantize + RATES.kernel}
    alone = {role: multiply + rounds + rows for role, rows in roles.items()}
    gains = {role: seconds / cost.MIN_SPEEDUP - of_one for role, of_one in alone.items()}
    assert min(gains.values()) > 0
    for role, of_one in alone.items():
        expected = seconds / (of_one + finds * gains[role] / sum(gains.values()))
        assert speedups[True]["2.weight", role] == pytest.approx(expected, rel=1e-6)
    assert speedups[True]["2.weight", "output"] > speedups[False]["2.weight", "output"]


def test_what_is_spared_counts_as_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow matmul, which takes less than writing its activation in float32 does."""
    rates = dataclasses.replace(RATES, matmul=1e15, quantized_matmul=2e15)
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model = nn.Sequential(nn.GELU(), nn.Linear(256, 16)).requires_grad_(False)
    found = {}
    for fuse in (True, False):
        (decision,) = swcompile.explain(model, torch.randn(8192, 256), include="*", recipe="switchback_q", fuse=fuse).decisions
        found[fuse] = decision.speedup
    work = 2 * 8192 * 256 * 16
    original = max(work / rates.matmul, 4 * (8192 * 256 + 256 * 16 + 8192 * 16) / rates.quantize) + rates.kernel
    multiply = max(work / rates.quantized_matmul, (8192 * 256 + 256 * 16 + 4 * 8192 * 16) / rates.quantize) + rates.kernel
    weight = 16 * (256 * (4 + 1) + 4) / rates.quantize + rates.kernel
    written, spared = 8192 * (256 + 4) / rates.quantize, 4 * 8192 * 256 / rates.quantize
    assert multiply + weight + written < spared
    assert found[True] == pytest.approx((original + spared) / (multiply + weight + written), rel=0.02)
    assert found[False] == pytest.approx(original / (multiply + weight + written + spared + rates.kernel), rel=0.02)


def test_a_scale_that_is_not_shared_is_found_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "device_rates", lambda *of: RATES)
    times = {}
    for micro_batches in (1, 2):  # passes of their own look for a weight with its own scale
        x = torch.randn(64, 256, requires_grad=True)
        report = swcompile.explain(nn.Linear(256, 512), x, include="*", recipe="switchback", micro_batches=micro_batches)
        original = 2 * 64 * 512 * 256 / RATES.matmul + RATES.kernel
        times[micro_batches] = [original / d.speedup for d in report.decisions if d.speedup]
    rounding = (256 * 512 * (4 + 1) + 4) / RATES.quantize + RATES.kernel  # two matmuls share the scale, two passes this, too
    assert len(times[1]) == len(times[2]) == 2
    assert sum(times[1]) - sum(times[2]) == pytest.approx(rounding, rel=1e-3)


def test_a_matmul_in_a_dtype_of_its_own_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cost, "device_rates", lambda device, dtype, *of: asked.append(dtype) or RATES)
    model = Cast("rotary")
    swcompile.explain(model, torch.randn(4, 8, dtype=torch.bfloat16), include="*")
    assert set(asked) == {torch.bfloat16}


@pytest.mark.parametrize("field", ["output", "quantized_output"])
def test_short_sums_wait_for_their_results(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, **{field: 1e-11})
    shapes, times = [(1024, 512, 256), (1024, 256, 512)], {}
    for known in (RATES, rates):
        monkeypatch.setattr(cost, "device_rates", lambda *of, known=known: known)
        report = swcompile.explain(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True), include="*")
        for decision, (m, n, k) in zip([d for d in report.decisions if d.speedup], shapes, strict=True):
            assert decision.shape == (m, n, k) and decision.speedup is not None
            original = 2 * m * n * k / rates.matmul + rates.kernel
            times.setdefault(decision.shape, []).append((original, decision.speedup))
    for (m, n, _), ((original, without), (_, speedup)) in times.items():
        results = m * n * 1e-11
        changed = (original + results) / (original / without) if field == "output" else original / (original / without + results)
        assert speedup == pytest.approx(changed, rel=1e-4)


def test_a_sum_over_tokens_has_its_own_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    block_rates = dataclasses.replace(RATES, quantized_matmul=1.5e12)
    monkeypatch.setattr(cost, "device_rates", lambda *of: block_rates if True in of else RATES)
    layer, x = nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True)
    multiply = {rate: 2 * 1024 * 512 * 256 / rate + RATES.kernel for rate in (1.5e12, RATES.quantized_matmul)}

    def quantized(model: nn.Module, **options: Any) -> dict[Role, float]:
        """Seconds in 8 bit."""
        found: dict[Role, float] = {}

        def predict(candidates: Sequence[Candidate], others: Sequence[Matmul]) -> list[Prediction]:
            times = cost._share_out([cost._times(candidate, None) for candidate in candidates])
            found.update({c.matmul.role: of_one.quantized - of_one.spared for c, of_one in zip(candidates, times, strict=True)})
            return [Prediction(2.0)] * len(candidates)

        swcompile.quantize_matmuls(swcompile.capture(model, x).graph, recipe=make_recipe({"include": "*"} | options), predict=predict)
        return found

    twice_read = (1024 * (256 + 512) * (2 * 4 + 1) + 4 * (256 + 512)) / RATES.quantize_columns + 4 * RATES.kernel
    by_columns = quantized(layer, recipe="llm_int8")[Role.GRAD_WEIGHT]
    assert by_columns == pytest.approx(multiply[RATES.quantized_matmul] + twice_read, rel=1e-6)

    # The activation times the scales of tokens, once read; int8 of the gradient, which grad_input reads as well, turned.
    columns = (1024 * (256 * (4 + 1) + 4) + 4 * 256) / RATES.quantize_columns + RATES.kernel
    turned = columns + 1024 * 512 * 2 / RATES.transpose + RATES.kernel
    rows = 1024 * (512 * (4 + 1) + 4) / RATES.quantize + RATES.kernel
    by_tensor = quantized(layer)
    assert by_tensor.keys() == {Role.OUTPUT, Role.GRAD_INPUT}
    by_block = quantized(layer, recipe="switchback_full")
    alone = multiply[1.5e12] + turned
    assert alone < by_block[Role.GRAD_WEIGHT] < alone + 0.5 * rows
    assert sum(by_block.values()) == pytest.approx(sum(by_tensor.values()) + alone, rel=1e-6)

    # What computes the gradient writes int8 for grad_input as well, and no float32 for anybody.
    saved = rows - 1024 * (512 + 4) / RATES.quantize + 1024 * 512 * 4 / RATES.quantize
    fused = quantized(nn.Sequential(layer, nn.GELU()), recipe="switchback_full", fuse=True)
    assert sum(fused.values()) == pytest.approx(sum(by_block.values()) - saved, rel=1e-6)


def test_a_kernel_that_also_computes_what_it_quantises_takes_the_host_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, quantize_call=1e-3)  # all else is less than that
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    speedups = {}
    for fuse in (True, False):
        report = swcompile.explain(model, torch.ones(64, 256), include="*", fuse=fuse, recipe="switchback_q")
        (decision,) = (d for d in report.decisions if (d.parameter, d.role) == ("2.weight", Role.OUTPUT))
        speedups[fuse] = decision.speedup
    between = 2 * (2 * 4 * 64 * (512 + 256) / 1e12 + 1e-6)
    assert speedups[True] == speedups[False] == pytest.approx((2 * 64 * 512 * 256 / 1e12 + 1e-6) / (3.002e-3 - between), rel=1e-6)


def test_a_refusal_by_device_time_comes_before_the_host_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """In int8 the small layers would keep the host busy, and they are left alone: it is no bottleneck for the others."""
    monkeypatch.setattr(cost, "device_rates", lambda *of: dataclasses.replace(RATES, quantize_call=150e-6))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.medium, self.small = (
                nn.Sequential(*[nn.Linear(size, size) for _ in range(number)]) for size, number in ((1024, 4), (256, 4), (16, 40))
            )

        def forward(self, large: torch.Tensor, medium: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
            return self.large(large).sum() + self.medium(medium).sum() + self.small(small).sum()

    inputs = [torch.ones(4096, size) for size in (1024, 256, 16)]
    report = swcompile.explain(Mixed().requires_grad_(False), *inputs, include="*")
    assert [d.rewritten for d in report.decisions] == [d.shape[2] > 16 for d in report.decisions]
    assert not any("time to launch" in d.reason for d in report.decisions)


def traced(model: nn.Module, *inputs: torch.Tensor) -> dict[Role, Matmul]:
    """The matmuls of a model that has one of each role."""
    return {matmul.role: matmul for matmul in matmuls(swcompile.capture(model, *inputs).graph)}


class Folded(nn.Module):
    """A matmul whose weight is the left operand, of each matrix of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.weight.expand(x.shape[0], -1, -1), x)


def test_what_is_read_and_written_between_matmuls() -> None:
    found = traced(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True))
    between = {role: cost._original(matmul, RATES).between for role, matmul in found.items()}
    moved = 2 * 4 * (1024 * 256 + 1024 * 512)
    expected = 2 * (moved / RATES.quantize + RATES.kernel)
    assert between[Role.OUTPUT] == between[Role.GRAD_INPUT] == pytest.approx(expected)
    assert between[Role.GRAD_WEIGHT] == pytest.approx(2 * RATES.kernel), "its operands were counted, its result is for the optimizer"

    on_left = traced(Folded(), torch.randn(16, 256, 1024))[Role.OUTPUT]
    assert on_left.weight_on_left
    moved = 2 * 4 * 16 * (256 * 1024 + 512 * 1024)
    assert cost._original(on_left, RATES).between == pytest.approx(2 * (moved / RATES.quantize + RATES.kernel))
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    (rows,) = (part for part in cost._times(Candidate(on_left, gemm, activation="x"), RATES).parts if part.key == ("rows", "x"))
    expected = 16 * 1024 * (256 * (4 + 1) + 4) / RATES.quantize + RATES.kernel
    assert rows.seconds == pytest.approx(expected), "each row of x, of each matrix"


def test_other_matmuls_keep_the_device_busy_and_the_host_too() -> None:
    found = traced(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True))
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    candidate, others = Candidate(found[Role.OUTPUT], gemm), [found[Role.GRAD_INPUT]]
    rates = dataclasses.replace(RATES, matmul_call=5e-5, quantize_call=1e-3)
    times, other = cost._times(candidate, rates), cost._original(*others, rates)
    ahead = other.seconds + other.between - 3 * 5e-5  # the host is, of the device, with the matmul and two kernels behind it
    assert 0 < other.between < ahead
    number = (times.quantized_host - times.quantized - times.original.between) / ahead
    for enough in (False, True):
        (prediction,) = cost.predict_speedups([candidate], others * (math.floor(number) + enough), rates=rates)
        assert (prediction.speedup == times.original.seconds / times.quantized) == enough


def test_kernels_between_matmuls_keep_the_device_busy_while_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).requires_grad_(False), torch.ones(512, 256)

    def speedups(quantize_call: float) -> list[float | None]:
        rates = dataclasses.replace(RATES, matmul_call=0.0, quantize_call=quantize_call)
        monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
        return [d.speedup for d in swcompile.explain(model, x, include="*").decisions]

    alone = speedups(0.0)
    assert len({*alone}) == 1 and alone[0] is not None
    matmul = (2 * 512 * 256 * 256 / RATES.matmul + RATES.kernel) / alone[0]  # in int8, with its quantisation
    between = 2 * (2 * 4 * 512 * (256 + 256) / RATES.quantize + RATES.kernel)
    calls = 4  # of the matmul, of its activation's quantisation and of its weight's two
    assert speedups((matmul + 0.9 * between) / calls) == alone
    assert speedups((matmul + 1.1 * between) / calls) != alone


def test_where_the_host_would_be_the_bottleneck_launches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, quantize=1e14, quantize_columns=1e14, kernel=1e-9)
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    # In int8 a matmul of 66 tokens takes the device 4 us, and the host 7 to launch it and 2 for what comes between.
    for tokens, in_int8 in ((66, 0), (4096, 8)):
        report = swcompile.explain(model, torch.ones(tokens, 256), include="*")
        assert report.num_rewritten(Role.OUTPUT) == in_int8
        reasons = [d.reason for d in report.decisions if d.role is Role.OUTPUT and not d.rewritten]
        assert all("time to launch" in reason for reason in reasons)


MODEL = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
"""In int8 its matmuls are 0.2 to 1.3 times as fast by the rates below."""
CLOSE_RATES = dataclasses.replace(
    RATES, quantize=2e10, quantize_columns=1e10, transpose=2e10, kernel=1e-5, matmul_call=0.0, quantize_call=0.0
)


class Projections(nn.Module):
    """Layers that share an activation."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, size, bias=False) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def activation_sharers(sizes: Sequence[int]) -> list[Candidate]:
    """Layers of so many columns that share an activation."""
    found = matmuls(swcompile.capture(Projections(*sizes).requires_grad_(False), torch.randn(1024, 256)).graph)
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    return [Candidate(matmul, gemm, activation="x") for matmul in found]


@pytest.mark.parametrize("are_all", [False, True], ids=["only what is worth it alone", "all that are worth it together"])
def test_what_is_shared_is_borne_by_who_gains(are_all: bool) -> None:
    """By equal parts the small one of three would be left alone, although its activation is in int8 in any case."""
    sizes = (512, 512, 24 if are_all else 16)
    rates = dataclasses.replace(CLOSE_RATES, kernel=5e-6, quantize=1e15, quantized_matmul=8e12)

    def seconds(size: int) -> tuple[float, float]:
        """As it is, and in int8 without its activation: one kernel, and three with the two for the weight."""
        flops = 2 * 1024 * size * 256
        return flops / 1e12 + 5e-6, flops / 8e12 + 3 * 5e-6

    activation = 5e-6
    gains = [as_it_is / cost.MIN_SPEEDUP - int8 for as_it_is, int8 in map(seconds, sizes)]
    assert gains[2] < activation / 3 < sum(gains) / 3 and (gains[2] > 0) == are_all
    predictions = cost.predict_speedups(activation_sharers(sizes), rates=rates)
    for size, gain, prediction in zip(sizes, gains, predictions, strict=True):
        as_it_is, int8 = seconds(size)
        assert prediction.speedup == pytest.approx(as_it_is / (int8 + activation * max(gain, 0) / sum(g for g in gains if g > 0)), rel=1e-4)
    assert [prediction.speedup > cost.MIN_SPEEDUP for prediction in predictions] == [True, True, are_all]


@pytest.mark.parametrize("shared", [3.7, 3.9])
def test_what_only_one_needs_it_bears_before_what_is_shared(shared: float) -> None:
    """Two that share a scale and read activations of their own, one of which takes longer to quantise."""
    original = cost._Original(10.0 * cost.MIN_SPEEDUP, 0.0, 0.0, Call(Op.MATMUL, (16, 16, 16), torch.float32))
    scale = cost._Part(shared, 1, key=("scale", "w"))
    times = [
        cost._Times(original, (cost._Part(5.0, 1), cost._Part(rows, 1, key=("rows", rows)), scale), 0.0, 0.0)
        for rows in (4.2, 2.0)
    ]
    first, second = cost._share_out(times)
    assert first.quantized == pytest.approx(9.2 + shared * 0.8 / 3.8) and second.quantized == pytest.approx(7.0 + shared * 3.0 / 3.8)
    assert {of_one.on_device().speedup >= cost.MIN_SPEEDUP for of_one in (first, second)} == {shared < 3.8}


class Costs(NamedTuple):
    """Of one matmul: seconds as it is, of its own in int8, and those of what it may share, by name."""

    original: float
    own: float
    shared: dict[str, float]

    @property
    def times(self) -> cost._Times:
        original = cost._Original(self.original, 0.0, 0.0, Call(Op.MATMUL, (16, 16, 16), torch.float32))
        parts = (cost._Part(seconds, 1, key=key) for key, seconds in self.shared.items())
        return cost._Times(original, (cost._Part(self.own, 1), *parts), 0.0, 0.0)


def seconds_of(costs: Sequence[Costs], choice: Collection[int], spared: Collection[str]) -> float:
    """Of all matmuls, some of which are in int8. What is spared is so if all that read it are."""
    shared = {key: of_it for number in choice for key, of_it in costs[number].shared.items()}
    kept = {key for key in spared if any(key in of_one.shared and number not in choice for number, of_one in enumerate(costs))}
    seconds = [of_one.own if number in choice else of_one.original for number, of_one in enumerate(costs)]
    return sum(seconds) + sum(of_it for key, of_it in shared.items() if key not in kept)


def drawn(draw: random.Random, shape: str) -> list[Costs]:
    """Costs of a few matmuls."""
    if shape == "layers":  # that share an activation; a weight's scale serves two passes; the gradient is read twice, and may be spared
        costs = []
        rows, is_spared = draw.uniform(0.05, 0.5), draw.random() < 0.5
        for layer in range(draw.randint(1, 2)):
            scale, gradient, saved = {f"scale {layer}": draw.uniform(0.05, 0.4)}, {f"gradient {layer}": draw.uniform(0.05, 0.5)}, {}
            if is_spared:
                saved = {f"spared {layer}": -draw.uniform(0.05, 0.4)}
            for shared in ({"rows": rows} | scale, scale | gradient | saved, gradient | saved):
                costs.append(Costs(1.0, draw.uniform(0.4, 0.95), shared))
        return costs
    items = {f"{number}": draw.uniform(0, 0.6) for number in range(1 if shape == "one item" else draw.randint(2, 4))}
    return [
        Costs(original, original * draw.uniform(0.5, 1.05), {k: v for k, v in items.items() if shape == "one item" or draw.random() < 0.5})
        for original in [draw.uniform(0.3, 3) for _ in range(draw.randint(2, 6))]
    ]


@pytest.mark.parametrize("shape", ["one item", "several", "layers"])
def test_no_choice_is_much_worse_than_the_best(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all choices of which matmuls to rewrite."""
    rewrite = importlib.import_module("swcompile.passes.quantize_matmuls")
    draw = random.Random(0)
    ratios = []
    for _ in range(400):
        costs = drawn(draw, shape)
        spared = {key for of_one in costs for key, seconds in of_one.shared.items() if seconds < 0}

        def known(matmuls: Sequence[Any], *_: Any, costs: list[Costs] = costs, spared: set[str] = spared) -> list[Costs]:
            taken = {matmul.node for matmul in matmuls}
            lost = {key for key in spared for number, of_one in enumerate(costs) if key in of_one.shared and number not in taken}
            return [
                costs[number]._replace(shared={k: v for k, v in costs[number].shared.items() if k not in lost}) for number in sorted(taken)
            ]

        def predict(candidates: list[Costs], others: Any) -> list[Prediction]:
            return [of_one.on_device() for of_one in cost._share_out([of_one.times for of_one in candidates])]

        monkeypatch.setattr(rewrite, "_candidates", known)
        found = rewrite._predictions([SimpleNamespace(node=number) for number in range(len(costs))], [], make_recipe({}), predict)
        choice = {number for number, prediction in found.items() if prediction.speedup >= cost.MIN_SPEEDUP}
        subsets = (chosen for size in range(len(costs) + 1) for chosen in combinations(range(len(costs)), size))
        best = min(seconds_of(costs, chosen, spared) for chosen in subsets)
        ratios.append(best / seconds_of(costs, choice, spared))
    assert min(ratios) >= 0.98 and max(ratios) <= 1 + 1e-9 and statistics.mean(ratios) > 0.999


def test_where_nothing_is_gained_all_bear_the_same() -> None:
    times = cost._share_out([cost._times(candidate, RATES) for candidate in activation_sharers((1, 2))])
    assert all(of_one.original.seconds < of_one.quantized for of_one in times)
    assert [part.share for of_one in times for part in of_one.parts if part.key] == [0.5, 0.5]


class Timer:
    """In the place of `call_seconds`: what calls take as rates predict it, times a factor for some ops."""

    def __init__(self, **factors: float) -> None:
        self.factors, self.asked = factors, set[Call]()
        self.forgotten: set[Op] = set()

    def __call__(self, calls: Collection[Call], device: torch.device) -> dict[Call, float]:
        self.asked |= {*calls}
        return {call: self.seconds(call) for call in calls if call.op not in self.forgotten}

    def seconds(self, call: Call) -> float:
        """Among equals, where the gap between kernels is not seen."""
        rates, itemsize = CLOSE_RATES, call.dtype.itemsize
        if len(call.sizes) == 3:
            m, n, k = call.sizes
            is_own = call.op is Op.MATMUL
            num_bytes = itemsize * (m * n + (m * k + n * k if is_own else 0)) + (0 if is_own else m * k + n * k)
            seconds = max(2 * m * n * k / (rates.matmul if is_own else rates.quantized_matmul), num_bytes / rates.quantize)
        else:
            num_rows, num_columns = call.sizes
            reads = 2 if "tensorwise" in call.op or "columnwise" in call.op else 1
            num_scales = {"rowwise": num_rows, "columnwise": num_columns, "blockwise": num_rows + num_columns * num_blocks(num_rows)}
            scales = [number for kind, number in num_scales.items() if kind in call.op] or [1]
            num_bytes = num_rows * num_columns * (reads * itemsize + 1) + 4 * scales[0] * (call.op is not Op.TRANSPOSE)
            by_columns = "columnwise" in call.op or "blockwise" in call.op
            rate = rates.transpose if call.op is Op.TRANSPOSE else rates.quantize_columns if by_columns else rates.quantize
            seconds = num_bytes / rate
        return (seconds + call.num_kernels * (rates.kernel - rates.gap)) * self.factors.get(call.op, 1.0)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    timer = Timer()
    monkeypatch.setattr(cost, "device_rates", lambda *of: CLOSE_RATES)
    monkeypatch.setattr(cost, "call_seconds", timer)
    return timer


def explained(**options: Any) -> list[swcompile.Decision]:
    """About the matmuls that the recipe would take."""
    x = torch.randn(1024, 256, requires_grad=True)
    return [d for d in swcompile.explain(MODEL, x, include="*", **options).decisions if d.speedup is not None]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("recipe", ["switchback", "switchback_q", "switchback_full", "llm_int8"])
def test_where_calls_take_what_rates_predict_timing_them_changes_nothing(
    recipe: str, fuse: bool, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_CLOSE", (1.0, 1.0))
    predicted = explained(recipe=recipe, fuse=fuse)
    assert not timer.asked
    monkeypatch.setattr(cost, "_CLOSE", (0.0, 100.0))
    measured = explained(recipe=recipe, fuse=fuse)
    assert timer.asked and [d.speedup for d in measured] == pytest.approx([d.speedup for d in predicted], rel=1e-6)
    assert [d.reason.replace("measured", "predicted") for d in measured] == [d.reason for d in predicted]
    assert not any("predicted" in d.reason for d in measured)


def test_only_calls_of_close_ones_are_timed(timer: Timer) -> None:
    """The first layer is 1.06 times as fast, and the second 1.80 times, whose operand the GELU's kernel quantises, and writes in int8 alone."""
    model, x = copy.deepcopy(MODEL).requires_grad_(False), torch.randn(1024, 256)

    def explained() -> list[swcompile.Decision]:
        return swcompile.explain(model, x, include="*", recipe="switchback_q", fuse=True).decisions

    before = explained()
    assert [d.shape for d in before] == [(1024, 512, 256), (1024, 256, 512)]
    assert [d.speedup for d in before] == pytest.approx([1.06, 1.80], abs=0.01)
    calls = [
        Call(Op.MATMUL, (1024, 512, 256), torch.float32, (Flag.BIAS, Flag.RHS_TRANSPOSED)),
        Call(Op.SCALED_MM, (1024, 512, 256), torch.float32, (Flag.BIAS, Flag.COLUMN_SCALES)),
        Call(Op.QUANTIZE_ROWWISE, (1024, 256), torch.float32), Call(Op.QUANTIZE_ROWWISE, (512, 256), torch.float32),
    ]  # fmt: skip
    assert timer.asked == {*calls}

    timer.factors[Op.SCALED_MM] = 1.5
    original, *parts = (timer.seconds(call) + CLOSE_RATES.gap for call in calls)
    after = explained()
    assert after[0].speedup == pytest.approx(original / sum(parts)) and original / sum(parts) < 0.9
    assert after[1].speedup == before[1].speedup and [d.rewritten for d in after] == [False, True]
    assert f"measured {original / sum(parts):.2f} times as fast" in after[0].reason

    timer.forgotten.add(Op.SCALED_MM)  # which could not be timed
    assert [d.speedup for d in explained()] == pytest.approx([d.speedup for d in before])


class Weights(nn.Module):
    """Matmuls by weights that lie as [out, in] or as [in, out]: three share an activation, one has a bias, two share a weight."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        for name, (num_in, num_out) in {"a": (64, 48), "b": (64, 48), "c": (64, 48), "d": (48, 80)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn((num_out, num_in) if layout == "[out, in]" else (num_in, num_out))))
        self.bias = nn.Parameter(torch.randn(48))

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.layout == "[out, in]":
            return nn.functional.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x, self.a, self.bias) + self.multiply(x, self.b) * self.multiply(x, self.c)
        return self.multiply(y.relu(), self.d).tanh() + self.multiply(y.sigmoid(), self.d)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["[out, in]", "[in, out]"])
@pytest.mark.parametrize("recipe", ["switchback", "switchback_q", "switchback_full", "llm_int8"])
def test_what_would_be_timed_is_what_is_called(recipe: str, layout: str, autocast: bool) -> None:
    """Ops, sizes, dtypes and layouts, and how often, of all matmuls that are computed as they stand."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        joint = swcompile.capture(Weights(layout), torch.randn(40, 64, requires_grad=True))
    ours: Counter[Call] = Counter()
    keys: set[Hashable] = set()
    before = {matmul.node: (matmul.lhs, matmul.rhs, matmul.node.target) for matmul in matmuls(joint.graph)}
    swapped: set[str] = set()

    def predict(candidates: Sequence[Candidate], others: Sequence[Matmul]) -> list[Prediction]:
        for candidate in candidates:
            original, *parts = cost._times(candidate, CLOSE_RATES)[:2]
            lhs, rhs, target = before[candidate.matmul.node]
            flags = {
                Flag.BIAS: target is torch.ops.aten.addmm.default,
                Flag.LHS_TRANSPOSED: is_column_major(lhs.meta["val"]),
                Flag.RHS_TRANSPOSED: is_column_major(rhs.meta["val"]),
            }
            assert original.call.flags == Flag.those_of(flags)
            if candidate.is_plain:
                ours.update(part.call for part in parts[0] if part.call and part.key not in keys)
                keys.update(part.key for part in parts[0] if part.key)
            else:
                swapped.add(candidate.matmul.node.name)
        return [Prediction(2.0)] * len(candidates)

    swcompile.quantize_matmuls(joint.graph, recipe=make_recipe({"recipe": recipe, "include": "*", "fuse": False}), predict=predict)
    assert bool(swapped) == (layout == "[in, out]" and recipe == "switchback_full"), "the gradient of a weight, as its transpose"
    called = Counter(
        call_of(node) for node in joint.graph.nodes if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "swcompile"
    )
    assert ours == called if not swapped else ours < called, (ours - called, called - ours)


def call_of(node: torch.fx.Node) -> Call:
    """What a node of ours calls."""
    name = node.target._schema.name.removeprefix("swcompile::")
    first, *rest = node.args
    value = first.meta["val"]
    if name == "scaled_mm":
        b, _, b_scale, bias, dtype = rest
        flags = {Flag.BIAS: bias is not None, Flag.COLUMN_SCALES: b_scale.meta["val"].numel() > 1}
        sizes = (value.shape[0], b.meta["val"].shape[0], value.shape[1])
        return Call(Op.SCALED_MM, sizes, dtype, Flag.those_of(flags))
    if name == "scaled_mm_blockwise":
        return Call(Op.SCALED_MM_BLOCKWISE, (value.shape[0], rest[0].meta["val"].shape[0], value.shape[1]), rest[-1])
    if name == "quantize_by_scale" and rest[-1]:
        return Call(Op.QUANTIZE_BY_SCALE_TRANSPOSE, tuple(value.shape), value.dtype)
    return Call(Op(name), tuple(value.shape), value.dtype)


def test_what_is_no_product_of_two_matrices_is_not_timed(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_CLOSE", (0.0, math.inf))

    class Added(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight.t(), beta=0.5)

    for model, shape in ((Folded(), (16, 256, 1024)), (nn.Linear(256, 512), (0, 256)), (Added(256, 512), (1024, 256))):
        decisions = swcompile.explain(model, torch.randn(shape), include="*").decisions
        (decision,) = (d for d in decisions if d.role is Role.OUTPUT)
        assert decision.speedup is not None and not timer.asked


def test_rates_that_are_given_are_all_that_counts(timer: Timer) -> None:
    found = traced(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True))
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    (prediction,) = cost.predict_speedups([Candidate(found[Role.OUTPUT], gemm)], rates=CLOSE_RATES)
    assert cost._CLOSE[0] < prediction.speedup < cost._CLOSE[1] and not prediction.is_measured and not timer.asked


def test_what_is_shared_follows_what_was_measured(timer: Timer) -> None:
    """Two layers share an activation; that with more columns gains less once int8 matmuls are slower than predicted."""
    timer.factors[Op.SCALED_MM] = 1.2
    for passes in (2, 4):
        candidates = [candidate._replace(weight_passes=passes, is_timed=True) for candidate in activation_sharers((512, 384))]
        predictions = cost.predict_speedups(candidates)
        assert all(prediction.is_measured for prediction in predictions)
        gains, bears = [], []
        for candidate, prediction in zip(candidates, predictions, strict=True):
            n = candidate.matmul.shape[1]
            calls = [
                Call(Op.MATMUL, (1024, n, 256), torch.float32, (Flag.RHS_TRANSPOSED,)), Call(Op.SCALED_MM, (1024, n, 256), torch.float32),
                Call(Op.QUANTIZE_TENSORWISE, (n, 256), torch.float32),
            ]  # fmt: skip
            original, multiply, weight = (timer.seconds(call) + call.num_kernels * CLOSE_RATES.gap for call in calls)
            gains.append(original / cost.MIN_SPEEDUP - multiply - weight / passes)
            bears.append(original / prediction.speedup - multiply - weight / passes)
        activation = Call(Op.QUANTIZE_ROWWISE, (1024, 256), torch.float32)
        assert sum(bears) == pytest.approx(timer.seconds(activation) + CLOSE_RATES.gap)
        assert min(gains) > 0 and bears[0] / bears[1] == pytest.approx(gains[0] / gains[1])


def test_what_is_shared_has_one_price(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one whose calls are not timed."""
    first, second = activation_sharers((512, 512))
    monkeypatch.setattr(cost, "_CLOSE", (1.0, 1.0))
    timer.factors[Op.QUANTIZE_ROWWISE] = 3.0
    predictions = cost.predict_speedups([first._replace(is_timed=True), second])
    assert [prediction.is_measured for prediction in predictions] == [True, False]
    times = cost._times(first, CLOSE_RATES)
    own = sum(part.seconds for part in times.parts if part.key is None)
    activation = timer.seconds(Call(Op.QUANTIZE_ROWWISE, (1024, 256), torch.float32)) + CLOSE_RATES.gap
    assert sum(times.original.seconds / prediction.speedup for prediction in predictions) == pytest.approx(2 * own + activation)
    assert predictions[0].speedup == pytest.approx(predictions[1].speedup)


def test_who_comes_close_once_others_are_timed_is_timed_too(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gains less than predicted, and the second bears more of what they share."""
    candidates = activation_sharers((512, 1024))
    predicted = [prediction.speedup for prediction in cost.predict_speedups(candidates, rates=CLOSE_RATES)]
    assert predicted[0] < predicted[1]
    monkeypatch.setattr(cost, "_CLOSE", (0.5, predicted[1] - 1e-6))
    slower = Call(Op.SCALED_MM, (1024, 512, 256), torch.float32)
    monkeypatch.setattr(timer, "seconds", lambda call, seconds=timer.seconds: seconds(call) * (1.5 if call == slower else 1.0))
    predictions = cost.predict_speedups(candidates)
    assert all(prediction.is_measured for prediction in predictions) and predictions[1].speedup < predicted[1]


def test_what_is_measured_stays_so_where_the_host_counts(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(CLOSE_RATES, quantize_call=1.0)
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    (candidate,) = activation_sharers((1024,))
    monkeypatch.setattr(cost, "_CLOSE", (1.0, 1.0))
    for is_timed in (False, True):
        (prediction,) = cost.predict_speedups([candidate._replace(is_timed=is_timed)])
        assert prediction.launches_decide and prediction.is_measured == is_timed


def test_what_has_been_timed_is_timed_again(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another one is refused, shares grow, and a prediction by rates may be far from 1 on a side where it was not."""
    seen: list[list[tuple[str | None, bool]]] = []

    def predict(candidates: Sequence[Candidate], others: Sequence[Matmul]) -> list[Prediction]:
        seen.append([(candidate.matmul.parameter, candidate.is_timed) for candidate in candidates])
        speedups = {"0.weight": 1.5, "2.weight": 0.5}
        return [Prediction(speedups[str(c.matmul.parameter)], is_measured=len(seen) == 1) for c in candidates]

    graph = swcompile.capture(copy.deepcopy(MODEL).requires_grad_(False), torch.randn(1024, 256)).graph
    swcompile.quantize_matmuls(graph, recipe=make_recipe({"include": "*"}), predict=predict)
    assert seen == [[("0.weight", False), ("2.weight", False)], [("0.weight", True)]]

    (candidate,) = activation_sharers((512,))
    monkeypatch.setattr(cost, "_CLOSE", (1.0, 1.0))
    for is_timed in (False, True):
        (prediction,) = cost.predict_speedups([candidate._replace(is_timed=is_timed)])
        assert prediction.is_measured == is_timed == bool(timer.asked)


@pytest.mark.gpu
def test_close_ones_are_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[Call, float] = {}

    def noted(calls: Collection[Call], device: torch.device) -> dict[Call, float]:
        found = call_seconds(calls, device)
        assert found.keys() == {*calls}
        timed.update(found)
        return found

    monkeypatch.setattr(cost, "_CLOSE", (0.0, math.inf))
    monkeypatch.setattr(cost, "call_seconds", noted)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024, bias=False)).cuda().bfloat16()
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for recipe in ("switchback", "switchback_full"):
        report = swcompile.explain(model, x, include="*", recipe=recipe, mode="reduce-overhead")
        decisions = [d for d in report.decisions if d.speedup is not None]
        assert len(decisions) >= 4 and all(0.2 < d.speedup < 4 for d in decisions)
        assert all("measured" in d.reason for d in decisions if not d.rewritten)
    assert {call.op for call in timed} > {Op.MATMUL, Op.SCALED_MM, Op.SCALED_MM_BLOCKWISE, Op.TRANSPOSE, Op.QUANTIZE_BLOCKWISE_TRANSPOSE}
    assert {call.flags for call in timed if call.op is Op.SCALED_MM} == {(), (Flag.BIAS,)}
