"""scaled_mm_blockwise: sums over tokens, exact within a block, blocks added in float32 in their order."""

import pytest
import torch

from swcompile.kernels.quantize_blockwise import quantize_blockwise_transpose
from swcompile.kernels.quantize_rowwise import quantize_rowwise
from swcompile.kernels.scaled_mm_blockwise import (
    SCALED_MM_BLOCKWISE,
    scaled_mm_blockwise,
    scaled_mm_blockwise_reference,
    scaled_mm_blockwise_triton,
    scaled_mm_blockwise_work,
)
from swcompile.kernels.scaled_mm_kernels import (
    HOPPER_BLOCKWISE_CANDIDATES,
    POINTER_BLOCKWISE_CANDIDATES,
    TMA_BLOCKWISE_CANDIDATES,
    MatmulConfig,
    candidates,
    fits_tma,
    has_wgmma,
    launcher,
)
from swcompile.kernels.transpose import transpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels run in Triton's interpreter on the latter
DTYPES = [torch.float16, torch.float32]
CONFIGS = [*HOPPER_BLOCKWISE_CANDIDATES, *TMA_BLOCKWISE_CANDIDATES, *POINTER_BLOCKWISE_CANDIDATES]


def operands(num_rows: int, num_columns: int, num_summed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a_q, b_q = (
        torch.randint(-127, 128, (size, num_summed), dtype=torch.int8, device=DEVICE) for size in (num_rows, num_columns)
    )
    return a_q, b_q, torch.rand(-(-num_summed // 1024), num_columns, device=DEVICE) * 0.01


def in_float64(a_q: torch.Tensor, b_q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return a_q.double() @ (b_q.double() * scale.t().repeat_interleave(1024, 1)[:, : b_q.shape[1]]).t()


# multiples of 16 bytes, which the TMA kernel wants, and others; of one block, of several, and of none
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 13), (70, 144, 160), (9, 24, 2064), (33, 8, 1025), (3, 16, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(shape, dtype):
    arguments = operands(*shape)
    actual, expected = scaled_mm_blockwise_triton(*arguments, dtype), scaled_mm_blockwise_reference(*arguments, dtype)
    assert actual.dtype == dtype and actual.is_contiguous() and actual.shape == shape[:2]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(70, 144, 160), (9, 24, 2064)])
def test_reference_is_the_sum_to_float32_rounding(shape):
    arguments = operands(*shape)
    exact = in_float64(*arguments)
    out = scaled_mm_blockwise_reference(*arguments, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())


def test_a_block_may_be_as_large_as_float32_holds():
    a_q = torch.full((1, 1024), 127, dtype=torch.int8, device=DEVICE)
    a_q[0, 0] = 126
    ones = torch.ones(1, 1, device=DEVICE)
    for function in (scaled_mm_blockwise_reference, scaled_mm_blockwise_triton):
        assert function(a_q, a_q, ones, torch.float32).item() == 1023 * 127**2 + 126**2


def check_configuration(config: MatmulConfig, *shape: int, dtype: torch.dtype) -> None:
    arguments = operands(*shape)
    out = torch.full(shape[:2], torch.nan, dtype=dtype, device=DEVICE)
    if config.kernel != "pointers" and not fits_tma(*arguments[:2], out):
        pytest.skip("this GPU has no TMA")
    if config.kernel == "wgmma" and not has_wgmma(out.device):
        pytest.skip("needs a Hopper GPU; Triton's interpreter does not know Gluon")
    expected = scaled_mm_blockwise_reference(*arguments, dtype)
    a_q, b_q, scale = arguments
    tensors = a_q, b_q, None, scale, None, out
    launch = launcher(config, *tensors, blockwise=True)
    for _ in range(20 if DEVICE == "cuda" else 1):  # a race between copies and multiplications need not show at once
        out.fill_(torch.nan)
        launch(*tensors)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_gives_the_same_bits(config):
    check_configuration(config, 72, 272, 1168, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_summed", [16, 2320])
def test_every_configuration_on_many_tiles(config, num_summed):
    # several tiles a program, partial tiles at both edges, and a K that is no multiple of a step, nor of a block
    check_configuration(config, 5000, 2064, num_summed, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("config", HOPPER_BLOCKWISE_CANDIDATES)
@pytest.mark.parametrize("num_summed", [16, 128, 1040])
def test_scales_wait_in_a_ring_that_is_long_enough(config, num_summed):
    # one program for all tiles: blocks of one step, so many in flight as there are stages, and the ring goes round often
    if not has_wgmma(torch.device(DEVICE)):
        pytest.skip("needs a Hopper GPU")
    from swcompile.kernels.scaled_mm_blockwise_wgmma import blockwise_wgmma_launcher

    arguments = operands(1000, 2064, num_summed)
    expected = scaled_mm_blockwise_reference(*arguments, torch.bfloat16)
    out = torch.empty_like(expected)
    a_q, b_q, scale = arguments
    launch = blockwise_wgmma_launcher(config, 1, a_q, b_q)
    for _ in range(20):
        out.fill_(torch.nan)
        launch(a_q, b_q, None, scale, None, out)
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.kernel == "wgmma" and config.num_stages == 3])
def test_float32_results(config):
    check_configuration(config, 300, 400, 2000, dtype=torch.float32)


def test_unaligned_scales():
    a_q, b_q, scale = operands(40, 48, 1040)
    shifted = torch.empty(scale.numel() + 1, device=DEVICE)[1:].view(scale.shape).copy_(scale)
    out = scaled_mm_blockwise(a_q, b_q, shifted, torch.float32)
    assert torch.equal(out, scaled_mm_blockwise_reference(a_q, b_q, scale, torch.float32))


def test_layouts_that_no_kernel_reads():
    a_q, b_q, scale = operands(40, 48, 1040)
    transposed = a_q.t().contiguous().t(), b_q, scale.t().contiguous().t()
    expected = scaled_mm_blockwise_reference(a_q, b_q, scale, torch.float32)
    assert torch.equal(scaled_mm_blockwise_triton(*transposed, torch.float32), expected)


def test_autocast_changes_nothing():
    arguments = (*operands(40, 48, 1040), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = scaled_mm_blockwise(*arguments)
    assert torch.equal(out, scaled_mm_blockwise_reference(*arguments))


def in_8_bit(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a recipe makes of ``gradient.T @ x``, in float32."""
    gradient_q, token_scale = quantize_rowwise(gradient)
    x_q, scale = quantize_blockwise_transpose(x, token_scale)
    return scaled_mm_blockwise(transpose(gradient_q), x_q, scale, torch.float32)


def test_tokens_that_change():
    layer = torch.nn.Linear(32, 16).to(DEVICE)
    options = {"recipe": "switchback_full", "include": "*", "skip_slower": False}
    compiled = torch.compile(layer, backend="switchback", dynamic=True, options=options)
    for tokens in (20, 1025):
        torch.manual_seed(tokens)
        x, tangent = (torch.randn(tokens, width, device=DEVICE) for width in (32, 16))
        layer.zero_grad()
        compiled(x).backward(tangent)
        assert torch.equal(layer.weight.grad, in_8_bit(tangent, x))


def test_a_scale_of_nan_is_seen():
    a_q, b_q, scale = operands(4, 6, 2048)
    scale[1, 2] = torch.nan
    for function in (scaled_mm_blockwise_reference, scaled_mm_blockwise_triton):
        out = function(a_q, b_q, scale, torch.float32)
        assert out.isnan().all(0).tolist() == [column == 2 for column in range(6)] and out.isnan().sum() == 4


def test_a_gradient_of_quantised_operands():
    torch.manual_seed(0)
    sizes = torch.rand(1500, 1, device=DEVICE).mul(6).exp2()  # tokens of many magnitudes
    gradient, x = (torch.randn(1500, width, device=DEVICE) * sizes for width in (48, 64))
    exact = gradient.double().t() @ x.double()
    error = (in_8_bit(gradient, x) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.03


def test_candidates():
    device = torch.device(DEVICE)
    small, large = (64, 64, 64, torch.bfloat16), (65536, 4096, 2048, torch.bfloat16)
    for tma_fits in (False, True):
        configs = candidates(device, tma_fits, *small, blockwise=True)
        assert 0 < len(configs) <= 8 and set(configs) <= set(CONFIGS)
        of_large = [config for config in configs if min(config.block_m, config.block_n) >= 128]
        kept = of_large[:1] if tma_fits and has_wgmma(device) else of_large
        assert candidates(device, tma_fits, *large, blockwise=True) == kept != []
    assert (candidates(device, True, *large, blockwise=True)[0].kernel == "wgmma") == has_wgmma(device)


def test_user_errors():
    a, b, scale = operands(4, 6, 16)
    for arguments, message in (
        ((a.float(), b, scale, torch.float32), "must be int8"),
        ((a, b[:, :8], scale, torch.float32), "a_q sums over K=16, but b_q over 8"),
        ((a, b, scale[:0], torch.float32), r"scale is \(0, 6\), but must be \(1, 6\): a row for each 1024 products"),
        ((a, b, scale.t(), torch.float32), r"scale is \(6, 1\), but must be \(1, 6\)"),
        ((a, b, scale, torch.float64), "out_dtype is torch.float64"),
        ((a, b, scale.double(), torch.float32), "scales must be float32"),
        ((a[0], b, scale, torch.float32), "must have 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_mm_blockwise(*arguments)


@pytest.mark.parametrize("num_summed", [32, 1040])
def test_opcheck(num_summed):
    torch.library.opcheck(SCALED_MM_BLOCKWISE, (*operands(5, 16, num_summed), torch.bfloat16))


def test_work():
    expected = 2 * 2 * 3 * 1040, (2 + 3) * 1040 + 2 * 3 * 2 + 2 * 4 * 3
    assert scaled_mm_blockwise_work(2, 3, 1040, 2) == expected
