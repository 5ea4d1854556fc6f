"""dequantize: the product in float32, cast once."""

import re

import pytest
import torch

from swcompile.kernels.dequantize import (
    DEQUANTIZE,
    dequantize,
    dequantize_reference,
    dequantize_triton,
    dequantize_work,
)
from swcompile.kernels.quantize_rowwise import quantize_rowwise

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the kernel runs in Triton's interpreter on the latter
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def expected_of_kernel(x_q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference; but Triton's interpreter casts to bfloat16 by cutting bits off."""
    if DEVICE == "cuda" or dtype != torch.bfloat16:
        return dequantize_reference(x_q, scale, dtype)
    exact = dequantize_reference(x_q, scale, torch.float32)
    return (exact.view(torch.int32) & -65536).view(torch.float32).to(dtype)


@pytest.mark.parametrize("function", [dequantize_reference, dequantize_triton])
def test_values(function):
    x_q = torch.tensor([[1, -2, 127], [0, 3, -127]], dtype=torch.int8, device=DEVICE)
    by_row = function(x_q, torch.tensor([[0.5], [2.0]], device=DEVICE), torch.float32)
    assert by_row.tolist() == [[0.5, -1, 63.5], [0, 6, -254]]
    by_column = function(x_q, torch.tensor([[0.5, 2, 1]], device=DEVICE), torch.float16)
    assert by_column.tolist() == [[0.5, -4, 127], [0, 6, -127]]
    by_tensor = function(x_q, torch.tensor([[0.25]], device=DEVICE), torch.float32)
    assert by_tensor.tolist() == [[0.25, -0.5, 31.75], [0, 0.75, -31.75]]


def test_the_product_is_cast_once():
    # 3 * 0.3348 = 1.0044, nearest to 1.0078; a scale cast to bfloat16 first, 0.33398, would give 1.0
    x_q, scale = torch.full((1, 1), 3, dtype=torch.int8), torch.tensor([[0.3348]])
    assert dequantize(x_q, scale, torch.bfloat16).item() == 1.0078125
    assert (x_q.bfloat16() * scale.bfloat16()).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 83), (5, 1280), (3, 2050), (130, 1)])
@pytest.mark.parametrize("granularity", ["row", "column", "tensor"])
def test_kernel_equals_reference(dtype, shape, granularity):
    x_q = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    rows, columns = shape
    scale = torch.rand(
        {"row": (rows, 1), "column": (1, columns), "tensor": (1, 1)}[granularity], device=DEVICE
    )
    actual = dequantize_triton(x_q, scale, dtype)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert torch.equal(actual, expected_of_kernel(x_q, scale, dtype))


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:, ::3], lambda x: x.t()])
def test_any_strides(view):
    x_q = view(torch.randint(-127, 128, (12, 90), dtype=torch.int8, device=DEVICE))
    scale = torch.rand(len(x_q) * 2, 1, device=DEVICE)[::2]
    assert torch.equal(dequantize_triton(x_q, scale, torch.float32), x_q.float() * scale)


def test_scale_nan_makes_the_row_nan():
    x = torch.randn(3, 40, device=DEVICE)
    x[1, 7] = float("inf")
    for function in (dequantize, dequantize_triton):
        out = function(*quantize_rowwise(x), torch.float32)
        assert out[1].isnan().all() and out[::2].isfinite().all()


def test_empty():
    x_q = torch.empty(0, 16, dtype=torch.int8, device=DEVICE)
    assert dequantize_triton(x_q, torch.empty(0, 1, device=DEVICE), torch.bfloat16).shape == (0, 16)


def test_user_errors():
    x_q, scale = torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="int8 with a float32 scale"):
        dequantize(x_q, scale.half(), torch.float32)
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        dequantize(x_q, scale, torch.float64)
    with pytest.raises(ValueError, match="2 and 1 dimensions"):
        dequantize(x_q, scale.flatten(), torch.float32)


@pytest.mark.parametrize("function", [dequantize, dequantize_reference, dequantize_triton])
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (8, 16), (16, 1), (1, 8), (0, 1)])
def test_a_scale_of_another_shape_is_an_error(function, shape):
    x_q, scale = torch.ones(8, 16, dtype=torch.int8, device=DEVICE), torch.ones(shape, device=DEVICE)
    message = re.escape(f"scale is {shape}, but must be one of (8, 1), (1, 16), (1, 1)")
    with pytest.raises(ValueError, match=message):
        function(x_q, scale, torch.float32)


@pytest.mark.parametrize("scale_shape", [(5, 1), (1, 24), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(scale_shape, dtype):
    x_q = torch.randint(-127, 128, (5, 24), dtype=torch.int8, device=DEVICE)
    torch.library.opcheck(DEQUANTIZE, (x_q, torch.rand(scale_shape, device=DEVICE), dtype))


def test_work():
    # 3 x 5: 15 bytes of int8 and 12 of scales in, 30 of bfloat16 out
    assert dequantize_work(3, 5, 2, num_scales=3) == (15, 57)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(dtype):
    x_q = torch.randint(-127, 128, (8192, 5120), dtype=torch.int8, device="cuda")
    scale = torch.rand(8192, 1, device="cuda")
    assert torch.equal(dequantize(x_q, scale, dtype), dequantize_reference(x_q, scale, dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    x_q = torch.randint(-127, 128, (64, 4096), dtype=torch.int8, device="cuda").repeat(8200, 1)
    scale = torch.rand(len(x_q), 1, device="cuda")
    out = dequantize(x_q, scale, torch.bfloat16)
    for rows in (slice(0, 64), slice(-64, None)):
        assert torch.equal(out[rows], dequantize_reference(x_q[rows], scale[rows], torch.bfloat16))
