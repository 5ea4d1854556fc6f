"""scaled_mm: exact in int32, one order of float32 operations after it, one cast."""

import pytest
import torch

from swcompile.kernels import scaled_mm as module
from swcompile.kernels.quantize_rowwise import quantize_rowwise
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise
from swcompile.kernels.scaled_mm import (
    MAX_K,
    SCALED_MM,
    scaled_mm,
    scaled_mm_reference,
    scaled_mm_triton,
    scaled_mm_work,
)
from swcompile.kernels.scaled_mm_kernels import (
    HOPPER_CANDIDATES,
    POINTER_CANDIDATES,
    TMA_CANDIDATES,
    MatmulConfig,
    fits_tma,
    has_wgmma,
    launcher,
)
from swcompile.kernels.tuning import num_tunings

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the kernels run in Triton's interpreter on the latter
IMPLEMENTATIONS = [scaled_mm_reference, scaled_mm_triton]
# the TMA kernel wants K and a row of the output to be multiples of 16 bytes: 1 to 3 are not, the rest are
SHAPES = [(1, 1, 1), (3, 5, 7), (130, 70, 100), (17, 16, 16), (70, 144, 160), (150, 272, 48)]


CONFIGS = list(dict.fromkeys([*HOPPER_CANDIDATES, *TMA_CANDIDATES, *POINTER_CANDIDATES]))


def random_operands(
    num_rows: int, num_columns: int, num_summed: int, *, per_column: bool = False, device: str = DEVICE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a_q = torch.randint(-127, 128, (num_rows, num_summed), dtype=torch.int8, device=device)
    b_q = torch.randint(-127, 128, (num_columns, num_summed), dtype=torch.int8, device=device)
    scale_a = torch.rand(num_rows, 1, device=device) * 0.01
    return a_q, b_q, scale_a, torch.rand(num_columns if per_column else 1, 1, device=device)


def expected_of_kernel(*arguments: object) -> torch.Tensor:
    """The reference; but Triton's interpreter casts to bfloat16 by cutting bits off."""
    if DEVICE == "cuda" or arguments[-1] != torch.bfloat16:
        return scaled_mm_reference(*arguments)
    exact = scaled_mm_reference(*arguments[:-1], torch.float32)
    return (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def skip_unless_it_runs_here(config: MatmulConfig, *tensors: torch.Tensor) -> None:
    if config.kernel != "pointers" and not fits_tma(*tensors):
        pytest.skip("this GPU has no TMA")
    if config.kernel == "wgmma" and not has_wgmma(tensors[0].device):
        pytest.skip("needs a Hopper GPU; Triton's interpreter does not know Gluon")


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_values(function):
    a_q = torch.tensor([[1, 2, 3], [-127, 0, 127]], dtype=torch.int8, device=DEVICE)
    b_q = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.int8, device=DEVICE)
    scale_a, bias = torch.tensor([[1.0], [0.5]], device=DEVICE), torch.tensor([100.0, 200.0], device=DEVICE)
    per_tensor, per_row = torch.tensor([[2.0]], device=DEVICE), torch.tensor([[2.0], [4.0]], device=DEVICE)
    assert function(a_q, b_q, scale_a, per_tensor, None, torch.float32).tolist() == [[2, 12], [-127, 0]]
    assert function(a_q, b_q, scale_a, per_row, None, torch.float16).tolist() == [[2, 24], [-127, 0]]
    assert function(a_q, b_q, scale_a, per_row, bias, torch.bfloat16).tolist() == [[102, 224], [-27, 200]]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accumulator_is_exact(function, shape):
    a_q, b_q, scale_a, scale_b = random_operands(*shape)
    a_q[0], b_q[-1] = 127, -127  # the largest sums: below 2^24, so float32 holds them
    ones = torch.ones_like(scale_a), torch.ones_like(scale_b)
    exact = a_q.cpu().long() @ b_q.cpu().long().t()
    assert torch.equal(function(a_q, b_q, *ones, None, torch.float32).cpu().long(), exact)


def test_longest_sum_does_not_overflow():
    a_q, b_q = torch.full((1, MAX_K), 127, dtype=torch.int8), torch.full((1, MAX_K), 127, dtype=torch.int8)
    one = torch.ones(1, 1)
    assert MAX_K * 127**2 < 2**31 <= (MAX_K + 1) * 127**2
    assert scaled_mm(a_q, b_q, one, one, None, torch.float32).item() == torch.tensor(MAX_K * 127.0**2)
    with pytest.raises(ValueError, match=f"K={MAX_K + 1} may overflow int32"):
        scaled_mm(*(torch.zeros(1, MAX_K + 1, dtype=torch.int8),) * 2, one, one, None, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(
    ("bias_dtype", "out_dtype"),
    [(None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float32)],
)
def test_kernels_equal_reference(shape, per_column, bias_dtype, out_dtype):
    operands = random_operands(*shape, per_column=per_column)
    bias = None if bias_dtype is None else torch.randn(shape[1], device=DEVICE).to(bias_dtype)
    actual = scaled_mm_triton(*operands, bias, out_dtype)
    assert actual.dtype == out_dtype and actual.is_contiguous()
    assert torch.equal(actual, expected_of_kernel(*operands, bias, out_dtype))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_gives_the_same_bits(config):
    operands = random_operands(70, 272, 144, per_column=True)
    arguments = (*operands, torch.randn(272, device=DEVICE), torch.bfloat16)
    out = torch.full((70, 272), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    skip_unless_it_runs_here(config, *operands[:2], out)
    launcher(config, *arguments[:-1], out)(*arguments[:-1], out)
    assert torch.equal(out, expected_of_kernel(*arguments))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_operands_that_are_not_contiguous(function):
    a_q, b_q, scale_a, scale_b = random_operands(32, 48, 64, per_column=True)
    expected = scaled_mm_reference(a_q, b_q, scale_a, scale_b, None, torch.float32)
    strided = torch.stack([scale_a, scale_a], 1)[:, 0]
    actual = function(
        a_q.t().contiguous().t(), b_q.repeat(1, 2)[:, :64], strided, scale_b, None, torch.float32
    )
    assert torch.equal(actual, expected)


def test_product_is_near_full_precision():
    # int8 of normal data has a step of about 1/30 standard deviation: 40 dB a product of two, less the weight's
    # coarser scale. Equal would mean that nothing was quantised.
    x, w = torch.randn(256, 512), torch.randn(128, 512)
    (x_q, scale_x), (w_q, scale_w) = quantize_rowwise(x), quantize_tensorwise(w)
    exact = x @ w.t()
    error = scaled_mm(x_q, w_q, scale_x, scale_w, None, torch.float32) - exact
    sqnr_db = 20 * torch.log10(exact.norm() / error.norm())
    assert 35 < sqnr_db < 50


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_operand_makes_its_rows_not_finite(function, poison):
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    x[1, 3] = poison
    (x_q, scale_x), (w_q, scale_w) = quantize_rowwise(x), quantize_tensorwise(w)
    out = function(x_q, w_q, scale_x, scale_w, None, torch.float32)
    assert not out[1].isfinite().any() and out[[0, 2, 3]].isfinite().all()
    w[0, 0] = poison
    w_q, scale_w = quantize_tensorwise(w)
    assert not function(x_q, w_q, scale_x, scale_w, None, torch.float32).isfinite().any()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_empty(function):
    bias = torch.randn(16, device=DEVICE)
    for num_rows, num_columns, num_summed in ((0, 16, 16), (16, 0, 16), (3, 16, 0)):
        out = function(*random_operands(num_rows, num_columns, num_summed), bias[:num_columns], torch.float32)
        assert torch.equal(out, bias[:num_columns].expand(num_rows, -1))  # an empty sum is 0


@pytest.mark.parametrize("num_summed", [1, 1040, 1041, 5000])
def test_cpu_with_and_without_int8_instructions(monkeypatch, num_summed):
    # the largest sums of one sign first: what float32 would have to round, were the parts added in it
    a_q, b_q, scale_a, scale_b = random_operands(9, 11, num_summed, device="cpu")
    a_q[0], b_q[0] = 127, 127
    exact = (a_q.long() @ b_q.long().t()).float() * scale_a * scale_b
    for has_instructions in (False, True):
        monkeypatch.setattr(module, "_cpu_multiplies_int8", lambda value=has_instructions: value)
        assert torch.equal(scaled_mm_reference(a_q, b_q, scale_a, scale_b, None, torch.float32), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_q": torch.zeros(4, 8)}, "must be int8"),
        ({"b_q": torch.zeros(6, 9, dtype=torch.int8)}, "K=8, but b_q over 9"),
        ({"scale_a": torch.ones(4)}, "must have 2 dimensions"),
        ({"scale_a": torch.ones(1, 4)}, r"scale_a is \(1, 4\), but must be \(4, 1\)"),
        ({"scale_a": torch.ones(4, 1).half()}, "scales must be float32"),
        ({"scale_b": torch.ones(4, 1)}, r"scale_b is \(4, 1\), but must be \(1, 1\) or \(6, 1\)"),
        ({"bias": torch.ones(1, 6)}, "bias has 2 dimensions, but must have 1"),
        ({"bias": torch.ones(5)}, "bias has 5 elements for 6 columns"),
        ({"bias": torch.ones(6, dtype=torch.int32)}, "bias must be floating point"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32"),
    ],
)
@pytest.mark.parametrize("function", [scaled_mm, *IMPLEMENTATIONS])
def test_user_errors(function, change, message):
    arguments = {
        "a_q": torch.zeros(4, 8, dtype=torch.int8),
        "b_q": torch.zeros(6, 8, dtype=torch.int8),
        "scale_a": torch.ones(4, 1),
        "scale_b": torch.ones(1, 1),
        "bias": None,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        function(*(arguments | change).values())


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("bias", [None, torch.randn(16)])
def test_opcheck(per_column, bias):
    bias = None if bias is None else bias.to(DEVICE)
    torch.library.opcheck(
        SCALED_MM, (*random_operands(5, 16, 32, per_column=per_column), bias, torch.bfloat16)
    )


def test_work():
    # 2 x 3 outputs of 5 products: 10 + 15 bytes of int8, 12 of bfloat16 out, 2 + 1 scales
    assert scaled_mm_work(2, 3, 5, 2) == (60, 49)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_on_many_tiles(config):
    # several tiles a program, partial tiles at both edges, and a K that is no multiple of a step
    operands = random_operands(5000, 2064, 1360, per_column=True)
    bias = torch.randn(2064, device=DEVICE)
    expected = scaled_mm_reference(*operands, bias, torch.bfloat16)
    out = torch.empty_like(expected)
    skip_unless_it_runs_here(config, *operands[:2], out)
    launch = launcher(config, *operands, bias, out)
    for _ in range(20):  # a race between copies and multiplications need not show at once
        out.fill_(torch.nan)
        launch(*operands, bias, out)
        assert torch.equal(out, expected)


@pytest.mark.gpu
# of each kernel one that has room for a float32 tile of the output
@pytest.mark.parametrize(
    "config",
    [
        MatmulConfig("wgmma", 128, 128, 128, 4, 5, lead=2),
        TMA_CANDIDATES[0],
        POINTER_CANDIDATES[0],
    ],
)
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(
    ("bias_dtype", "out_dtype"),
    [(None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)],
)
def test_large(config, per_column, bias_dtype, out_dtype):
    for shape in (
        (1, 1280, 1280),
        (64, 4096, 4096),
        (4113, 1280, 5120),
        (8192, 3840, 1280),
        (1000, 999, 1001),
    ):
        operands = random_operands(*shape, per_column=per_column)
        bias = None if bias_dtype is None else torch.randn(shape[1], device=DEVICE).to(bias_dtype)
        expected = scaled_mm_reference(*operands, bias, out_dtype)
        out = torch.full_like(expected, torch.nan)
        if config.kernel == "pointers" or fits_tma(*operands[:2], out):
            skip_unless_it_runs_here(config, *operands[:2], out)
            launcher(config, *operands, bias, out)(*operands, bias, out)
            assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4113, 1280, 5120), (1000, 999, 1001)])
def test_op_on_cuda(shape):
    operands = random_operands(*shape)
    expected = scaled_mm_reference(*operands, None, torch.bfloat16)
    assert torch.equal(scaled_mm(*operands, None, torch.bfloat16), expected)
    before = num_tunings()
    assert torch.equal(scaled_mm(*operands, None, torch.bfloat16), expected)
    assert num_tunings() == before


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_outputs():
    a_q, b_q, scale_a, scale_b = random_operands(64, 16384, 64)
    a_q, scale_a = a_q.repeat(2100, 1), scale_a.repeat(2100, 1)
    out = scaled_mm(a_q, b_q, scale_a, scale_b, None, torch.bfloat16)
    assert out.numel() > 2**31
    expected = scaled_mm_reference(a_q[:64], b_q, scale_a[:64], scale_b, None, torch.bfloat16)
    for start in (0, 64 * 1050, 64 * 2099):
        assert torch.equal(out[start : start + 64], expected)


@pytest.mark.gpu
def test_cuda_graph():
    operands = random_operands(300, 1280, 1280)
    expected = scaled_mm(*operands, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_mm(*operands, None, torch.bfloat16)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("has_vnni", [False, True])
def test_autocast_changes_nothing(has_vnni, monkeypatch):
    monkeypatch.setattr(module, "_cpu_multiplies_int8", lambda: has_vnni)
    arguments = (*random_operands(33, 40, 500, device="cpu"), None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_mm(*arguments)
    assert torch.equal(out, scaled_mm_reference(*arguments))
