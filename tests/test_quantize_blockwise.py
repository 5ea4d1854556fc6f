"""quantize_blockwise_transpose: rows times their factors, with a scale for each column and block of 1024 rows."""

import pytest
import torch

from swcompile.kernels.int8 import padded
from swcompile.kernels.quantize_blockwise import (
    CANDIDATES,
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    BlockConfig,
    launcher,
    quantize_blockwise_transpose,
    quantize_blockwise_transpose_reference,
    quantize_blockwise_transpose_triton,
    quantize_blockwise_transpose_work,
)
from swcompile.kernels.quantize_columnwise import quantize_columnwise_transpose_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in Triton's interpreter on the latter
IMPLEMENTATIONS = [quantize_blockwise_transpose_reference, quantize_blockwise_transpose_triton]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]


def assert_same_bits(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.dtype == e.dtype and a.shape == e.shape
        a, e = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (a, e))
        assert torch.equal(a.cpu(), e.cpu())


def uneven(num_rows: int, num_columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Columns of many magnitudes."""
    torch.manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (num_rows, num_columns), dtype=dtype, device=DEVICE)
    return (torch.randn(num_rows, num_columns) * torch.rand(num_columns).mul(20).sub(10).exp2()).to(DEVICE, dtype)


def factors(num_rows: int) -> torch.Tensor:
    """For rows, of many magnitudes."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_rows, 1, generator=generator).mul(6).sub(3).exp2().to(DEVICE)


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (83, 132), (1024, 9), (1025, 40), (2100, 7)])
def test_each_block_is_quantised_by_columns_and_the_rest_is_zero(quantize, shape):
    num_rows, num_columns = shape
    x, factor = uneven(*shape), factors(shape[0])
    q, scale = quantize(x, factor)
    assert q.shape == (num_columns, padded(num_rows)) and padded(num_rows) % 16 == 0 and not q[:, num_rows:].any()
    assert scale.shape == (-(-num_rows // 1024), num_columns)
    blocks = zip((x.float() * factor).split(1024), q[:, :num_rows].split(1024, 1), scale, strict=True)
    for block, block_q, block_scale in blocks:
        expected = quantize_columnwise_transpose_reference(block)
        assert_same_bits((block_q.contiguous(), block_scale[:, None].contiguous()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[:50].t()])
def test_kernel_equals_reference(dtype, view):
    x = view(uneven(2100, 90, dtype))
    factor = factors(2 * len(x))[::2]
    actual = quantize_blockwise_transpose_triton(x, factor)
    assert_same_bits(actual, quantize_blockwise_transpose_reference(x.clone(), factor.clone()))


def launch_config(config: BlockConfig, x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in one configuration."""
    num_rows, num_columns = x.shape
    x_q = torch.full((num_columns, padded(num_rows)), -1, dtype=torch.int8, device=x.device)
    scale = torch.full((-(-num_rows // 1024), num_columns), -1.0, device=x.device)
    launcher(config, x)(x, factor, x_q, scale)
    return x_q, scale


@pytest.mark.parametrize("config", CANDIDATES)
def test_every_configuration_gives_the_same_bits(config):
    operands = uneven(1100, 150), factors(1100)
    assert_same_bits(launch_config(config, *operands), quantize_blockwise_transpose_reference(*operands))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_stores_many_times(dtype):
    # Triton has miscompiled transposed 1-byte stores in some configurations, for some inputs (triton#11111)
    for run in range(100):
        torch.manual_seed(run)
        num_rows, num_columns = (int(size) for size in torch.randint(1, 700, (2,)))
        if run % 2:
            num_rows, num_columns = num_rows * 32, num_columns * 16
        operands = uneven(num_rows, num_columns, dtype), factors(num_rows)
        result = launch_config(CANDIDATES[run % len(CANDIDATES)], *operands)
        assert_same_bits(result, quantize_blockwise_transpose_reference(*operands))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    x = torch.randn(1024, 4096, dtype=torch.bfloat16, device="cuda").repeat(513, 1)
    factor = factors(1024)
    x_q, scale = quantize_blockwise_transpose(x, factor.repeat(513, 1))
    expected_q, expected_scale = quantize_blockwise_transpose_reference(x[:1024], factor)
    assert torch.equal(scale, expected_scale.expand(513, -1))
    for start in (0, 1024 * 256, 1024 * 512):
        assert torch.equal(x_q[:, start : start + 1024], expected_q)


def test_a_large_token_takes_bits_from_its_block_alone():
    x, factor = torch.randn(3000, 64).clamp(-3, 3), torch.ones(3000, 1)
    clean_q, clean_scale = quantize_blockwise_transpose(x, factor)
    x[1500], factor[1500] = 100.0, 10.0
    q, scale = quantize_blockwise_transpose(x, factor)
    assert torch.equal(scale[[0, 2]], clean_scale[[0, 2]]) and scale[1].eq(1000 / torch.tensor(127.0)).all()
    others = torch.cat([torch.arange(1024), torch.arange(2048, 3000)])
    assert torch.equal(q[:, others], clean_q[:, others]) and not q[:, 1024:1500].any()


@pytest.mark.parametrize("size", [1.0, 250.0, 1e4])
def test_a_column_errs_by_an_eighth_of_its_norm_at_most(size):
    x = torch.ones(1024, 8)
    x[7] = size  # all others are half a step of it, in the middle
    q, scale = quantize_blockwise_transpose(x, torch.ones(1024, 1))
    error = (q.t() * scale - x).norm(dim=0) / x.norm(dim=0)
    assert (error <= 32 / 254).all() and (size == 1.0 or (error > 0).all())


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_values_cost_a_column_one_block(quantize, poison):
    x, factor = uneven(2100, 5), factors(2100)
    clean_q, clean_scale = quantize(x, factor)
    x[1100, 2] = poison
    q, scale = quantize(x, factor)
    assert scale.isnan().nonzero().tolist() == [[1, 2]] and clean_q[2, 1024:2048].any()
    clean_q[2, 1024:2048], clean_scale[1, 2] = 0, scale[1, 2]
    assert_same_bits((q, scale), (clean_q, clean_scale))
    factor[3] = poison
    assert quantize(x, factor)[1][0].isnan().all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(quantize, shape):
    q, scale = quantize(torch.empty(shape, device=DEVICE), torch.ones(shape[0], 1, device=DEVICE))
    assert q.shape == (shape[1], padded(shape[0])) and scale.shape == (-(-shape[0] // 1024), shape[1])


def test_user_errors():
    with pytest.raises(ValueError, match="float64.*must be bfloat16"):
        quantize_blockwise_transpose(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 1))
    with pytest.raises(ValueError, match="3 dimensions.*must have 2"):
        quantize_blockwise_transpose(torch.ones(2, 2, 2), torch.ones(2, 1))
    for factor in (torch.ones(2), torch.ones(2, 1, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"factor is .* but must be float32 \[N, 1\]"):
            quantize_blockwise_transpose(torch.ones(2, 2), factor)
    for quantize in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=r"factor is \(3, 1\), but must be \(2, 1\): one for each row of x"):
            quantize(torch.ones(2, 2, device=DEVICE), torch.ones(3, 1, device=DEVICE))


@pytest.mark.parametrize("num_rows", [20, 1100])
def test_opcheck(num_rows):
    torch.library.opcheck(QUANTIZE_BLOCKWISE_TRANSPOSE, (torch.randn(num_rows, 8, device=DEVICE), factors(num_rows)))


def test_work():
    # 1027 x 5 bfloat16 and 1027 factors read once; 1040 x 5 of int8 and two blocks of 5 scales written
    assert quantize_blockwise_transpose_work(1027, 5, 2) == (3 * 1027 * 5, 1027 * (5 * 2 + 4) + 1040 * 5 + 2 * 5 * 4)
