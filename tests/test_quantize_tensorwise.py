"""quantize_tensorwise, _transpose, _both and quantize_by_scale: one scale, and the same bits in either order."""

import pytest
import torch

from swcompile.kernels import quantize_tensorwise as module
from swcompile.kernels.quantize_tensorwise import (
    CANDIDATES,
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_BOTH,
    QUANTIZE_TENSORWISE_TRANSPOSE,
    TileConfig,
    launcher,
    quantize_by_scale,
    quantize_by_scale_reference,
    quantize_by_scale_triton,
    quantize_by_scale_work,
    quantize_tensorwise,
    quantize_tensorwise_both,
    quantize_tensorwise_reference,
    quantize_tensorwise_transpose,
    quantize_tensorwise_work,
)

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the kernel runs in Triton's interpreter on the latter
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ["quantize_tensorwise", "quantize_tensorwise_transpose", "quantize_tensorwise_both"]


def in_original_order(op: str, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_q [N, K], scale) from the result of any of the ops, after checking that the copies agree."""
    assert all(t.is_contiguous() for t in result)
    if op == "quantize_tensorwise_both":
        assert torch.equal(result[0], result[1].t())
        return result[0], result[2]
    return (result[0].t() if op.endswith("transpose") else result[0]), result[1]


def assert_same_bits(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert actual[0].dtype == torch.int8 and torch.equal(actual[0].cpu(), expected[0].cpu())
    assert actual[1].shape == (1, 1)
    assert torch.equal(actual[1].cpu().view(torch.int32), expected[1].cpu().view(torch.int32))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("suffix", ["_reference", "_triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_table(op, suffix, dtype):
    # absmax 127, in the last row, makes the scale 1: half goes to even in every row
    x = torch.tensor([[0.5, 1.5, 2.5], [-0.5, -1.5, -2.5], [63.5, 62.5, 0.25], [0, 3.5, -127]], dtype=dtype)
    expected = [[0, 2, 2], [0, -2, -2], [64, 62, 0], [0, 4, -127]]
    x_q, scale = in_original_order(op, getattr(module, op + suffix)(x.to(DEVICE)))
    assert x_q.tolist() == expected and scale.tolist() == [[1.0]]


@pytest.mark.parametrize("op", OPS)
# each dtype and each size that fits or does not fit a block, in both storage orders; not all combinations
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1), torch.bfloat16),
        ((1, 33), torch.float16),
        ((40, 1), torch.float32),
        ((16, 64), torch.bfloat16),
        ((83, 132), torch.float32),
        ((130, 70), torch.float16),
        ((17, 600), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernel_equals_reference(op, shape, dtype, transposed):
    torch.manual_seed(0)
    x = (torch.randn(shape[::-1]).t() if transposed else torch.randn(shape)).to(DEVICE, dtype)
    result = getattr(module, op + "_triton")(x)
    assert_same_bits(in_original_order(op, result), quantize_tensorwise_reference(x))
    reference = getattr(module, op + "_reference")(x)
    assert [t.shape for t in result] == [t.shape for t in reference]
    assert_same_bits(in_original_order(op, reference), quantize_tensorwise_reference(x))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "view", [lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[:, 3:50].t(), lambda x: x[:1].expand(6, -1)]
)
def test_any_strides(op, view):
    x = view(torch.randn(12, 100, dtype=torch.bfloat16, device=DEVICE))
    result = in_original_order(op, getattr(module, op + "_triton")(x))
    assert_same_bits(result, quantize_tensorwise_reference(x.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_absmax_over_127_and_error_half_a_step(dtype):
    x = torch.randn(64, 300).to(dtype)
    x_q, scale = quantize_tensorwise(x)
    assert torch.equal(scale, x.abs().max().float().reshape(1, 1) / torch.tensor(127.0))
    error = (x_q * scale - x.float()).abs() / scale
    assert 0.45 < error.max() <= 0.5 + 127 * 2**-23
    assert torch.equal(quantize_tensorwise_transpose(x)[0], x_q.t())
    assert torch.equal(quantize_tensorwise_both(x)[1], x_q.t())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("suffix", ["_reference", "_triton"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_anything_not_finite_poisons_all(op, suffix, poison):
    x = torch.randn(70, 90, device=DEVICE)
    x[69, 89] = poison
    x_q, scale = in_original_order(op, getattr(module, op + suffix)(x))
    assert scale.isnan().all() and x_q.eq(0).all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("by_scale", [quantize_by_scale_reference, quantize_by_scale_triton])
@pytest.mark.parametrize("size", [1.0, 0.0, 2.0**-149, 1e30, float("nan")])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[::3], lambda x: x[:0], lambda x: x[:, :0]])
def test_a_known_scale_gives_the_same_bits(by_scale, transpose, size, view):
    x = view(torch.randn(83, 132, device=DEVICE) * size)
    x_q, scale = quantize_tensorwise_reference(x)
    before = scale.clone()
    result = by_scale(x, scale, transpose)
    assert result.is_contiguous() and torch.equal(result.t() if transpose else result, x_q)
    assert torch.equal(scale.view(torch.int32), before.view(torch.int32))
    if size == 1.0 and x.numel():  # the scale is what decides
        assert by_scale(x, 2 * scale, transpose).abs().max() in (63, 64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("suffix", ["_reference", "_triton"])
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 1e-36, 1e-20, 1e30, torch.finfo(torch.float32).max])
def test_zero_tiny_and_huge(op, suffix, size):
    x = torch.linspace(-1, 1, 48, device=DEVICE).reshape(6, 8) * size
    x_q, scale = in_original_order(op, getattr(module, op + suffix)(x))
    assert scale.isfinite().all() and scale.item() > 0
    assert ((x_q.double() * scale.double() - x.double()).abs() <= 0.501 * scale.double()).all()
    assert x_q.abs().max() == (127 if size >= 1e-20 else 0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(op, shape):
    x_q, scale = in_original_order(op, getattr(module, op + "_triton")(torch.empty(shape, device=DEVICE)))
    assert x_q.shape == shape and scale.isfinite().all()


def launch_config(config: TileConfig, x: torch.Tensor, op: str) -> tuple[torch.Tensor, ...]:
    """The op in one configuration."""
    same = torch.full(x.shape, -1, dtype=torch.int8, device=x.device) if op != OPS[1] else None
    transposed = torch.full(x.t().shape, -1, dtype=torch.int8, device=x.device) if op != OPS[0] else None
    scale = torch.full((1, 1), -1.0, device=x.device)
    launch = launcher(config, x, same=same is not None, transposed=transposed is not None)
    launch(x, same, transposed, scale)
    return tuple(t for t in (same, transposed, scale) if t is not None)


@pytest.mark.parametrize("config", CANDIDATES)
def test_every_configuration_gives_the_same_bits(config):
    x = torch.randn(150, 145, dtype=torch.bfloat16, device=DEVICE)
    result = in_original_order(OPS[2], launch_config(config, x, OPS[2]))
    assert_same_bits(result, quantize_tensorwise_reference(x))


@pytest.mark.parametrize("op", OPS)
def test_user_errors(op):
    with pytest.raises(ValueError, match="float64.*must be bfloat16"):
        getattr(module, op)(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("by_scale", [quantize_by_scale_reference, quantize_by_scale_triton])
def test_what_outgrew_its_scale_is_the_largest_value(by_scale):
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0]], device=DEVICE)
    _, scale = quantize_tensorwise_reference(x)
    assert by_scale(1.01 * x, scale, False).tolist() == [[127, -127, 64, 0]]
    x = torch.tensor([[3.0, -1e30, float("inf"), -float("inf")]], device=DEVICE)
    assert by_scale(x, scale, False).tolist() == [[127, -127, 127, -127]]
    if DEVICE == "cuda" or by_scale is quantize_by_scale_reference:  # Triton's older interpreters give 0 for NaN
        assert by_scale(torch.full_like(scale, torch.nan), scale, False).tolist() == [[-127]]
    for nothing in (0.0, -1.0, float("nan"), float("inf")):
        assert not by_scale(x, torch.full_like(scale, nothing), False).any()


@pytest.mark.parametrize(
    ("scale", "message"),
    [(torch.ones(1, 1, dtype=torch.float64), "float64.*must be float32"), (torch.ones(3, 1), r"\(3, 1\).*\(1, 1\)")],
)
def test_user_errors_of_a_known_scale(scale, message):
    for x_q in (quantize_by_scale_triton, quantize_by_scale):
        with pytest.raises(ValueError, match=message):
            x_q(torch.ones(3, 2, device=DEVICE), scale.to(DEVICE), False)
    for device in (DEVICE, "meta"):
        with pytest.raises(ValueError, match="quantize_by_scale: x is torch.float64"):
            quantize_by_scale(torch.ones(3, 2, dtype=torch.float64, device=device), torch.ones(1, 1, device=device), False)


@pytest.mark.parametrize("op", [QUANTIZE_TENSORWISE, QUANTIZE_TENSORWISE_TRANSPOSE, QUANTIZE_TENSORWISE_BOTH])
@pytest.mark.parametrize("x", [torch.randn(5, 24), torch.randn(24, 5).t(), torch.randn(1, 3).bfloat16()])
def test_opcheck(op, x):
    torch.library.opcheck(op, (x.to(DEVICE),))
    for transpose in (False, True):
        torch.library.opcheck(QUANTIZE_BY_SCALE, (x.to(DEVICE), torch.ones(1, 1, device=DEVICE), transpose))


def test_work():
    # 3 x 5 bfloat16: read twice, 60 bytes; 15 for each output; 4 for the scale
    assert quantize_tensorwise_work(3, 5, 2) == (30, 79)
    assert quantize_tensorwise_work(3, 5, 2, num_outputs=2) == (30, 94)
    assert quantize_by_scale_work(3, 5, 2) == (15, 49)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_stores_many_times(op, dtype):
    # Triton has miscompiled transposed 1-byte stores in some configurations, for some inputs (triton#11111)
    for run in range(200):
        torch.manual_seed(run)
        num_rows, num_columns = (int(size) for size in torch.randint(1, 700, (2,)))
        if run % 2:
            num_rows, num_columns = num_rows * 16, num_columns * 16
        x = torch.randn(num_rows, num_columns, device="cuda").to(dtype)
        result = in_original_order(op, launch_config(CANDIDATES[run // 2 % len(CANDIDATES)], x, op))
        assert_same_bits(result, quantize_tensorwise_reference(x))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(5120, 1280), (4096, 8192), (5000, 2064), (5000, 2061)])
@pytest.mark.parametrize("config", CANDIDATES)
def test_every_configuration_on_many_tiles(config, shape, op):
    # as many tiles as the GPU holds programs, several a program, sizes that other code is compiled for
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    expected = quantize_tensorwise_reference(x)
    for _ in range(20):  # programs that meet on the GPU
        assert_same_bits(in_original_order(op, launch_config(config, x, op)), expected)
    for transpose in (False, True):
        x_q = torch.full(x.t().shape if transpose else x.shape, -1, dtype=torch.int8, device="cuda")
        launch = launcher(config, x, same=not transpose, transposed=transpose, knows_scale=True)
        launch(x, *((None, x_q) if transpose else (x_q, None)), expected[1])
        assert torch.equal(x_q.t() if transpose else x_q, expected[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_31_elements(op):
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda").repeat(8200, 1)
    assert x.numel() > 2**31
    x_q, scale = in_original_order(op, getattr(module, op)(x))
    expected_q, expected_scale = quantize_tensorwise_reference(x[:64])
    assert torch.equal(scale, expected_scale)
    for start in (0, 64 * 4100, 64 * 8199):
        assert torch.equal(x_q[start : start + 64], expected_q)
