"""quantize_columnwise_transpose: one scale a column, over long columns too."""

import pytest
import torch

from swcompile.kernels.quantize_columnwise import (
    CANDIDATES,
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    ColumnConfig,
    launcher,
    quantize_columnwise_transpose,
    quantize_columnwise_transpose_reference,
    quantize_columnwise_transpose_triton,
    quantize_columnwise_transpose_work,
)

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the kernel runs in Triton's interpreter on the latter
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IMPLEMENTATIONS = [quantize_columnwise_transpose_reference, quantize_columnwise_transpose_triton]


def assert_same_bits(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.dtype == e.dtype and a.shape == e.shape
        a, e = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (a, e))
        assert torch.equal(a.cpu(), e.cpu())


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_table(quantize, dtype):
    # columns with absmax 127, 254, 63.5 and 0: scales 1, 2, 1/2 and the floor
    x = torch.tensor(
        [[127, 5, 0.25, 0], [2.5, -254, 63.5, 0], [-1.5, 3, -0.75, 0]], dtype=dtype, device=DEVICE
    )
    x_q, scale = quantize(x)
    assert x_q.tolist() == [[127, 2, -2], [2, -127, 2], [0, 127, -2], [0, 0, 0]]
    assert scale[:3].tolist() == [[1.0], [2.0], [0.5]] and 0 < scale[3].item() < 1e-30


# each dtype and each size that fits or does not fit a block, in both storage orders; not all combinations
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1), torch.bfloat16),
        ((1, 40), torch.float16),
        ((40, 1), torch.float32),
        ((16, 64), torch.bfloat16),
        ((83, 132), torch.float32),
        ((400, 70), torch.float16),
        ((900, 9), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernel_equals_reference(shape, dtype, transposed):
    torch.manual_seed(0)
    x = torch.randn(shape[::-1]).t() if transposed else torch.randn(shape)
    x = (x * torch.rand(shape[1]).mul(20).sub(10).exp2()).to(DEVICE, dtype)
    assert_same_bits(quantize_columnwise_transpose_triton(x), quantize_columnwise_transpose_reference(x))


@pytest.mark.parametrize(
    "view", [lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[:, 3:50].t(), lambda x: x[:1].expand(6, -1)]
)
def test_any_strides(view):
    x = view(torch.randn(12, 100, dtype=torch.bfloat16, device=DEVICE))
    assert_same_bits(
        quantize_columnwise_transpose_triton(x), quantize_columnwise_transpose_reference(x.clone())
    )


def test_error_is_half_a_step_at_most():
    x = torch.randn(300, 64)
    x_q, scale = quantize_columnwise_transpose(x)
    assert torch.equal(scale, x.abs().amax(0).unsqueeze(1) / torch.tensor(127.0))
    error = (x_q * scale - x.t()).abs() / scale
    assert 0.45 < error.max() <= 0.5 + 127 * 2**-23
    assert x_q.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_column_gets_scale_nan(quantize, poison):
    x = torch.randn(300, 5, device=DEVICE)
    clean_q, clean_scale = quantize(x)
    x[299, 2] = poison
    x_q, scale = quantize(x)
    assert scale[2].isnan() and x_q[2].eq(0).all()
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert torch.equal(x_q[others], clean_q[others]) and torch.equal(scale[others], clean_scale[others])


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_tiny_and_huge_magnitudes(quantize):
    sizes = torch.tensor([0, 2.0**-149, 1e-36, 1e-20, 1e30, torch.finfo(torch.float32).max], device=DEVICE)
    x = torch.linspace(-1, 1, 33, device=DEVICE)[:, None] * sizes
    x_q, scale = quantize(x)
    assert scale.isfinite().all() and (scale > 0).all()
    assert ((x_q.double() * scale.double() - x.t().double()).abs() <= 0.501 * scale.double()).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(quantize, shape):
    x_q, scale = quantize(torch.empty(shape, device=DEVICE))
    assert x_q.shape == shape[::-1] and scale.shape == (shape[1], 1) and scale.isfinite().all()


def launch_config(config: ColumnConfig, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in one configuration."""
    num_rows, num_columns = x.shape
    x_q = torch.full((num_columns, num_rows), -1, dtype=torch.int8, device=x.device)
    scale = torch.full((num_columns, 1), -1.0, device=x.device)
    launcher(config, x)(x, x_q, scale)
    return x_q, scale


@pytest.mark.parametrize("config", CANDIDATES)
def test_every_configuration_gives_the_same_bits(config):
    x = torch.randn(300, 1109, dtype=torch.bfloat16, device=DEVICE)
    assert_same_bits(launch_config(config, x), quantize_columnwise_transpose_reference(x))


def test_user_errors():
    with pytest.raises(ValueError, match="float64.*must be bfloat16"):
        quantize_columnwise_transpose(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("x", [torch.randn(5, 24), torch.randn(24, 5).t(), torch.randn(1, 3).bfloat16()])
def test_opcheck(x):
    torch.library.opcheck(QUANTIZE_COLUMNWISE_TRANSPOSE, (x.to(DEVICE),))


def test_work():
    # 3 x 5 bfloat16: read twice, 60 bytes; 15 of int8 and 20 of scales out
    assert quantize_columnwise_transpose_work(3, 5, 2) == (30, 95)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_stores_many_times(dtype):
    # Triton has miscompiled transposed 1-byte stores in some configurations, for some inputs (triton#11111)
    for run in range(200):
        torch.manual_seed(run)
        num_rows, num_columns = (int(size) for size in torch.randint(1, 700, (2,)))
        if run % 2:
            num_rows, num_columns = num_rows * 32, num_columns * 16
        x = torch.randn(num_rows, num_columns, device="cuda").to(dtype)
        result = launch_config(CANDIDATES[run % len(CANDIDATES)], x)
        assert_same_bits(result, quantize_columnwise_transpose_reference(x))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda").repeat(8200, 1)
    x_q, scale = quantize_columnwise_transpose(x)
    expected_q, expected_scale = quantize_columnwise_transpose_reference(x[:64])
    assert torch.equal(scale, expected_scale)
    for start in (0, 64 * 4100, 64 * 8199):
        assert torch.equal(x_q[:, start : start + 64], expected_q)
