"""quantize_rowwise: what the rule gives, and that the kernel gives the rule's bits."""

import pytest
import torch

from swcompile.kernels.int8 import SMALLEST_ABSMAX
from swcompile.kernels.quantize_rowwise import (
    QUANTIZE_ROWWISE,
    RowwiseConfig,
    candidates,
    launcher,
    quantize_rowwise,
    quantize_rowwise_reference,
    quantize_rowwise_triton,
    quantize_rowwise_work,
)

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the kernel runs in Triton's interpreter on the latter
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IMPLEMENTATIONS = [quantize_rowwise_reference, quantize_rowwise_triton]


def assert_same_bits(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.dtype == e.dtype and a.shape == e.shape
        a, e = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (a, e))
        assert torch.equal(a.cpu(), e.cpu())


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_table(quantize, dtype):
    # absmax 127 makes the scale 1, so each value is rounded as it stands: half to even, and never to -128
    table = {127: 127, 0.5: 0, 1.5: 2, 2.5: 2, 3.5: 4, -0.5: 0, -1.5: -2, -2.5: -2, 0.498: 0, 0.502: 1}
    table |= {63.5: 64, -63.5: -64, 62.5: 62, 100.25: 100, -127: -127, 0: 0}
    x = torch.tensor([list(table)], dtype=dtype, device=DEVICE)
    x_q, scale = quantize(x)
    assert x_q.tolist() == [list(table.values())]
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.bfloat16, (-90, 0, 110)), (torch.float16, (-14, 0, 8)), (torch.float32, (-90, 0, 120))],
)
def test_representable_values_come_back_exactly(quantize, dtype, exponents):
    codes = torch.arange(-127, 128, device=DEVICE)
    x = torch.stack([codes * 2.0**exponent for exponent in exponents]).to(dtype)
    x_q, scale = quantize(x)
    assert torch.equal(x_q, codes.to(torch.int8).expand_as(x_q))
    assert torch.equal(x_q * scale, x.float())


@pytest.mark.parametrize("dtype", DTYPES)
# below, at and above what one warp takes of a row; sizes that fit no block; one that is read twice
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (3, 16), (7, 83), (9, 256), (5, 1280), (2, 3000), (2, 33000)]
)
def test_kernel_equals_reference(dtype, shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[0], 1).mul(20).sub(10).exp2()).to(DEVICE, dtype)
    assert_same_bits(quantize_rowwise_triton(x), quantize_rowwise_reference(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, ::3],
        lambda x: x.t(),
        lambda x: x[:1].expand(6, -1),
        lambda x: x[:, 5:90],
    ],
)
def test_any_strides(view):
    x = view(torch.randn(12, 100, dtype=torch.bfloat16, device=DEVICE))
    assert_same_bits(quantize_rowwise_triton(x), quantize_rowwise_reference(x.clone()))


def test_ties_that_a_fused_multiply_add_would_move():
    # (k + 1/2) * absmax / 127, a few ulp up and down, over many absmax: products land beside and on the ties
    absmax = torch.rand(64, 1).add(0.5)
    ties = (torch.arange(-127, 127) + 0.5) * (absmax / 127)
    ulps = torch.arange(-3, 4).repeat(64, 37)[:, : ties.shape[1]]
    x = torch.cat([absmax, (ties.view(torch.int32) + ulps).view(torch.float32)], 1).to(DEVICE)
    assert_same_bits(quantize_rowwise_triton(x), quantize_rowwise_reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_half_a_step_at_most(dtype):
    x = torch.randn(64, 300).to(dtype)
    x_q, scale = quantize_rowwise(x)
    assert torch.equal(scale, x.abs().amax(1, keepdim=True).float() / torch.tensor(127.0))
    error = (x_q * scale - x.float()).abs() / scale
    assert (
        0.45 < error.max() <= 0.5 + 127 * 2**-23
    )  # the last term: rounding of the reciprocal, product and scale
    assert x_q.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_zero_row_has_a_finite_scale(quantize):
    x = torch.zeros(3, 20, device=DEVICE)
    x[1] = 1.0
    x_q, scale = quantize(x)
    assert x_q[::2].eq(0).all() and x_q[1].eq(127).all()
    assert scale[0].item() == pytest.approx(SMALLEST_ABSMAX / 127)


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("poison", "column"), [(float("nan"), 0), (float("inf"), 299), (-float("inf"), 150)])
def test_not_finite_row_gets_scale_nan(quantize, dtype, poison, column):
    x = torch.randn(3, 300).to(dtype)
    clean = quantize_rowwise_reference(x)
    x[1, column] = poison
    x_q, scale = (t.cpu() for t in quantize(x.to(DEVICE)))
    assert scale[1].isnan() and x_q[1].eq(0).all()
    assert_same_bits(
        (x_q[::2].contiguous(), scale[::2].contiguous()),
        (clean[0][::2].contiguous(), clean[1][::2].contiguous()),
    )


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_tiny_and_huge_magnitudes(quantize):
    largest = torch.finfo(torch.float32).max
    sizes = torch.tensor([2.0**-149, 1e-40, 2.0**-126, 1e-35, 2.0**-100, 1e-29, 1e30, largest], device=DEVICE)
    x = torch.linspace(-1, 1, 33, device=DEVICE) * sizes[:, None]
    x_q, scale = quantize(x)
    assert scale.isfinite().all() and (scale >= torch.finfo(torch.float32).tiny).all()
    error = (x_q.double() * scale.double() - x.double()).abs()
    assert (error <= 0.501 * scale).all()
    assert x_q[-3:].abs().amax(1).eq(127).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_empty(quantize, shape):
    x_q, scale = quantize(torch.empty(shape, device=DEVICE))
    assert x_q.shape == shape and scale.shape == (shape[0], 1) and scale.isfinite().all()


@pytest.mark.parametrize("num_columns", [200, 1280, 2304])
def test_every_configuration_gives_the_same_bits(num_columns):
    x = torch.randn(11, num_columns, dtype=torch.bfloat16, device=DEVICE)
    expected = quantize_rowwise_reference(x)
    configs = candidates(num_columns)
    assert 1 <= len(configs) <= 8
    for config in [*configs, RowwiseConfig(1, 2, num_stages=3)]:
        x_q, scale = torch.full_like(expected[0], -1), torch.full_like(expected[1], -1)
        launcher(config, x)(x, x_q, scale)
        assert_same_bits((x_q, scale), expected)


@pytest.mark.parametrize("quantize", [quantize_rowwise, *IMPLEMENTATIONS])
def test_user_errors(quantize):
    with pytest.raises(ValueError, match="float64.*must be bfloat16"):
        quantize(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="3 dimensions"):
        quantize(torch.ones(2, 2, 2))


@pytest.mark.parametrize("x", [torch.randn(5, 24), torch.randn(24, 5).t(), torch.randn(1, 3).bfloat16()])
def test_opcheck(x):
    torch.library.opcheck(QUANTIZE_ROWWISE, (x.to(DEVICE),))


def test_work():
    # 3 rows of 5 bfloat16: 30 bytes in, 15 of int8 and 12 of scales out
    assert quantize_rowwise_work(3, 5, 2) == (30, 57)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((32768, 1280), torch.bfloat16),
        ((8192, 4096), torch.float16),
        ((8192, 5120), torch.bfloat16),
        ((2048, 16384), torch.float32),
        ((100, 50000), torch.bfloat16),
        ((777, 1111), torch.float32),
    ],
)
def test_large(shape, dtype):
    x = torch.randn(shape, device="cuda").mul_(torch.rand(shape[0], 1, device="cuda")).to(dtype)
    assert_same_bits(quantize_rowwise(x), quantize_rowwise_reference(x))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda").repeat(8200, 1)
    assert x.numel() > 2**31
    x_q, scale = quantize_rowwise(x)
    expected_q, expected_scale = quantize_rowwise_reference(x[:64])
    assert torch.equal(x_q.view(-1, 64, 4096), expected_q.expand(8200, -1, -1))
    assert torch.equal(scale.view(-1, 64, 1), expected_scale.expand(8200, -1, -1))
