"""quantize_matmuls: the graphs that it makes, the reason of every decision, and what is shared."""

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import Decision, Role, Scaling, format_graph, joint_passes, make_recipe
from swcompile.cost import Candidate, Prediction
from swcompile.kernels.int8 import padded
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
)
from swcompile.kernels.scaled_mm import MAX_K, SCALED_MM
from swcompile.kernels.transpose import TRANSPOSE

ALL: dict[str, Any] = {"include": ["*"], "skip_slower": False}
TOKENS, IN, OUT = 8, 32, 64

INPUTS = """\
%0: f32[64, 32] = parameter weight
%1: f32[64] = parameter bias
%2: f32[8, 32] = input
%3: f32[8, 64] = tangent
%4: f32[32, 64] = aten.permute(%0, [1, 0])
"""

BEFORE = """\
%5: f32[8, 64] = aten.addmm(%1, %2, %4)
%6: f32[64, 32] = aten.permute(%4, [1, 0])
%7: f32[8, 32] = aten.mm(%3, %6)
%8: f32[64, 8] = aten.permute(%3, [1, 0])
%9: f32[64, 32] = aten.mm(%8, %2)
%10: f32[32, 64] = aten.permute(%9, [1, 0])
%11: f32[1, 64] = aten.sum.dim_IntList(%3, [0], True)
%12: f32[64] = aten.view(%11, [64])
%13: f32[64, 32] = aten.permute(%10, [1, 0])
return %5, %13, %12, %7"""

SWITCHBACK = """\
%5: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%2)
%6: i8[8, 32] = getitem(%5, 0)
%7: f32[8, 1] = getitem(%5, 1)
%8: (i8[64, 32], f32[1, 1]) = swcompile.quantize_tensorwise(%0)
%9: i8[64, 32] = getitem(%8, 0)
%10: f32[1, 1] = getitem(%8, 1)
%11: f32[8, 64] = swcompile.scaled_mm(%6, %9, %7, %10, %1, f32)
%12: f32[64, 32] = aten.permute(%4, [1, 0])
%13: (i8[8, 64], f32[8, 1]) = swcompile.quantize_rowwise(%3)
%14: i8[8, 64] = getitem(%13, 0)
%15: f32[8, 1] = getitem(%13, 1)
%16: i8[32, 64] = swcompile.quantize_by_scale(%12, %10, True)
%17: f32[8, 32] = swcompile.scaled_mm(%14, %16, %15, %10, None, f32)
%18: f32[64, 8] = aten.permute(%3, [1, 0])
%19: f32[64, 32] = aten.mm(%18, %2)
%20: f32[32, 64] = aten.permute(%19, [1, 0])
%21: f32[1, 64] = aten.sum.dim_IntList(%3, [0], True)
%22: f32[64] = aten.view(%21, [64])
%23: f32[64, 32] = aten.permute(%20, [1, 0])
return %11, %23, %22, %17"""

# Vector-wise weights: in other scales along their rows than along their columns.
SWITCHBACK_Q = (
    SWITCHBACK.partition("%16:")[0]
    .replace("f32[1, 1]) = swcompile.quantize_tensorwise(", "f32[64, 1]) = swcompile.quantize_rowwise(")
    .replace("%10: f32[1, 1]", "%10: f32[64, 1]")
    + """\
%16: (i8[32, 64], f32[32, 1]) = swcompile.quantize_columnwise_transpose(%12)
%17: i8[32, 64] = getitem(%16, 0)
%18: f32[32, 1] = getitem(%16, 1)
%19: f32[8, 32] = swcompile.scaled_mm(%14, %17, %15, %18, None, f32)
%20: f32[64, 8] = aten.permute(%3, [1, 0])
%21: f32[64, 32] = aten.mm(%20, %2)
%22: f32[32, 64] = aten.permute(%21, [1, 0])
%23: f32[1, 64] = aten.sum.dim_IntList(%3, [0], True)
%24: f32[64] = aten.view(%23, [64])
%25: f32[64, 32] = aten.permute(%22, [1, 0])
return %11, %25, %24, %19"""
)

LLM_INT8 = (
    SWITCHBACK_Q.partition("%20:")[0]
    + """\
%20: (i8[64, 8], f32[64, 1]) = swcompile.quantize_columnwise_transpose(%3)
%21: i8[64, 8] = getitem(%20, 0)
%22: f32[64, 1] = getitem(%20, 1)
%23: (i8[32, 8], f32[32, 1]) = swcompile.quantize_columnwise_transpose(%2)
%24: i8[32, 8] = getitem(%23, 0)
%25: f32[32, 1] = getitem(%23, 1)
%26: f32[64, 32] = swcompile.scaled_mm(%21, %24, %22, %25, None, f32)
%27: f32[32, 64] = aten.permute(%26, [1, 0])
%28: f32[1, 64] = aten.sum.dim_IntList(%3, [0], True)
%29: f32[64] = aten.view(%28, [64])
%30: f32[64, 32] = aten.permute(%27, [1, 0])
return %11, %30, %29, %19"""
)

# The int8 gradient that grad_input reads; its tokens' scales go into the activation. Of 8 tokens 8 more are zeros.
SWITCHBACK_FULL = (
    SWITCHBACK.partition("%18:")[0]
    + """\
%18: i8[64, 16] = swcompile.transpose(%14)
%19: (i8[32, 16], f32[1, 32]) = swcompile.quantize_blockwise_transpose(%2, %15)
%20: i8[32, 16] = getitem(%19, 0)
%21: f32[1, 32] = getitem(%19, 1)
%22: f32[64, 32] = swcompile.scaled_mm_blockwise(%18, %20, %21, f32)
%23: f32[32, 64] = aten.permute(%22, [1, 0])
%24: f32[1, 64] = aten.sum.dim_IntList(%3, [0], True)
%25: f32[64] = aten.view(%24, [64])
%26: f32[64, 32] = aten.permute(%23, [1, 0])
return %11, %26, %25, %17"""
)


class Model(nn.Module):
    """A function of an input and named parameters."""

    def __init__(self, call: Callable[..., torch.Tensor], **parameters: torch.Tensor):
        super().__init__()
        self.call = call
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self, *inputs)


def x_of(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*(shape or (TOKENS, IN)), requires_grad=True, **options)


def rewrite(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[swcompile.JointGraph, list[Decision]]:
    joint = swcompile.capture(model, x)
    return joint, joint.run_passes(joint_passes(make_recipe(ALL | options)))


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("recipe", "after"),
    [
        ("switchback", SWITCHBACK),
        ("switchback_q", SWITCHBACK_Q),
        ("switchback_full", SWITCHBACK_FULL),
        ("llm_int8", LLM_INT8),
    ],
)
def test_one_layer_before_and_after(recipe: str, after: str) -> None:
    torch.manual_seed(0)
    model, x, tangent = nn.Linear(IN, OUT), x_of(), torch.randn(TOKENS, OUT)
    joint = swcompile.capture(model, x)
    assert format_graph(joint.graph) == INPUTS + BEFORE
    (exact, *_), exact_gradients = joint(tangent)
    decisions = joint.run_passes(joint_passes(make_recipe(ALL | {"recipe": recipe})))
    assert format_graph(joint.graph) == INPUTS + after

    int8 = f"int8, scales by row x {'tensor' if recipe in ('switchback', 'switchback_full') else 'row'}"
    of_weight = {"llm_int8": int8, "switchback_full": "int8, scales by token x block"}
    plain = f"recipe {recipe} leaves grad_weight (sums over {TOKENS} tokens)"
    assert [d.reason for d in decisions] == [int8, int8, of_weight.get(recipe, plain)]
    assert [d.shape for d in decisions] == [(TOKENS, OUT, IN), (TOKENS, IN, OUT), (OUT, IN, TOKENS)]

    # The same integers, and float32 scales in another order of operations.
    (actual, *_), gradients = joint(tangent)
    out = oracle.linear(x, model.weight, model.bias, recipe)
    expected = torch.autograd.grad(out, [model.weight, model.bias], tangent)
    for a, e in zip((actual, gradients["weight"], gradients["bias"]), (out, *expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert not torch.equal(actual, exact)
    assert torch.equal(gradients["weight"], exact_gradients["weight"]) == (recipe not in of_weight)


X = (TOKENS, IN)
LINEAR = nn.Linear(IN, OUT)
LONG = nn.Linear(MAX_K + 1, 2, bias=False)
STACK = Model(lambda m, x: x @ m.weight, weight=torch.randn(3, IN, OUT))
EXPANDED = Model(lambda m, x: torch.bmm(x, m.weight.expand(x.shape[0], IN, OUT)), weight=torch.randn(IN, OUT))
DERIVED = Model(lambda m, x: x @ m.weight.tanh(), weight=torch.randn(IN, OUT))
PRODUCT = Model(lambda m, x: x @ (m.b @ m.a), a=torch.randn(4, OUT), b=torch.randn(IN, 4))
FIVE = Model(lambda m, x: x @ (m.a + m.b + m.c + m.d + m.e), **{name: torch.randn(IN, OUT) for name in "abcde"})
SCORES = Model(lambda m, x: x @ x.T + m.bias, bias=torch.randn(1))
RATHER = "; only a parameter itself is quantised"
LEFT = {
    "excluded": (LINEAR, X, {"exclude": ["b*", "w*"]}, "excluded by 'w*'"),
    "not included": (LINEAR, X, {"include": "other*"}, "no include pattern matches"),
    "head": (LINEAR, X, {"include": None}, "last matmul before the output; include='*' asks for it"),
    "scores": (SCORES, X, {}, "neither operand is a parameter"),
    "nothing known": (Model(lambda m, x: x @ x.T), X, {}, "no parameter is known in this graph"),
    "derived, not asked for": (DERIVED, X, {"include": None}, f"an operand is computed from weight{RATHER}"),
    "derived, excluded": (FIVE, X, {"exclude": "b"}, f"an operand is computed from a, b, c, d and 1 more{RATHER}"),
    "no batch": (EXPANDED, (0, *X), {}, "an empty batch: nothing to multiply"),
}
IMPOSSIBLE = {
    "float64": (LINEAR, X, {}, "torch.float64 has no int8 form; bfloat16, float16 and float32 have"),
    "meta": (LINEAR, X, {}, "no int8 kernel for device meta"),
    "long": (LONG, (1, MAX_K + 1), {}, f"sums over {MAX_K + 1} > {MAX_K} products, which may overflow int32"),
    "stack": (STACK, (3, *X), {}, "a batch of 3 weights: the int8 kernel multiplies one"),
    "derived": (DERIVED, X, {}, f"an operand is computed from weight{RATHER}"),
    "derived from two": (FIVE, X, {"include": "e"}, f"an operand is computed from a, b, c, d and 1 more{RATHER}"),
    "product": (PRODUCT, X, {"include": "b"}, "a product of parameters alone: a, b"),
}
"""Asked for, and not rewritten: `strict` raises."""


@pytest.mark.parametrize("case", LEFT | IMPOSSIBLE)
def test_reason_why_a_matmul_is_left(case: str) -> None:
    model, shape, options, reason = (LEFT | IMPOSSIBLE)[case]
    how = {"float64": {"dtype": torch.float64}, "meta": {"device": "meta"}}.get(case, {})
    joint = swcompile.capture(copy.deepcopy(model).to(**how), x_of(*shape, **how))
    before = format_graph(joint.graph)
    decisions = joint.run_passes(joint_passes(make_recipe(ALL | {"recipe": "llm_int8"} | options)))
    first = decisions[0]
    assert (first.reason, first.rewritten, first.violation) == (reason, False, case in IMPOSSIBLE)
    if case != "long":  # of which the two other matmuls sum over less
        assert format_graph(joint.graph) == before and not any(d.rewritten for d in decisions)


def test_the_longest_sum_that_an_int32_holds_is_rewritten() -> None:
    _, (forward, *_) = rewrite(nn.Linear(MAX_K, 2, bias=False), torch.ones(1, MAX_K))
    assert forward.rewritten and forward.shape == (1, 2, MAX_K)


def test_sums_over_more_tokens_than_an_int32_holds_are_rewritten_by_block() -> None:
    for recipe, rewritten in (("llm_int8", False), ("switchback_full", True)):
        _, decisions = rewrite(nn.Linear(2, 2, bias=False), torch.ones(MAX_K + 1, 2), recipe=recipe)
        (of_weight,) = (d for d in decisions if d.role is Role.GRAD_WEIGHT)
        assert of_weight.rewritten == rewritten and of_weight.shape == (2, 2, MAX_K + 1)


def test_matrix_vector_products_are_left() -> None:
    parameters = {"weight": torch.randn(OUT, IN), "bias": torch.randn(OUT)}
    model = Model(lambda m, x: torch.addmv(m.bias, m.weight, x), **parameters)
    with contextlib.ExitStack() as stack:  # exported, as tracing for Inductor makes a sum of products of it
        graph = aot_export_joint_with_descriptors(stack, model, (x_of(IN),)).graph_module.graph
    decisions = swcompile.run_passes(graph, joint_passes(make_recipe(ALL)))
    forward = decisions[0]
    assert (forward.role, forward.shape, forward.violation) == (Role.OUTPUT, (OUT, 1, IN), True)
    assert forward.reason == "a matrix-vector product: bound by reading the weight once"
    assert not any(d.rewritten for d in decisions)


def test_a_batched_gradient_of_the_weight_is_left() -> None:
    _, decisions = rewrite(EXPANDED, x_of(3, TOKENS, IN), recipe="llm_int8")
    assert {d.role for d in decisions if d.rewritten} == {Role.OUTPUT, Role.GRAD_INPUT}
    reasons = {d.reason for d in decisions if d.role is Role.GRAD_WEIGHT}
    assert reasons == {"a batch of 3 products: the int8 kernel computes one"}


class Projections(nn.Module):
    """Three layers that read one activation, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(IN, IN, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.q(x).tanh() * self.k(x) + self.v(x))


def sharing(candidates: Sequence[Candidate], what: str) -> list[tuple[Candidate, int]]:
    """Each, with how many of them share that; 1 where it shares nothing."""
    keys = [getattr(candidate, what) for candidate in candidates]
    return [(candidate, 1 if key is None else keys.count(key)) for candidate, key in zip(candidates, keys, strict=True)]


@pytest.mark.parametrize("ratio", [0.5, 0.999, 1.0, 1.009, 1.01, 3.0])
def test_a_prediction_decides_where_slower_ones_are_skipped(ratio: float) -> None:
    seen: dict[Any, int] = {}

    def predict(candidates: Sequence[Any], others: Sequence[Any]) -> list[Prediction]:
        seen.update({(c.matmul.parameter, c.matmul.role): sharers for c, sharers in sharing(candidates, "activation")})
        assert {c.gemm.weight for c in candidates} == {Scaling.TENSOR}
        assert [m.role for m in others] == [Role.GRAD_WEIGHT] * 4
        return [Prediction(ratio)] * len(candidates)

    for include, asked in ((None, False), ("*", True)):
        graph = swcompile.capture(Projections(), x_of()).graph
        result = swcompile.quantize_matmuls(graph, recipe=make_recipe({"include": include}), predict=predict)
        predicted = [d for d in result.decisions if d.role in (Role.OUTPUT, Role.GRAD_INPUT)]
        is_worth_it = ratio >= 1.01
        assert result.rewrites == (8 if is_worth_it else 0) and {d.speedup for d in predicted} == {ratio}
        verdict = f"int8 would be {'slower' if ratio < 1 else 'hardly faster'}: predicted {ratio:.2f} times as fast"
        assert {d.reason for d in predicted} == {"int8, scales by row x tensor" if is_worth_it else verdict}
        assert {d.violation for d in predicted} == {asked and not is_worth_it}
    expected = {(f"{name}.weight", Role.OUTPUT): 1 if name == "o" else 3 for name in "qkvo"}
    assert {key: value for key, value in seen.items() if key[1] is Role.OUTPUT} == expected
    assert {value for key, value in seen.items() if key[1] is Role.GRAD_INPUT} == {1}


@pytest.mark.parametrize("together, alone, num_rewritten", [
    ((1.005, 1.06), 0.98, 0), ((0.99, 1.06), 0.98, 0), ((0.99, 1.06), 1.01, 1), ((0.99, 1.005), 1.01, 1),
    ((0.99, 1.005), 1.005, 0), ((1.01, 1.01), 0.0, 2), ((1.005, 1.005), 0.0, 0), ((0.98, 0.99), 0.0, 0),
])  # fmt: skip
def test_costs_are_shared_with_what_is_rewritten_too(
    together: tuple[float, float], alone: float, num_rewritten: int
) -> None:
    """A forward and a backward that find one scale. What is worth it with the other's part may be so alone, or not."""
    asked: list[list[tuple[Role, int]]] = []

    def predict(candidates: Sequence[Any], others: Sequence[Any]) -> list[Prediction]:
        asked.append([(c.matmul.role, sharers) for c, sharers in sharing(candidates, "scale")])
        assert len(candidates) + len(others) == 3
        worth = {(Role.OUTPUT, 2): together[0], (Role.GRAD_INPUT, 2): together[1], (Role.GRAD_INPUT, 1): alone}
        return [Prediction(worth[key]) for key in asked[-1]]

    graph = swcompile.capture(nn.Linear(IN, OUT), x_of().requires_grad_()).graph
    result = swcompile.quantize_matmuls(graph, recipe=make_recipe({"include": "*"}), predict=predict)
    assert asked == [[(Role.OUTPUT, 2), (Role.GRAD_INPUT, 2)]] + ([[(Role.GRAD_INPUT, 1)]] if alone else [])
    assert result.rewrites == num_rewritten
    assert [d.speedup for d in result.decisions] == [together[0], alone or together[1], None]


def test_nothing_is_predicted_where_nothing_may_be_rewritten() -> None:
    def predict(*of: Any) -> list[Prediction]:
        raise AssertionError(of)

    for model, options in ((nn.GELU(), {}), (nn.Linear(IN, OUT), {}), (nn.Linear(IN, OUT), {"exclude": "*", "include": "*"})):
        result = swcompile.quantize_matmuls(swcompile.capture(model, x_of()).graph, recipe=make_recipe(options), predict=predict)
        assert result.rewrites == 0 and not any(decision.rewritten for decision in result.decisions)


@pytest.mark.parametrize("spelling", ["[out, in]", "[in, out]"])
def test_what_a_gradient_of_the_weight_in_int8_shares(spelling: str) -> None:
    """Two layers with one gradient of their outputs, which a pointwise op computes; each is quantised and turned once."""
    shape = (OUT, IN) if spelling == "[out, in]" else (IN, OUT)

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        weights = (m.a, m.b) if spelling == "[out, in]" else (m.a.T, m.b.T)
        return (nn.functional.linear(x, weights[0]) + nn.functional.linear(x.tanh(), weights[1])).relu()

    seen: dict[Role, set[tuple[int, int, bool, bool]]] = {}

    def predict(candidates: Sequence[Any], others: Sequence[Any]) -> list[Prediction]:
        for (c, sharers), (_, turned) in zip(sharing(candidates, "activation"), sharing(candidates, "gradient"), strict=True):
            seen.setdefault(c.matmul.role, set()).add((sharers, turned, c.is_fused, c.spared is not None))
        return [Prediction(2.0)] * len(candidates)

    joint = swcompile.capture(Model(call, a=torch.randn(shape), b=torch.randn(shape)), x_of())
    recipe = make_recipe({"recipe": "switchback_full", "include": "*", "fuse": True})
    assert swcompile.quantize_matmuls(joint.graph, recipe=recipe, predict=predict).rewrites == 6
    assert seen[Role.GRAD_WEIGHT] == {(4, 2, True, True)} and seen[Role.GRAD_INPUT] == {(4, 1, True, True)}
    assert count(joint.graph, TRANSPOSE) == 1 and count(joint.graph, QUANTIZE_BLOCKWISE_TRANSPOSE) == 2

    seen.clear()  # a gradient that is multiplied by something, too
    model = Model(lambda m, x: (nn.functional.linear(x, m.a) + m.b * x[:, :1]).relu(), a=torch.randn(OUT, IN), b=torch.randn(OUT))
    joint = swcompile.capture(model, x_of())
    assert swcompile.quantize_matmuls(joint.graph, recipe=recipe, predict=predict).rewrites == 3
    assert seen[Role.GRAD_WEIGHT] == {(2, 1, True, False)}


def test_one_activation_is_quantised_once_and_each_weight_twice() -> None:
    joint, _ = rewrite(Projections(), x_of())
    # x for q, k and v together, the input of o, and the gradients of four outputs
    assert count(joint.graph, QUANTIZE_ROWWISE) == 1 + 1 + 4
    assert count(joint.graph, SCALED_MM) == 8
    assert count(joint.graph, QUANTIZE_TENSORWISE) == count(joint.graph, QUANTIZE_BY_SCALE) == 4
    assert count(joint.graph, QUANTIZE_TENSORWISE_TRANSPOSE) == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_backward_gets_the_scales_of_weights_and_finds_none_again(checkpointed: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=False) if checkpointed else block(x))
            return x

    graphs: list[fx.Graph] = []
    hook = {"post_grad_custom_pre_pass": graphs.append, "force_disable_caches": True}
    compiled = torch.compile(Blocks(), backend="switchback", options=ALL | {"inductor": hook})
    compiled(x_of()).sum().backward()
    forward, backward = graphs
    assert count(forward, QUANTIZE_TENSORWISE) == 4
    # A checkpoint computes the first layer of a block again, with the weight in int8; of the second it needs nothing.
    expected = {QUANTIZE_TENSORWISE: 2, QUANTIZE_TENSORWISE_TRANSPOSE: 4, QUANTIZE_BY_SCALE: 0}
    if not checkpointed:
        expected = {QUANTIZE_TENSORWISE: 0, QUANTIZE_TENSORWISE_TRANSPOSE: 0, QUANTIZE_BY_SCALE: 4}
    assert {op: count(backward, op) for op in expected} == expected
    kept = [value for value in forward.output_node().all_input_nodes if value.meta["val"].dtype == torch.int8]
    assert kept == []


@pytest.mark.parametrize("recipe", ["switchback", "llm_int8"])
def test_an_activation_that_autocast_casts_for_each_reader_is_quantised_once(recipe: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        graph = swcompile.capture(Projections(), x_of()).graph
    sharers: dict[Role, list[int]] = {}

    def predict(candidates: Sequence[Any], others: Sequence[Any]) -> list[Prediction]:
        for candidate, number in sharing(candidates, "activation"):
            sharers.setdefault(candidate.matmul.role, []).append(number)
        return [Prediction(2.0)] * len(candidates)

    options = make_recipe({"recipe": recipe, "include": "*"})
    swcompile.run_passes(graph, [partial(swcompile.quantize_matmuls, recipe=options, predict=predict)])
    activations = 1 + 1 + 4  # as without autocast
    weights = 0 if recipe == "switchback" else 4
    assert count(graph, QUANTIZE_ROWWISE) == activations + weights
    assert sorted(sharers[Role.OUTPUT]) == [1, 3, 3, 3]
    if recipe == "llm_int8":  # the backward reads x in scales of its own, and quantises it once too
        assert count(graph, QUANTIZE_COLUMNWISE_TRANSPOSE) == 4 + activations


def test_no_gradient_under_autocast_still_quantises_an_activation_once() -> None:
    graphs: list[fx.Graph] = []
    hook = {"post_grad_custom_pre_pass": graphs.append, "force_disable_caches": True}
    compiled = torch.compile(Projections(), backend="switchback", options=ALL | {"inductor": hook})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(x_of())
    (graph,) = graphs
    assert count(graph, SCALED_MM) == 4 and count(graph, QUANTIZE_ROWWISE) == 2


def test_a_shared_weight_is_quantised_once_a_direction() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + ((x @ m.weight.T).tanh() @ m.weight.T).tanh() @ m.weight

    joint, _ = rewrite(Model(call, weight=torch.randn(IN, IN)), x_of())
    # In forward and backward each, once along its rows and once along its columns; its scale once.
    assert count(joint.graph, SCALED_MM) == 6
    assert count(joint.graph, QUANTIZE_TENSORWISE) == 1 and count(joint.graph, QUANTIZE_BY_SCALE) == 3


@pytest.mark.parametrize("recipe", swcompile.RECIPES)
def test_a_second_run_changes_nothing(recipe: str) -> None:
    joint, first = rewrite(Projections(), x_of(), recipe=recipe)
    before = format_graph(joint.graph)
    result = swcompile.quantize_matmuls(joint.graph, recipe=make_recipe(ALL | {"recipe": recipe}))
    assert result.rewrites == 0 and format_graph(joint.graph) == before
    for again, d in zip(result.decisions, first, strict=True):
        reason = f"{d.number_format} already" if d.rewritten else d.reason.partition(";")[0]
        *sizes, summed = d.shape
        shape = (*sizes, padded(summed)) if "token x block" in d.reason else d.shape  # zeros are multiplied, too
        assert again == dataclasses.replace(d, node=again.node, reason=reason, shape=shape)


@pytest.mark.parametrize("recipe", swcompile.RECIPES)
def test_the_backward_quantises_what_it_reads_of_the_forward_itself(recipe: str) -> None:
    joint, _ = rewrite(nn.Linear(IN, OUT), x_of(), recipe=recipe)
    late = [n for n in joint.graph.nodes if n.meta.get("partitioner_tag") == "must_be_in_backward"]
    quantised = [n.args[0].meta["val"].shape for n in late if "swcompile.quantize" in str(n.target)]
    # The transposed weight; where grad_weight is in 8 bit the activation, in other scales than the forward's, too.
    assert quantised == [(OUT, IN)] + [(TOKENS, IN)] * (recipe in ("llm_int8", "switchback_full"))
    num_scales = len(quantised) - any(n.target == QUANTIZE_BY_SCALE for n in late)
    assert sum(n.target is operator.getitem for n in late) == 2 * num_scales  # values and scales


def test_addmm_with_a_matrix_and_factors() -> None:
    torch.manual_seed(0)

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(m.matrix, x, m.weight.T, beta=0.5, alpha=-2.0)

    model = Model(call, weight=torch.randn(OUT, IN), matrix=torch.randn(TOKENS, OUT))
    joint, _ = rewrite(model, x := x_of())
    (out, *_), gradients = joint()
    (matmul, _) = joint.graph.find_nodes(op="call_function", target=SCALED_MM)
    assert matmul.args[4] is None
    expected = 0.5 * model.matrix - 2 * oracle.linear(x, model.weight)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, model(x))
    torch.testing.assert_close(gradients["matrix"], torch.full_like(model.matrix, 0.5))
    torch.testing.assert_close(gradients["weight"], (-2 * x.sum(0)).expand(OUT, IN))


def test_a_layer_applied_several_times_loses_the_last_use_alone() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(IN, IN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = self.a(x).tanh()
            return x

    _, decisions = rewrite(Repeated(), x_of(), include=None)
    head = "last matmul before the output; include='*' asks for it"
    reasons = {role: [d.reason for d in decisions if d.role is role] for role in (Role.OUTPUT, Role.GRAD_INPUT)}
    assert [reason == head for reason in reasons[Role.OUTPUT]] == [False, False, False, True]
    assert [reason == head for reason in reasons[Role.GRAD_INPUT]] == [True, False, False, False]
    assert sum(d.rewritten for d in decisions) == 6


def test_of_a_head_that_is_left_the_whole_backward_is_left() -> None:
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, OUT))
    _, decisions = rewrite(model, x_of(), include=None, recipe="llm_int8")
    left = {(d.parameter, d.role) for d in decisions if not d.rewritten}
    assert left == {("1.weight", role) for role in (Role.OUTPUT, Role.GRAD_INPUT, Role.GRAD_WEIGHT)}
