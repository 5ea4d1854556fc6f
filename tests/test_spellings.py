"""However a model spells a linear layer, the compiled result is the oracle's: same rounding, plain eager ops."""

import re
from collections.abc import Callable

import oracle
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear

import swcompile
from swcompile import Role

TOKENS, BATCH, IN, OUT = 6, 4, 48, 80
ALL = {"include": ["*"], "skip_slower": False, "strict": True}

Spelling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [batch, tokens, in], weight [out, in], bias [out] -> [batch, tokens, out]"""

SPELLINGS: dict[str, Spelling] = {
    "linear": lambda x, w, b: linear(x, w, b),
    "linear_without_bias": lambda x, w, b: linear(x, w) + b,
    "matmul": lambda x, w, b: x @ w.T + b,
    "matmul_mT": lambda x, w, b: torch.matmul(x, w.mT) + b,
    "mm": lambda x, w, b: (torch.mm(x.reshape(-1, IN), w.t()) + b).view(BATCH, TOKENS, OUT),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).unflatten(0, (BATCH, TOKENS)),
    "addmm_scaled": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), beta=0.5, alpha=2.0).view(BATCH, TOKENS, OUT),
    "addmm_matrix": lambda x, w, b: torch.addmm(b.expand(24, OUT), x.flatten(0, 1), w.t()).view(BATCH, TOKENS, OUT),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.t().expand(BATCH, IN, OUT)),
    "bmm_expanded": lambda x, w, b: torch.bmm(x, w.t().expand(BATCH, IN, OUT)) + b,
    "bmm_weight_left": lambda x, w, b: torch.bmm(w.expand(BATCH, OUT, IN), x.mT).mT + b,
    "einsum": lambda x, w, b: torch.einsum("bti,oi->bto", x, w) + b,
    "einsum_weight_first": lambda x, w, b: torch.einsum("oi,bti->bto", w, x) + b,
    "weight_left": lambda x, w, b: (w @ x.flatten(0, 1).T).T.unflatten(0, (BATCH, TOKENS)) + b,
    "transposed_input": lambda x, w, b: linear(x.transpose(0, 1), w, b).transpose(0, 1),
    "five_dimensions": lambda x, w, b: linear(x[:, None, :, None], w, b)[:, 0, :, 0],
    "one_token_each": lambda x, w, b: torch.stack([linear(row, w, b) for row in x.unbind(1)], 1),
}


class Layer(nn.Module):
    def __init__(self, spelling: Spelling, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(OUT, IN, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(OUT, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(x, self.weight, self.bias)


def gradients(call: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, of the input first."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = call(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out))
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-5) -> None:
    """Within rounding of the largest element: sums of float32 in another order."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * e.abs().max().item())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str) -> None:
    torch.manual_seed(0)
    model = Layer(SPELLINGS[spelling])
    x = torch.randn(BATCH, TOKENS, IN)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=ALL)
    actual = gradients(compiled, model, x)
    report = swcompile.reports()[-1]
    assert report.num_rewritten(Role.OUTPUT) >= 1 and report.num_rewritten(Role.OTHER) == 0
    assert all(d.rewritten for d in report.decisions if d.role in (Role.OUTPUT, Role.GRAD_INPUT))
    assert all(d.parameter == "weight" for d in report.decisions)

    scale = {"addmm_scaled": 2.0}.get(spelling, 1.0)
    beta = {"addmm_scaled": 0.5}.get(spelling, 1.0)
    expected = gradients(lambda x: scale * oracle.linear(x, model.weight) + beta * model.bias, model, x)
    assert_same(actual, expected)
    exact = gradients(model, model, x)
    assert not torch.equal(actual[0], exact[0]) and not torch.equal(actual[1], exact[1])


@pytest.mark.parametrize("recipe", swcompile.RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recipe(recipe: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Layer(SPELLINGS["linear"], dtype)
    x = torch.randn(BATCH, TOKENS, IN, dtype=dtype)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options={"recipe": recipe, **ALL})
    actual = gradients(compiled, model, x)
    expected = gradients(lambda x: oracle.linear(x, model.weight, model.bias, recipe), model, x)
    # One rounding to the dtype, and for 16-bit grad_weight operands that are rounded before they are summed.
    assert_same(actual, expected, rtol={torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_quantises_the_float32_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Layer(SPELLINGS["linear"])
    x = torch.randn(BATCH, TOKENS, IN)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=ALL)
    with torch.autocast("cpu", dtype):
        actual = compiled(x)
    assert actual.dtype == dtype
    quantized = oracle.fake_quantize(model.weight.detach(), swcompile.Scaling.TENSOR)
    rows = oracle.fake_quantize(x.to(dtype).flatten(0, 1), swcompile.Scaling.VECTOR)
    expected = (rows @ quantized.T + model.bias.to(dtype)).to(dtype).view_as(actual)
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    from_cast_weight = oracle.fake_quantize(model.weight.detach().to(dtype), swcompile.Scaling.TENSOR)
    assert not torch.equal(quantized, from_cast_weight)


STORED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "float64": (torch.Tensor.double, torch.Tensor.float),
    "int8": (lambda w: (20 * w).to(torch.int8), torch.Tensor.float),
    "fp8": (lambda w: w.to(torch.float8_e4m3fn), torch.Tensor.float),
    "rounded to integers": (lambda w: 5 * w, lambda w: w.to(torch.int32).float()),
    "rounded to fp8": (lambda w: w, lambda w: w.to(torch.float8_e5m2).float()),
    "rounded to fp8, transposed": (lambda w: w.T.contiguous(), lambda w: w.T.to(torch.float8_e5m2).float()),
}
"""How a weight is stored, and what its layer makes of it."""


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", STORED)
def test_a_cast_that_says_something_about_the_weight_stays(how: str, autocast: bool) -> None:
    torch.manual_seed(0)
    store, load = STORED[how]

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(store(torch.randn(OUT, IN)), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, load(self.weight))

    model = Stored()
    x = torch.randn(BATCH, TOKENS, IN)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=ALL)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = compiled(x.requires_grad_())
    (grad,) = torch.autograd.grad(actual, x, torch.ones_like(actual))
    rows = x.detach().to(actual.dtype)
    expected = oracle.linear(rows.requires_grad_(), load(model.weight))
    (expected_grad,) = torch.autograd.grad(expected, rows, torch.ones_like(expected))
    assert_same([actual, grad.to(rows.dtype)], [expected, expected_grad], rtol=2**-7 if autocast else 1e-5)
    assert "weight" in {d.parameter for d in swcompile.reports()[-1].decisions if d.rewritten}


@pytest.mark.parametrize("spelling", ["bmm_expanded", "baddbmm", "bmm_weight_left"])
def test_one_weight_for_a_batch_under_autocast(spelling: str) -> None:
    torch.manual_seed(0)
    model = Layer(SPELLINGS[spelling])
    x = torch.randn(BATCH, TOKENS, IN)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        actual = compiled(x)
    expected = oracle.linear(x.bfloat16(), model.weight) + model.bias
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-6, atol=2**-6 * expected.abs().max().item())
    assert swcompile.reports()[-1].num_rewritten(Role.OUTPUT) == 1


def test_views_of_a_cast_that_the_weight_itself_does_not_allow() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(OUT, 2 * IN))

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight[:, :IN].bfloat16().view(-1).view(OUT, IN))

    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16)
    actual = torch.compile(Sliced(), backend="switchback", fullgraph=True, options=ALL)(x)
    assert_same([actual], [oracle.linear(x, weight[:, :IN])], rtol=2**-7)


def test_hugging_face_conv1d() -> None:
    torch.manual_seed(0)
    model = transformers.pytorch_utils.Conv1D(OUT, IN)
    x = torch.randn(BATCH, TOKENS, IN)
    actual = gradients(torch.compile(model, backend="switchback", fullgraph=True, options=ALL), model, x)
    expected = gradients(lambda x: oracle.linear(x, model.weight.T, model.bias), model, x)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_multihead_attention_packed_projections(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(IN, 4, batch_first=True)
    memory = torch.randn(BATCH, 10, IN, requires_grad=True)

    def call(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: module(x, *((x, x) if kind == "self" else (memory, memory)), need_weights=False)[0]

    report = swcompile.explain(call(model), torch.randn(BATCH, TOKENS, IN, requires_grad=True), **ALL)
    num_projections = {"self": 2, "cross": 3}[kind]
    assert report.num_rewritten(Role.OUTPUT) == report.num_rewritten(Role.GRAD_INPUT) == num_projections
    assert {d.parameter for d in report.decisions} == {"in_proj_weight", "out_proj.weight"}
    x = torch.randn(BATCH, TOKENS, IN)
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=ALL)
    for actual, expected in zip(
        gradients(call(compiled), model, x), gradients(call(model), model, x), strict=True
    ):
        assert 0 < (actual - expected).norm() / expected.norm() < 0.05


def test_tied_and_shared_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(IN, IN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(linear(x, self.weight).relu(), self.weight) @ self.weight

    torch.manual_seed(0)
    model = Tied()
    x = torch.randn(BATCH, TOKENS, IN)
    actual = gradients(torch.compile(model, backend="switchback", fullgraph=True, options=ALL), model, x)

    def expected(x: torch.Tensor) -> torch.Tensor:
        hidden = oracle.linear(oracle.linear(x, model.weight).relu(), model.weight)
        return oracle.linear(hidden, model.weight.T)

    assert_same(actual, gradients(expected, model, x))
    report = swcompile.reports()[-1]
    assert [report.num_rewritten(role) for role in (Role.OUTPUT, Role.GRAD_INPUT, Role.GRAD_WEIGHT)] == [3, 3, 0]


def test_frozen_weight_has_no_grad_weight_and_keeps_int8_grad_input() -> None:
    torch.manual_seed(0)
    model = Layer(SPELLINGS["linear"])
    model.weight.requires_grad_(False)
    x = torch.randn(BATCH, TOKENS, IN)
    actual = gradients(torch.compile(model, backend="switchback", fullgraph=True, options=ALL), model, x)
    assert model.weight.grad is None and not model.weight.requires_grad
    assert_same(actual, gradients(lambda x: oracle.linear(x, model.weight, model.bias), model, x))
    roles = [d.role for d in swcompile.reports()[-1].decisions]
    assert roles == [Role.OUTPUT, Role.GRAD_INPUT]


def test_input_without_gradient_has_no_grad_input() -> None:
    model = Layer(SPELLINGS["linear"])
    report = swcompile.explain(model, torch.randn(BATCH, TOKENS, IN), **ALL)
    assert [d.role for d in report.decisions] == [Role.OUTPUT, Role.GRAD_WEIGHT]


def test_lora_side_branch() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(IN, OUT)
            self.base.requires_grad_(False)
            self.down = nn.Linear(IN, 4, bias=False)
            self.up = nn.Linear(4, OUT, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model = Lora()
    x = torch.randn(BATCH, TOKENS, IN)
    options = {"include": ["base.*"], "skip_slower": False, "strict": True}
    actual = gradients(torch.compile(model, backend="switchback", fullgraph=True, options=options), model, x)
    report = swcompile.reports()[-1]
    assert [d.parameter for d in report.decisions if d.rewritten] == ["base.weight"] * 2
    assert {d.reason for d in report.decisions if not d.rewritten} == {"no include pattern matches"} | {
        f"recipe switchback leaves grad_weight (sums over {BATCH * TOKENS} tokens)"
    }

    def expected(x: torch.Tensor) -> torch.Tensor:
        return oracle.linear(x, model.base.weight, model.base.bias) + model.up(model.down(x))

    assert_same(actual, gradients(expected, model, x))


class MergedLora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(IN, IN))
        self.a, self.b = nn.Parameter(torch.randn(4, IN)), nn.Parameter(torch.randn(IN, 4))
        self.proj = nn.Linear(IN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(linear(x, self.weight + self.b @ self.a))


class WeightNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(IN, IN)), nn.Linear(IN, OUT))


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(TOKENS, IN))
        self.proj = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.queries.expand(BATCH, -1, -1)) + x


ORIGINAL = "0.parametrizations.weight.original"
COMPUTED: dict[str, tuple[type[nn.Module], str, str]] = {
    "merged LoRA": (MergedLora, "weight", "an operand is computed from a, b, weight; only a parameter"),
    "low-rank product": (MergedLora, "a", "a product of parameters alone: a, b"),
    "weight norm": (WeightNorm, "0.*", f"an operand is computed from {ORIGINAL}0, {ORIGINAL}1; only a"),
    "learned queries": (Queries, "proj.*", "a product of parameters alone: proj.weight, queries"),
}
"""Model, what is asked for, why it is left."""


@pytest.mark.parametrize("case", COMPUTED)
def test_a_product_with_what_is_computed_from_parameters_is_left_with_a_reason(case: str) -> None:
    torch.manual_seed(0)
    make, include, reason = COMPUTED[case]
    model, x = make(), torch.randn(BATCH, TOKENS, IN)
    options = {"include": include, "skip_slower": False}
    report = swcompile.explain(model, x.requires_grad_(), **options)
    assert report.num_rewritten() == 0 and reason in "\n".join(d.reason for d in report.decisions if d.violation)
    with pytest.raises(swcompile.StrictError, match=re.escape(reason)):
        swcompile.explain(model, x, **options, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="switchback", fullgraph=True, options=options)
    for actual, exact in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
        assert (actual - exact).norm() <= 0.05 * exact.norm()


def test_excluding_what_a_weight_is_computed_from_settles_it() -> None:
    x = torch.randn(TOKENS, IN)
    report = swcompile.explain(MergedLora(), x, **(ALL | {"exclude": ["a", "weight"]}))
    assert [d.parameter for d in report.decisions if d.rewritten] == ["proj.weight"] * report.num_rewritten()
    assert report.num_rewritten(Role.OUTPUT) == 1 and report.num_rewritten(Role.OTHER) == 0


def test_a_batch_of_weights_is_left_with_a_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(BATCH, IN, OUT))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.weight)

    report = swcompile.explain(Experts(), torch.randn(BATCH, TOKENS, IN), include=["*"], skip_slower=False)
    assert report.num_rewritten() == 0
    assert report.decisions[0].reason == f"a batch of {BATCH} weights: the int8 kernel multiplies one"
    with pytest.raises(swcompile.StrictError, match="a batch of 4 weights"):
        swcompile.explain(Experts(), torch.randn(BATCH, TOKENS, IN), **ALL)
