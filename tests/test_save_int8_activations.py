"""save_int8_activations: the graph that it makes, and what the forward then keeps for the backward."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from partition import run_partitioned
from torch import fx, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import swcompile
from swcompile import Decision, Role, Scaling, format_graph, joint_passes, make_recipe
from swcompile.kernels.dequantize import DEQUANTIZE
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE

TOKENS, IN, OUT = 8, 32, 64
ALL: dict[str, Any] = {"recipe": "switchback_m", "include": ["*"], "skip_slower": False}

AFTER = """\
%0: f32[64, 32] = parameter weight
%1: f32[8, 32] = input
%2: f32[8, 64] = tangent
%3: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%1)
%4: i8[8, 32] = getitem(%3, 0)
%5: f32[8, 1] = getitem(%3, 1)
%6: (i8[64, 32], f32[1, 1]) = swcompile.quantize_tensorwise(%0)
%7: i8[64, 32] = getitem(%6, 0)
%8: f32[1, 1] = getitem(%6, 1)
%9: f32[8, 64] = swcompile.scaled_mm(%4, %7, %5, %8, None, f32)
%10: f32[64, 8] = aten.permute(%2, [1, 0])
%11: f32[8, 32] = swcompile.dequantize(%4, %5, f32)
%12: f32[64, 32] = aten.mm(%10, %11)
%13: f32[32, 64] = aten.permute(%12, [1, 0])
%14: f32[64, 32] = aten.permute(%13, [1, 0])
return %9, %14, None"""


class Layer(nn.Module):
    """A layer in a spelling of its own."""

    def __init__(self, spelling: Callable[..., torch.Tensor], *shape: int):
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(x, self.weight)


def notes(decisions: Sequence[Decision]) -> dict[str | None, str]:
    """Weight -> what was noted about its gradient's matmul."""
    return {d.parameter: d.reason.partition("; ")[2] for d in decisions if d.role is Role.GRAD_WEIGHT}


def test_one_layer() -> None:
    torch.manual_seed(0)
    model, x, tangent = nn.Linear(IN, OUT, bias=False), torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    joint = swcompile.capture(model, x)
    decisions = joint.run_passes(joint_passes(make_recipe(ALL)))
    assert format_graph(joint.graph) == AFTER
    assert [(d.role, d.rewritten) for d in decisions] == [(Role.OUTPUT, True), (Role.GRAD_WEIGHT, False)]
    left = "recipe switchback_m leaves grad_weight (sums over 8 tokens)"
    assert decisions[1].reason == f"{left}; reads the int8 activation"
    _, gradients = joint(tangent)
    rounded = oracle.fake_quantize(x, Scaling.VECTOR).float()
    torch.testing.assert_close(gradients["weight"], tangent.T @ rounded, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gradients["weight"], tangent.T @ x, rtol=1e-3, atol=1e-3)


SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, int]]] = {
    "linear": (linear, (OUT, IN)),
    "weight of [in, out]": (lambda x, w: x @ w, (IN, OUT)),
    "three dimensions": (lambda x, w: linear(x.view(2, 4, IN), w).flatten(0, 1), (OUT, IN)),
    "transposed": (lambda x, w: linear(x.view(2, 4, IN).transpose(0, 1), w).flatten(0, 1), (OUT, IN)),
    "column-major input": (lambda x, w: linear(x.T.contiguous().T, w), (OUT, IN)),
    "column-major input, [in, out]": (lambda x, w: x.T.contiguous().T @ w, (IN, OUT)),
    "two readers": (lambda x, w: linear(x, w[:OUT]) + linear(x, w[OUT:]), (2 * OUT, IN)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_reads_the_int8_activation(name: str) -> None:
    torch.manual_seed(0)
    spelling, shape = SPELLINGS[name]
    model, x, tangent = Layer(spelling, *shape), torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    joint = swcompile.capture(model, x)
    decisions = joint.run_passes(joint_passes(make_recipe(ALL)))
    assert notes(decisions) == {"weight": "reads the int8 activation"}
    _, gradients = joint(tangent)
    rounded = oracle.fake_quantize(x, Scaling.VECTOR).float()
    (expected,) = torch.autograd.grad(model(rounded), model.weight, tangent)
    (exact,) = torch.autograd.grad(model(x), model.weight, tangent)
    torch.testing.assert_close(gradients["weight"], expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(gradients["weight"], exact, rtol=1e-3, atol=1e-3)


def test_an_activation_that_the_forward_left_alone_is_left_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    joint = swcompile.capture(model, torch.randn(TOKENS, IN))
    decisions = joint.run_passes(joint_passes(make_recipe(ALL | {"exclude": "2.weight"})))
    assert notes(decisions) == {
        "0.weight": "reads the int8 activation",
        "2.weight": "its activation is not in int8",
    }
    assert len(joint.graph.find_nodes(op="call_function", target=DEQUANTIZE)) == 1


def test_a_batch_of_products_is_left_with_a_note() -> None:
    model = Layer(lambda x, w: torch.bmm(x.view(2, 4, IN), w.expand(2, IN, OUT)), IN, OUT)
    decisions = swcompile.capture(model, torch.randn(TOKENS, IN)).run_passes(joint_passes(make_recipe(ALL)))
    assert notes(decisions) == {"weight": "a batch of products reads its activation as it is"}


def test_a_gradient_that_is_in_int8_already_is_no_concern() -> None:
    recipe = dataclasses.replace(make_recipe(ALL | {"recipe": "llm_int8"}), save_int8_activations=True)
    decisions = swcompile.capture(nn.Linear(IN, OUT), torch.randn(TOKENS, IN)).run_passes(joint_passes(recipe))
    assert notes(decisions) == {"weight": ""} and all(d.rewritten for d in decisions)


FULL = dataclasses.replace(make_recipe(ALL | {"recipe": "switchback_full"}), save_int8_activations=True)
"""All three matmuls in int8, and the activations that are kept."""


def test_an_int8_gradient_of_the_weight_is_quantised_from_the_int8_activation() -> None:
    torch.manual_seed(0)
    tokens = 2100  # in three blocks
    model, x, tangent = nn.Linear(IN, OUT, bias=False), torch.randn(tokens, IN), torch.randn(tokens, OUT)
    joint = swcompile.capture(model, x)
    decisions = joint.run_passes(joint_passes(FULL))
    assert notes(decisions) == {"weight": "reads the int8 activation"} and all(d.rewritten for d in decisions)
    (pair,) = joint.graph.find_nodes(op="call_function", target=QUANTIZE_BLOCKWISE_TRANSPOSE)
    assert [source.meta["val"].dtype for source in pair.all_input_nodes] == [torch.int8, torch.float32]
    _, gradients = joint(tangent)
    rounded = oracle.fake_quantize(x, Scaling.VECTOR)
    expected = oracle.gemm(tangent.T, rounded.T, FULL.grad_weight)
    torch.testing.assert_close(gradients["weight"].double(), expected, rtol=1e-4, atol=1e-2)  # of up to 170
    from_float = oracle.gemm(tangent.T, x.T, FULL.grad_weight)
    assert (gradients["weight"] - expected).norm() < 0.1 * (from_float - expected).norm()


def test_several_int8_gradients_read_one_int8_activation() -> None:
    model, x = Projections(), torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    joint = swcompile.capture(model, x)
    decisions = joint.run_passes(joint_passes(FULL))
    assert set(notes(decisions).values()) == {"reads the int8 activation"}
    pairs = joint.graph.find_nodes(op="call_function", target=QUANTIZE_BLOCKWISE_TRANSPOSE)
    # q, k and v have one gradient and one activation, which are quantised once.
    assert len(pairs) == 2 and len({pair.args[0] for pair in pairs}) == 2


def saved(model: nn.Module, x: torch.Tensor, recipe: Any) -> list[torch.Tensor]:
    """What the forward keeps for the backward, of a model partitioned as Inductor does."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return run_partitioned(gm, inputs, joint_passes(make_recipe(ALL | {"recipe": recipe})))

    kept: list[torch.Tensor] = []
    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    out.backward(torch.ones_like(out))
    assert all(p.grad is not None for p in model.parameters())
    weights = {p.data_ptr() for p in model.parameters()}
    return [tensor for tensor in kept if tensor.data_ptr() not in weights]


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


WIDTH, NUM_TOKENS = 64, 40
WEIGHT_SCALE = "torch.float32", (1, 1)


@pytest.mark.parametrize("recipe", [*swcompile.RECIPES, FULL], ids=lambda recipe: getattr(recipe, "name", recipe) + "+int8" * (recipe is FULL))
def test_the_forward_keeps_activations_in_int8_and_weights_never(recipe: Any) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))).bfloat16()
    kept = saved(model, torch.randn(NUM_TOKENS, WIDTH, dtype=torch.bfloat16), recipe)
    kinds = sorted((str(t.dtype), tuple(t.shape)) for t in kept)
    num_scales = 0 if recipe in ("switchback_q", "llm_int8") else 2  # of weights with one scale that the backward reads
    if recipe in ("switchback_m", FULL):
        scales = [WEIGHT_SCALE] * num_scales + [("torch.float32", (NUM_TOKENS, 1))] * 3
        assert kinds == scales + [("torch.int8", (NUM_TOKENS, WIDTH))] * 3
        assert num_bytes(kept) == 3 * NUM_TOKENS * (WIDTH + 4) + 4 * num_scales
    else:
        assert kinds == [("torch.bfloat16", (NUM_TOKENS, WIDTH))] * 3 + [WEIGHT_SCALE] * num_scales
        assert num_bytes(kept) == 3 * NUM_TOKENS * WIDTH * 2 + 4 * num_scales


class Projections(nn.Module):
    """Three layers that read one activation, which the backward reads nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_activation_of_several_layers_is_kept_once_in_int8(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model, x = Projections().to(dtype), torch.randn(NUM_TOKENS, WIDTH, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        kept = saved(model, x, "switchback_m")
    kinds = sorted((str(t.dtype), tuple(t.shape)) for t in kept)
    scales = [WEIGHT_SCALE] * 3 + [("torch.float32", (NUM_TOKENS, 1))] * 2
    assert kinds == scales + [("torch.int8", (NUM_TOKENS, WIDTH))] * 2


def test_a_column_major_activation_is_kept_in_int8() -> None:
    model = nn.Linear(WIDTH, WIDTH, bias=False).bfloat16()
    (values, scales) = saved(model, torch.randn(WIDTH, NUM_TOKENS, dtype=torch.bfloat16).T, "switchback_m")
    assert (values.dtype, values.shape, scales.numel()) == (torch.int8, (NUM_TOKENS, WIDTH), NUM_TOKENS)


class Attention(nn.Module):
    """A packed projection, attention, and a projection of its output, which attention's backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.view(2, -1, 4, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_the_backward_reads_anyway_is_not_kept_twice() -> None:
    torch.manual_seed(0)
    model, x = Attention().bfloat16(), torch.randn(2, NUM_TOKENS, WIDTH, dtype=torch.bfloat16)
    kept = {recipe: saved(model, x, recipe) for recipe in ("switchback", "switchback_m")}
    # The first input goes from 2 bytes an element to 1, and 4 a row; attention's operands and output stay.
    saving = x.numel() - 4 * 2 * NUM_TOKENS
    assert num_bytes(kept["switchback"]) - num_bytes(kept["switchback_m"]) == saving
    assert [t.numel() for t in kept["switchback_m"] if t.dtype == torch.int8] == [x.numel()]
