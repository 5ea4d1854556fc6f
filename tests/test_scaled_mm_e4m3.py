"""e4m3: the quantiser that transposes, and the matmul that sums over tokens."""

import pytest
import torch

from swcompile.kernels import launch
from swcompile.kernels.formats import E4M3
from swcompile.kernels.launch import require_supported_gpu
from swcompile.kernels.quantize_columnwise import (
    QUANTIZE_COLUMNWISE_TRANSPOSE_E4M3,
    padded,
    quantize_columnwise_transpose_e4m3,
    quantize_columnwise_transpose_e4m3_reference,
    quantize_columnwise_transpose_e4m3_triton,
)
from swcompile.kernels.scaled_mm_e4m3 import (
    SCALED_MM_E4M3,
    scaled_mm_e4m3,
    scaled_mm_e4m3_reference,
    scaled_mm_e4m3_triton,
    scaled_mm_e4m3_work,
)
from swcompile.kernels.scaled_mm_kernels import (
    HOPPER_E4M3_CANDIDATES,
    POINTER_CANDIDATES,
    TMA_CANDIDATES,
    MatmulConfig,
    candidates,
    fits_tma,
    has_wgmma,
    launcher,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels run in Triton's interpreter on the latter
IMPLEMENTATIONS = [quantize_columnwise_transpose_e4m3_reference, quantize_columnwise_transpose_e4m3_triton]
OFF_BY = 1e-3
"""Of the largest result: Hopper adds up to 512 products at a time in 14 bits."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def representable(num_rows: int, num_columns: int) -> torch.Tensor:
    """Columns of normal e4m3 numbers with absmax 448: the interpreter does not round to 8-bit floats as GPUs do."""
    torch.manual_seed(0)
    codes = torch.randint(8, 127, (num_rows, num_columns), dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn).float() * torch.where(torch.rand(codes.shape) < 0.5, -1.0, 1.0)
    x[0] = 448.0
    return x


def assert_same_bits(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.dtype == e.dtype and a.shape == e.shape
        a, e = (t.view(torch.int32 if t.dtype == torch.float32 else torch.int8) for t in (a, e))
        assert torch.equal(a.cpu(), e.cpu())


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (83, 132), (400, 9), (5, 40)])
def test_representable_values_come_back_exactly_and_the_rest_is_zero(quantize, shape):
    x = representable(*shape).to(DEVICE)
    q, scale = quantize(x)
    assert q.shape == (shape[1], padded(shape[0])) and torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(q[:, : shape[0]].float(), x.t()) and not q[:, shape[0] :].float().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[:50].t()])
def test_kernel_equals_reference(dtype, view):
    x = view(representable(70, 90).to(DEVICE, dtype))
    x[0] = 448.0  # of each column: the scale is 1
    assert_same_bits(
        quantize_columnwise_transpose_e4m3_triton(x), quantize_columnwise_transpose_e4m3_reference(x.clone())
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(83, 132), (4096, 1000), (32896, 1280)])
def test_rounding_on_a_gpu(dtype, shape):
    x = (torch.randn(shape, device="cuda") * torch.rand(shape[1], device="cuda").mul(20).sub(10).exp2()).to(dtype)
    assert_same_bits(
        quantize_columnwise_transpose_e4m3_triton(x), quantize_columnwise_transpose_e4m3_reference(x)
    )


def test_error_is_half_a_step_at_most():
    x = torch.randn(300, 64)
    q, scale = quantize_columnwise_transpose_e4m3(x)
    restored = (q[:, :300].float() * scale).t()
    error = (restored - x).abs() / x.abs()
    normal = x.abs() >= 2.0**-6 * scale.t()
    assert 0.05 < error[normal].max() <= 2.0**-4 * (1 + 1e-5), "3 bits of mantissa"
    assert (restored - x).abs()[~normal].le(2.0**-10 * 1.001 * scale.t().expand_as(x)[~normal]).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_column_gets_scale_nan(quantize, poison):
    x = representable(300, 5).to(DEVICE)
    x[299, 2] = poison
    q, scale = quantize(x)
    assert scale.isnan().flatten().tolist() == [False, False, True, False, False]
    assert not q[2].float().any() and q[0].float().any()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(quantize, shape):
    q, scale = quantize(torch.empty(shape, device=DEVICE))
    assert q.shape == (shape[1], padded(shape[0])) and scale.shape == (shape[1], 1) and scale.isfinite().all()


def test_zeros_have_a_finite_scale():
    q, scale = quantize_columnwise_transpose_e4m3(torch.zeros(20, 3))
    assert not q.float().any() and scale.isfinite().all() and (scale > 0).all()


def operands(num_rows: int, num_columns: int, num_summed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q = [torch.randn(size, num_summed).to(torch.float8_e4m3fn).to(DEVICE) for size in (num_rows, num_columns)]
    return *q, torch.rand(num_rows, 1, device=DEVICE), torch.rand(num_columns, 1, device=DEVICE)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 13), (70, 144, 160), (130, 20, 400)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_equals_reference(shape, dtype):
    arguments = (*operands(*shape), dtype)
    actual, expected = scaled_mm_e4m3_triton(*arguments), scaled_mm_e4m3_reference(*arguments)
    assert actual.dtype == dtype and actual.is_contiguous()
    # The interpreter casts to bfloat16 by cutting bits off.
    size = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=OFF_BY * size)
    exact = arguments[0].double() @ arguments[1].double().t() * arguments[2].double() * arguments[3].double().t()
    torch.testing.assert_close(expected.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5 * size)


CONFIGS = list(dict.fromkeys([*HOPPER_E4M3_CANDIDATES, *TMA_CANDIDATES, *POINTER_CANDIDATES]))


def check_configuration(config: MatmulConfig, *shape: int) -> None:
    *arguments, scale_a, scale_b = operands(*shape)
    out = torch.full(shape[:2], torch.nan, dtype=torch.bfloat16, device=DEVICE)  # not all have room for a float32 tile
    if config.kernel != "pointers" and not fits_tma(*arguments, out):
        pytest.skip("this GPU has no TMA")
    if config.kernel == "wgmma" and not has_wgmma(out.device):
        pytest.skip("needs a Hopper GPU; Triton's interpreter does not know Gluon")
    expected = scaled_mm_e4m3_reference(*arguments, scale_a, scale_b, torch.float32)
    atol = OFF_BY * expected.abs().max().item()
    tensors = *arguments, scale_a, scale_b, None, out
    launch = launcher(config, *tensors)
    for _ in range(20 if DEVICE == "cuda" else 1):  # a race between copies and multiplications need not show at once
        out.fill_(torch.nan)
        launch(*tensors)
        torch.testing.assert_close(out.float(), expected, rtol=2 * torch.finfo(out.dtype).eps, atol=atol)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration(config):
    check_configuration(config, 70, 272, 144)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_on_many_tiles(config):
    # several tiles a program, partial tiles at both edges, and a K that is no multiple of a step, nor of a partial sum
    check_configuration(config, 5000, 2064, 1360)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.kernel == "wgmma" and config.num_stages == 3])
def test_float32_results(config):
    *arguments, scale_a, scale_b = operands(300, 400, 2000)
    out = torch.full((300, 400), torch.nan, device=DEVICE)
    if not has_wgmma(out.device):
        pytest.skip("needs a Hopper GPU")
    launcher(config, *arguments, scale_a, scale_b, None, out)(*arguments, scale_a, scale_b, None, out)
    expected = scaled_mm_e4m3_reference(*arguments, scale_a, scale_b, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=OFF_BY * expected.abs().max().item())


def test_kernels_for_e4m3_are_chosen_for_it():
    device = torch.device(DEVICE)
    assert 0 < len(HOPPER_E4M3_CANDIDATES) <= 8
    assert candidates(device, True, torch.float8_e4m3fn, 64, 64)[0].block_n == (192 if has_wgmma(device) else 256)
    assert candidates(device, False, torch.float8_e4m3fn, 64, 64) == POINTER_CANDIDATES


def test_user_errors():
    a, b, scale_a, scale_b = operands(4, 6, 16)
    for arguments, message in (
        ((a.float(), b, scale_a, scale_b, torch.float32), "must be torch.float8_e4m3fn"),
        ((a, b[:, :8], scale_a, scale_b, torch.float32), "a_q sums over K=16, but b_q over 8"),
        ((a, b, scale_a[:1], scale_b, torch.float32), r"scale_a is \(1, 1\), but must be \(4, 1\)"),
        ((a, b, scale_a, scale_b, torch.float64), "out_dtype is torch.float64"),
        ((a, b, scale_a.double(), scale_b, torch.float32), "scales must be float32"),
        ((a[0], b, scale_a, scale_b, torch.float32), "must have 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_mm_e4m3(*arguments)


def test_opcheck():
    checks = ("test_autograd_registration", "test_faketensor")  # the others multiply what has no multiplication
    torch.library.opcheck(SCALED_MM_E4M3, (*operands(5, 16, 32), torch.bfloat16), test_utils=checks)
    torch.library.opcheck(QUANTIZE_COLUMNWISE_TRANSPOSE_E4M3, (torch.randn(20, 8, device=DEVICE),), test_utils=checks)


def test_work():
    assert scaled_mm_e4m3_work(2, 3, 16, 2) == (2 * 2 * 3 * 16, (2 + 3) * 16 + 2 * 3 * 2 + 4 * (2 + 3))


def test_a_gpu_without_e4m3_is_an_error_that_names_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_facts", lambda device: launch.DeviceFacts("Fake A100", (8, 0), 108, 167936))
    require_supported_gpu.cache_clear()
    try:
        require_supported_gpu(0)
        with pytest.raises(RuntimeError, match=r"compute capability 8.9 .*Fake A100.*has 8.0.*such as switchback"):
            require_supported_gpu(0, E4M3)
    finally:
        require_supported_gpu.cache_clear()
