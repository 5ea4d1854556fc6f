"""map_rows: that the Triton kernel of a program gives what the reference gives."""

import itertools
import math

import pytest
import torch
from processes import run_compiled
from row_programs import PROGRAMS, make_inputs

from swcompile.kernels import row_program_triton
from swcompile.kernels.launch import triton
from swcompile.kernels.map_rows import map_rows_reference, map_rows_triton
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference
from swcompile.kernels.row_program import POINTWISE, Action, Output, parse
from swcompile.kernels.row_program_source import source
from swcompile.kernels.row_program_triton import MAX_COLUMNS, MAX_ELEMENTS, RowConfig, candidates, launcher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in Triton's interpreter on the latter
DTYPES = ["f16", "f32"] + (["bf16"] if DEVICE == "cuda" else [])  # the interpreter cuts bits off in a cast to bfloat16


@pytest.fixture(autouse=True)
def _wide_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a narrow program as for a wide one: there the second kernel has few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(row_program_triton, "_SUM_COLUMNS", 128)


def assert_close(text: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Each output within the last bits of its dtype; int8 within one step, and nearly always the same."""
    program = parse(text)
    actions = [o.action for o in program.outputs for _ in range(2 if o.action is Action.QUANTIZE else 1)]
    for action, a, e in zip(actions, actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and a.is_contiguous()
        if a.dtype is torch.int8:
            difference = (a.int() - e.int()).abs()
            assert difference.max() <= 1 and difference.count_nonzero() <= 0.01 * a.numel()
            continue
        unit = torch.finfo(a.dtype).eps
        # A sum over rows or features cancels; what transcendental functions err by is relative to 1, not to the result.
        size = e[e.isfinite()].abs().amax().clamp(min=1e-3).item()
        rtol, atol = (2e-5, 2e-5) if action is Action.SUM_ROWS or a.dtype is torch.float32 else (0.0, 0.0)
        torch.testing.assert_close(a, e, rtol=max(rtol, 2 * unit), atol=max(atol, unit / 2, 4e-6) * size, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernel_equals_reference(name: str, dtype: str) -> None:
    text = PROGRAMS[name].replace("bf16", dtype)
    # fewer features than one piece; whole pieces; a last piece that is cut; and rows that fill no tile
    for num_rows, num_columns in ((3, 40), (8, 512), (13, 600)):
        inputs = make_inputs(text, num_rows, num_columns, DEVICE)
        assert_close(text, map_rows_triton(inputs, text), map_rows_reference(inputs, text))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_backward", "rms_norm", "gelu", "gelu_backward"])
def test_int8_is_that_of_the_stored_value_to_the_bit(name: str, dtype: str) -> None:
    text = PROGRAMS[name].replace("bf16", dtype)
    program = parse(text)
    results = map_rows_triton(make_inputs(text, 13, 600, DEVICE), text)
    (quantized,) = (output.ref for output in program.outputs if output.action is Action.QUANTIZE)
    stored = [output.ref for output in program.outputs].index(quantized)  # what is stored comes first
    q, scale = results[program.outputs.index(Output(Action.QUANTIZE, quantized)) :][:2]
    expected_q, expected_scale = quantize_rowwise_reference(results[stored])
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_configuration_gives_the_same(name: str) -> None:
    text = PROGRAMS[name].replace("bf16", "f16")
    program = parse(text)
    for num_columns in (600, 1280):
        inputs = make_inputs(text, 5, num_columns, DEVICE)
        results = []
        for config in candidates(program, num_columns):
            outputs = [torch.empty_like(out) for out in map_rows_reference(inputs, text)]
            launcher(inputs, program, config)(inputs, outputs)
            results.append(outputs)
        assert len(results) >= 2
        for other in results[1:]:
            assert_close(text, other, results[0])


def test_strides() -> None:
    text = PROGRAMS["gelu"].replace("bf16", "f16")
    whole = torch.randn(6, 400, dtype=torch.float16, device=DEVICE)
    for x in (whole[::2], whole[:, 100:300], whole.t(), whole[:1].expand(5, -1)):
        assert_close(text, map_rows_triton([x], text), map_rows_reference([x], text))


def test_what_is_not_finite_stays_in_its_row() -> None:
    text = PROGRAMS["layer_norm"].replace("bf16", "f16")
    inputs = make_inputs(text, 6, 300, DEVICE)
    inputs[0][1, 7], inputs[0][3, 299] = torch.nan, torch.inf
    results = map_rows_triton(inputs, text)
    assert_close(text, results, map_rows_reference(inputs, text))
    program = parse(text)
    scale = results[-1]
    assert program.outputs[-1].action is Action.QUANTIZE
    assert scale.isnan().flatten().tolist() == [False, True, False, True, False, False]


def test_a_row_of_zeros() -> None:
    text = "%0: f32[M, K] = input\n%1: f32[M, K] = mul(%0, 2.0)\nquantize %1"
    q, scale = map_rows_triton([torch.zeros(3, 50, device=DEVICE)], text)
    assert not q.any() and scale.isfinite().all() and (scale > 0).all()


def test_columns_are_read_and_written() -> None:
    text = "%0: f32[M, K] = input\n%1: f32[M, 1] = input\n%2: f32[M, K] = sub(%0, %1)\n%3: f32[M, 1] = amax(%2)\nstore %3"
    x, column = torch.randn(7, 300, device=DEVICE), torch.randn(7, 1, device=DEVICE)
    (result,) = map_rows_triton([x, column], text)
    assert torch.equal(result, (x - column).amax(1, keepdim=True))


def test_masks_and_choices() -> None:
    text = (
        "%0: f32[M, K] = input\n%1: b8[M, K] = input\n%2: b8[M, K] = le(%0, 0.25)\n%3: f32[M, K] = where(%2, %0, 0.0)\n"
        "%4: f32[M, K] = where(%1, %3, -1.0)\nstore %4"
    )
    x, mask = torch.randn(7, 300, device=DEVICE), torch.rand(7, 300, device=DEVICE) < 0.5
    (result,) = map_rows_triton([x, mask], text)
    assert torch.equal(result, torch.where(mask, torch.where(x <= 0.25, x, 0.0), -1.0))


MASKS = {
    "twice": "%2: f32[M, K] = cast(%1)\n%3: f32[M, K] = add(%2, %2)\nstore %3",
    "negative": "%2: f32[M, K] = cast(%1)\n%3: f32[M, K] = neg(%2)\nstore %3",
    "sign": "%2: b8[M, K] = gt(%0, 1.0)\n%3: f32[M, K] = cast(%2)\n%4: f32[M, K] = sub(%1, %3)\nstore %4",
    "count": "%2: f32[M, K] = cast(%1)\n%3: f32[M, 1] = sum(%2)\nstore %3",
    "function": "%2: f32[M, K] = cast(%1)\n%3: f32[M, K] = erf(%2)\nstore %3",
    "not zero": "%2: b8[M, K] = cast(%0)\n%3: f32[M, K] = mul(%2, %0)\nstore %3",
    "0 and 1": "%2: b8[M, K] = cast(%0)\n%3: f32[M, K] = cast(%2)\nstore %3",
    "factor": "%2: f16[M, K] = mul(%1, 3.0)\nquantize %2",
    "stored": "%2: b8[M, K] = le(%0, 0.0)\n%3: b8[M, K] = where(%1, %2, %1)\nstore %3",
}


@pytest.mark.parametrize("name", MASKS)
def test_booleans_are_numbers_in_arithmetic(name: str) -> None:
    text = f"%0: f32[M, K] = input\n%1: b8[M, K] = input\n{MASKS[name]}"
    x, mask = torch.randn(3, 300, device=DEVICE).round(), torch.rand(3, 300, device=DEVICE) < 0.5
    for actual, expected in zip(map_rows_triton([x, mask], text), map_rows_reference([x, mask], text), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=5e-7 if name == "function" else 0.0)


@pytest.mark.parametrize("divisor", [3.0, 8.0, 0.0, -0.0, 1e-40, 1e-50, 1e38, 1e39, -7.0, math.inf, math.nan])
def test_division_by_a_number(divisor: float) -> None:
    text = f"%0: f32[M, K] = input\n%1: f32[M, K] = div(%0, {divisor!r})\nstore %1"
    x = torch.tensor([[0.5, -0.25, 2.0, 0.0, 1e-39, 1e30]], device=DEVICE)
    (actual,), (expected,) = map_rows_triton([x], text), map_rows_reference([x.cpu()], text)  # where torch divides
    torch.testing.assert_close(actual.cpu(), expected, rtol=3e-7, atol=1e-37, equal_nan=True)


FOLDED = {
    "gelu's gradient": "%1: f32[M, K] = mul(%0, 0.7071067811865476)\n%2: f32[M, K] = erf(%1)\n%3: f32[M, K] = mul(%0, %0)\n"
    "%4: f32[M, K] = mul(%3, -0.5)\n%5: f32[M, K] = exp(%4)\n%6: f32[M, K] = add(%2, %5)\nstore %6",
    "another exponential": "%1: f32[M, K] = mul(%0, 0.7071067811865476)\n%2: f32[M, K] = erf(%1)\n%3: f32[M, K] = mul(%0, %0)\n"
    "%4: f32[M, K] = mul(%3, -0.25)\n%5: f32[M, K] = exp(%4)\n%6: f32[M, K] = add(%2, %5)\nstore %6",
    "a negative number": "%1: f32[M, K] = mul(%0, -0.7)\n%2: f32[M, K] = erf(%1)\nstore %2",
    "a product that is read twice": "%1: f32[M, K] = mul(%0, 0.7)\n%2: f32[M, K] = erf(%1)\nstore %1\nstore %2",
    "a tiny number": "%1: f32[M, K] = mul(%0, 1e-30)\n%2: f32[M, K] = exp(%1)\nstore %2",
    "a square in 16 bits": "%1: f32[M, K] = mul(%0, 0.7071067811865476)\n%2: f32[M, K] = erf(%1)\n%3: bf16[M, K] = mul(%0, %0)\n"
    "%4: f32[M, K] = mul(%3, -0.5)\n%5: f32[M, K] = exp(%4)\nstore %2",
}
INSIDE = {"gelu's gradient": "erf_by(", "another exponential": "erf(v0_0", "a negative number": "erf(v1_0, 1.0)"}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_numbers_inside_functions(name: str, dtype: str) -> None:
    text = f"%0: {dtype}[M, K] = input\n{FOLDED[name]}"
    if dtype == "f32" and name in INSIDE:
        assert INSIDE[name] in source(parse(text), 1)
    x = torch.cat([torch.randn(3, 254) * 2, torch.tensor([[0.0, torch.inf]]).expand(3, 2)], 1).to(DEVICE)
    x = x.bfloat16() if dtype == "bf16" else x
    for actual, expected in zip(map_rows_triton([x], text), map_rows_reference([x], text), strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=6e-7)


def test_the_largest_of_a_row_with_nan_is_nan() -> None:
    x = torch.randn(3, 600, device=DEVICE)
    x[1, 5] = x[2, 599] = torch.nan
    (result,) = map_rows_triton([x], "%0: f32[M, K] = input\n%1: f32[M, 1] = amax(%0)\nstore %1")
    torch.testing.assert_close(result, x.amax(1, keepdim=True), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("op", [op for op, pointwise in POINTWISE.items() if pointwise.arity == 1])
def test_functions(op: str) -> None:
    text = f"%0: f32[M, K] = input\n%1: f32[M, K] = {op}(%0)\nstore %1"
    x = torch.cat([torch.linspace(-12, 12, 240), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 0.03, 87.0, -87.0, torch.inf])])
    if op in ("sqrt", "rsqrt", "reciprocal"):
        x = x[x > 0]
    x = x.to(DEVICE).reshape(2, -1)
    (result,) = map_rows_triton([x], text)
    torch.testing.assert_close(result, map_rows_reference([x], text)[0], rtol=5e-6, atol=6e-7)
    nan = torch.full((1, 20), torch.nan, device=DEVICE)
    assert map_rows_triton([nan], text)[0].isnan().all()


def test_tanh_of_small_values_keeps_its_digits() -> None:
    text = "%0: f32[M, K] = input\n%1: f32[M, K] = tanh(%0)\nstore %1"
    x = torch.logspace(-8, 0, 400, device=DEVICE).reshape(1, -1)
    torch.testing.assert_close(map_rows_triton([x], text)[0], x.tanh(), rtol=1e-5, atol=0.0)


def test_division_by_one_plus_e_to_the_x() -> None:
    text = PROGRAMS["swiglu"].replace("bf16", "f32")
    assert "inverse_of_positive(v" in source(parse(text), 1), "silu divides by what is never below 1"
    x = torch.tensor([[-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0]], device=DEVICE)
    torch.testing.assert_close(
        map_rows_triton([x, x], text)[0], torch.nn.functional.silu(x) * x, rtol=2e-6, atol=1e-30
    )


def test_rows_that_no_block_holds() -> None:
    x = torch.zeros(1, MAX_COLUMNS + 1, device=DEVICE)
    with pytest.raises(ValueError, match="rows of up to 32768"):
        map_rows_triton([x], "%0: f32[M, K] = input\n%1: f32[M, K] = neg(%0)\nstore %1")


def test_candidates() -> None:
    for name, num_columns in itertools.product(PROGRAMS, (2, 80, 1024, 1280, 4096, 5120, 14336, MAX_COLUMNS)):
        configs = candidates(parse(PROGRAMS[name]), num_columns)
        assert 1 <= len(set(configs)) == len(configs) <= 4
        for config in configs:
            assert config.num_warps % config.warps_per_row == 0 and config.num_warps >= 4
            assert triton.cdiv(num_columns, config.width) * config.adjacent <= MAX_ELEMENTS
    assert candidates(parse(PROGRAMS["gelu"]), 1280)[0] == RowConfig(1, 4)
    assert candidates(parse(PROGRAMS["layer_norm_backward"]), 1280)[0].width == 256, "five pieces, and nothing left over"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "num_columns"), [("swiglu", 1104), ("swiglu_backward", 14336), ("rms_norm_backward", 1104)])
def test_nothing_is_left_to_compile_or_load_in_the_first_call(
    name: str, num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = parse(PROGRAMS[name])
    inputs = make_inputs(PROGRAMS[name], 512, num_columns, "cuda")
    row_program_triton.compile_in_background(program, 512, num_columns, inputs[0].device)
    row_program_triton._pending[program, num_columns, inputs[0].device].result()

    def refuse(compiled: triton.compiler.CompiledKernel) -> None:
        assert compiled.module is not None, f"{compiled.name} is not loaded"

    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", refuse)
    assert_close(PROGRAMS[name], map_rows_triton(inputs, PROGRAMS[name]), map_rows_reference(inputs, PROGRAMS[name]))


@pytest.mark.gpu
def test_long_and_many_rows() -> None:
    text = PROGRAMS["gelu_backward"]
    inputs = make_inputs(text, 70_001, MAX_COLUMNS, "cuda")  # more than 2^31 elements
    for a, e in zip(map_rows_triton(inputs, text), map_rows_reference([t[-100:] for t in inputs], text), strict=True):
        if a.dim() == 2:
            torch.testing.assert_close(a[-100:].float(), e.float(), rtol=2e-2, atol=1.0 if a.dtype is torch.int8 else 2e-2)


def test_compiles_for_gpus_without_spilling() -> None:
    printed = run_compiled("-m", "compile_row_programs")
    assert printed.splitlines()[-1:] == ["all compiled"], printed
