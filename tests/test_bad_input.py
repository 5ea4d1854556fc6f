"""Unusual input gives right numbers or a clear error, and nothing finite where full precision is not."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import swcompile
from swcompile import Role
from swcompile.kernels import launch
from swcompile.kernels.launch import MISSING_TRITON, DeviceFacts

TOKENS, IN, OUT = 8, 32, 64
ALL: dict[str, Any] = {"include": "*", "skip_slower": False}
RECIPES = pytest.mark.parametrize("recipe", swcompile.RECIPES)

Call = Callable[[torch.Tensor], torch.Tensor]


def compile_(model: nn.Module, **options: Any) -> Call:
    return torch.compile(model, backend="switchback", fullgraph=True, options=ALL | options)


def layer(num_in: int = IN, num_out: int = OUT, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, dtype=dtype)


def run(call: Call, model: nn.Module, x: torch.Tensor, gradient: Any = None) -> list[torch.Tensor]:
    """Output, and the gradients of the input, the weight and the bias."""
    x = x.detach().requires_grad_()
    out = call(x)
    if gradient is None:
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], gradient)]


def assert_right(model: nn.Linear, x: torch.Tensor, recipe: str = "switchback", call: Any = None) -> None:
    """Equal to the oracle within the rounding of float32, and different from full precision."""
    actual = run(compile_(model, recipe=recipe) if call is None else call, model, x)
    expected = run(lambda x: oracle.linear(x, model.weight, model.bias, recipe), model, x)
    exact = run(model, model, x)
    if model.out_features == 1:  # Inductor makes an elementwise product of a sum over one element
        expected[1] = exact[1]
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * (1 + e.abs().max().item()))
    assert not torch.equal(actual[0], exact[0])
    assert swcompile.reports()[-1].num_rewritten(Role.OUTPUT) == 1


@RECIPES
def test_zero_tokens(recipe: str) -> None:
    model = layer()
    out, grad_x, grad_weight, grad_bias = run(compile_(model, recipe=recipe), model, torch.empty(0, IN))
    assert out.shape == (0, OUT) and grad_x.shape == (0, IN)
    assert torch.equal(grad_weight, torch.zeros(OUT, IN)) and torch.equal(grad_bias, torch.zeros(OUT))
    assert swcompile.reports()[-1].num_rewritten(Role.OUTPUT) == 1


@RECIPES
def test_zero_tokens_with_the_cost_rule(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    x = torch.empty(0, IN)
    out = torch.compile(model, backend="switchback", fullgraph=True, options={"recipe": recipe})(x)
    out.sum().backward()
    assert out.shape == (0, IN)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"include": "*"}, ALL], ids=["default", "the last layer", "all"])
def test_no_features_at_all(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that there is nothing to initialise
        model = nn.Linear(0, OUT)
    out = torch.compile(model, backend="switchback", fullgraph=True, options=options)(torch.empty(TOKENS, 0))
    assert torch.equal(out, model.bias.expand(TOKENS, OUT))
    out.sum().backward()
    assert model.bias.grad is not None and model.bias.grad.eq(TOKENS).all()


def test_zero_tokens_and_then_some() -> None:
    model = layer()
    compiled = compile_(model)
    assert run(compiled, model, torch.empty(2, 0, IN))[0].shape == (2, 0, OUT)
    assert_right(model, torch.randn(2, 5, IN), call=compiled)


class OneWeight(nn.Module):
    """A function of an input and a weight."""

    def __init__(self, call: Callable[..., torch.Tensor]):
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight)


BATCHED: dict[str, Callable[..., torch.Tensor]] = {
    "bmm": lambda x, w: torch.bmm(x, w.t().expand(x.shape[0], IN, OUT)),
    "bmm, weight on the left": lambda x, w: torch.bmm(w.expand(x.shape[0], OUT, IN), x.mT).mT,
    "baddbmm": lambda x, w: torch.baddbmm(w.new_ones(OUT), x, w.t().expand(x.shape[0], IN, OUT)),
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("oi,bti->bto", w, x),
}


@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("shape", [(0, 5, IN), (3, 0, IN)])
def test_zero_tokens_in_a_batch(how: str, shape: tuple[int, ...]) -> None:
    model = OneWeight(BATCHED[how])
    out, grad_x, grad_weight = run(compile_(model, strict=True), model, torch.empty(shape))
    assert out.shape == (*shape[:2], OUT) and grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(OUT, IN))


@pytest.mark.parametrize("shape", [(1, IN), (IN,), (1, 1, IN)])
def test_one_token(shape: tuple[int, ...]) -> None:
    assert_right(layer(), torch.randn(shape))


@RECIPES
@pytest.mark.parametrize("sizes", [(7, 13, 5), (3, 1, 5), (5, 17, 1)], ids=str)
def test_sizes_that_are_no_multiples_of_16(sizes: tuple[int, int, int], recipe: str) -> None:
    num_tokens, num_in, num_out = sizes
    assert_right(layer(num_in, num_out), torch.randn(num_tokens, num_in), recipe)


STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.randn(IN, TOKENS).T,
    "every second column": lambda: torch.randn(TOKENS, 2 * IN)[:, ::2],
    "every second row, shifted": lambda: torch.randn(2 * TOKENS, IN + 3)[1::2, 3:],
    "middle of three dimensions": lambda: torch.randn(4, 3, IN)[:, 1],
    "permuted batch": lambda: torch.randn(IN, 4, 3).permute(2, 1, 0),
    "one row expanded": lambda: torch.randn(1, IN).expand(TOKENS, IN),
    "one column expanded": lambda: torch.randn(TOKENS, 1).expand(TOKENS, IN),
    "one element expanded": lambda: torch.randn(()).expand(TOKENS, IN),
}


@pytest.mark.parametrize("how", STRIDED)
def test_strided_and_expanded_input(how: str) -> None:
    model, x = layer(), STRIDED[how]()
    assert not x.is_contiguous()
    assert_right(model, x)


@RECIPES
def test_zero_rows_and_zero_weights(recipe: str) -> None:
    model, x = layer(), torch.randn(TOKENS, IN)
    x[2] = 0
    x[5:7] = 0
    compiled = compile_(model, recipe=recipe)
    out, grad_x, grad_weight, _ = run(compiled, model, x)
    expected = run(model, model, x)
    for actual, exact in zip((out, grad_x, grad_weight), expected, strict=False):
        assert actual.isfinite().all() and (actual - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(out[[2, 5, 6]], model.bias.expand(3, OUT)) and not torch.equal(out[3], expected[0][3])

    gradient = torch.randn(TOKENS, OUT)
    gradient[3] = 0
    assert torch.equal(run(compiled, model, x, gradient)[1][3], torch.zeros(IN))
    with torch.no_grad():
        model.weight.zero_()
    out, grad_x, grad_weight, _ = run(compiled, model, x)
    assert torch.equal(out, model.bias.expand(TOKENS, OUT)) and torch.equal(grad_x, torch.zeros_like(x))
    assert grad_weight.isfinite().all() and grad_weight.any()


def assert_finite_nowhere_else(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
    """Not a finite number where full precision has none."""
    for a, e in zip(actual, exact, strict=True):
        assert not (a.isfinite() & ~e.isfinite()).any()


@RECIPES
def test_nan_and_inf_come_out_where_they_went_in(recipe: str) -> None:
    model, x, gradient = layer(), torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    compiled = compile_(model, recipe=recipe)
    clean = run(compiled, model, x, gradient)
    assert all(value.isfinite().all() for value in clean)
    rest = [row for row in range(TOKENS) if row != 3]
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[3, 7] = bad
        actual = run(compiled, model, broken, gradient)
        assert_finite_nowhere_else(actual, run(model, model, broken, gradient))
        out, grad_x, grad_weight, grad_bias = actual
        assert not out[3].isfinite().any() and torch.equal(out[rest], clean[0][rest])
        assert torch.equal(grad_x, clean[1]) and torch.equal(grad_bias, clean[3])
        assert not grad_weight[:, 7].isfinite().any()
        if recipe != "switchback_m":  # which has one scale for the row of the activation
            columns = [column for column in range(IN) if column != 7]
            assert torch.equal(grad_weight[:, columns], clean[2][:, columns])

        broken = gradient.clone()
        broken[3, 7] = bad
        actual = run(compiled, model, x, broken)
        assert_finite_nowhere_else(actual, run(model, model, x, broken))
        out, grad_x, grad_weight, _ = actual
        assert torch.equal(out, clean[0])
        assert not grad_x[3].isfinite().any() and torch.equal(grad_x[rest], clean[1][rest])
        assert not grad_weight[7].isfinite().any()
        if recipe == "switchback_full":  # which has one scale for the row of the gradient, and that in every column's sum
            assert not grad_weight.isfinite().any()
        else:
            assert grad_weight[8].isfinite().all()

        weight = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[9, 7] = bad
        actual = run(compiled, model, x, gradient)
        assert_finite_nowhere_else(actual, run(model, model, x, gradient))
        if "tensor" in swcompile.reports()[-1].decisions[0].reason:  # one scale for all of the weight
            assert not actual[0].isfinite().any() and not actual[1].isfinite().any()
        with torch.no_grad():
            model.weight.copy_(weight)


def test_a_result_that_float16_cannot_hold_is_infinite() -> None:
    model = layer(IN, OUT, torch.float16)
    x = torch.full((TOKENS, IN), 60000.0, dtype=torch.float16)
    x[3] = 1
    with torch.no_grad():
        model.weight.fill_(1)
    out = compile_(model)(x)
    assert_finite_nowhere_else([out], [model(x)])
    assert out[:3].isposinf().all() and out[3].isfinite().all()


class Added(nn.Module):
    """``addmm`` with what is added, and factors."""

    def __init__(self, addend: torch.Tensor, dtype: torch.dtype = torch.float32, **factors: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN).to(dtype))
        self.addend = nn.Parameter(addend.to(dtype))
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.addend, x, self.weight.t(), **self.factors)


@pytest.mark.parametrize("shape", [(OUT,), (TOKENS, OUT)])
def test_an_addend_times_zero_is_ignored_nan_and_all(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = OneWeight(lambda x, w: torch.addmm(torch.full(shape, torch.nan), x, w.t(), beta=0, alpha=2))
    x = torch.randn(TOKENS, IN)
    torch.testing.assert_close(compile_(model)(x), 2 * oracle.linear(x, model.weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (1, OUT), (TOKENS, 1), (TOKENS, OUT)])
@pytest.mark.parametrize("factors", [{}, {"beta": 0.3}, {"alpha": 0.7, "beta": 0.3}], ids=str)
def test_an_addend_of_any_shape_is_added_before_the_one_rounding(
    shape: tuple[int, ...], factors: dict[str, float]
) -> None:
    torch.manual_seed(0)
    model = Added(torch.randn(shape), torch.bfloat16, **factors)
    x = torch.randn(TOKENS, IN).bfloat16()
    product = oracle.linear(x.double(), model.weight.double())
    beta, alpha = factors.get("beta", 1), factors.get("alpha", 1)
    expected = (beta * model.addend.double() + alpha * product).bfloat16()
    out = compile_(model)(x)
    assert (out != expected).float().mean() < 0.01  # one rounding: only float32's own tips some to a neighbour
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-3)
    assert not torch.equal(out, model(x))


def test_a_product_that_a_factor_brings_into_the_range_of_float16_is_finite() -> None:
    model = Added(torch.zeros(OUT), torch.float16, alpha=1e-2)
    with torch.no_grad():
        model.weight.fill_(100)
    out = compile_(model)(torch.full((TOKENS, IN), 100.0, dtype=torch.float16))
    torch.testing.assert_close(out, torch.full((TOKENS, OUT), 3200.0, dtype=torch.float16), rtol=2**-10, atol=0)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A backend that gives ours what it would get of a model on a GPU."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        def move(value: torch.Tensor) -> torch.Tensor:
            with FakeTensorMode():
                fake = torch.empty(value.shape, device="cuda:0")
            return nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake

        return swcompile.switchback(gm, [move(value) for value in inputs], options=ALL)

    launch.require_supported_gpu.cache_clear()
    yield backend
    launch.require_supported_gpu.cache_clear()


def test_a_gpu_without_int8_tensor_cores(on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    monkeypatch.setattr(launch, "device_facts", lambda device: DeviceFacts("Tesla T4", (7, 5), 40, 65536))
    with pytest.raises(Exception, match=r"8\.0 \(Ampere\) or later; Tesla T4 \(cuda:0\) has 7\.5\. Run on"):
        torch.compile(layer(), backend=on_cuda)(torch.randn(TOKENS, IN))
    monkeypatch.setattr(launch, "device_facts", lambda device: DeviceFacts("A10", (8, 6), 72, 102400))
    launch.require_supported_gpu.cache_clear()
    launch.require_supported_gpu(0)


def test_a_gpu_without_triton(on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    with pytest.raises(Exception, match="need Triton 3.6 or later.*pip install triton.*or run the model"):
        torch.compile(layer(), backend=on_cuda)(torch.randn(TOKENS, IN))
    with pytest.raises(RuntimeError, match=MISSING_TRITON[:40]):
        launch._MissingTriton().jit(lambda x: x)[(1,)]


def test_a_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    assert_right(layer(), torch.randn(TOKENS, IN))


def test_a_device_that_no_kernel_knows_is_left_alone() -> None:
    model = layer().to("meta")
    out = compile_(model)(torch.empty(TOKENS, IN, device="meta"))
    assert out.shape == (TOKENS, OUT) and out.device.type == "meta"
    assert swcompile.reports()[-1].decisions[0].reason == "no int8 kernel for device meta"
    with pytest.raises(swcompile.StrictError, match="no int8 kernel for device meta"):
        swcompile.explain(model, torch.empty(TOKENS, IN, device="meta"), **ALL, strict=True)
