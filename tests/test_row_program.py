"""Row programs: their text, what is no program, and what the reference computes."""

import pytest
import torch

from swcompile.kernels.map_rows import MAP_ROWS, map_rows, map_rows_work
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference
from swcompile.kernels.row_program import Action, Output, Ref, Shape, Step, Value, parse
from swcompile.kernels.row_program_source import source

RMS_NORM = """\
%0: bf16[M, K] = input
%1: f32[1, K] = input
%2: f32[M, K] = mul(%0, %0)
%3: f32[M, 1] = sum(%2)
%4: f32[M, 1] = div(%3, 48.0)
%5: f32[M, 1] = add(%4, 1e-06)
%6: f32[M, 1] = rsqrt(%5)
%7: f32[M, K] = mul(%0, %6)
%8: bf16[M, K] = mul(%7, %1)
store %6
store %8
quantize %8
sum_rows %7: f32"""


def test_text_comes_back() -> None:
    program = parse(RMS_NORM)
    assert str(program) == RMS_NORM and parse(str(program)) is program
    assert str(parse(program.text)) == RMS_NORM
    assert "\n" not in program.text, "Inductor writes it into a comment of one line"
    assert program.inputs == (Value(Shape.MATRIX, torch.bfloat16), Value(Shape.ROW, torch.float32))
    assert program.steps[1] == Step("sum", (Ref(2),), Value(Shape.COLUMN, torch.float32))
    assert program.outputs[2:] == (Output(Action.QUANTIZE, Ref(8)), Output(Action.SUM_ROWS, Ref(7), torch.float32))


@pytest.mark.parametrize("number", ["inf", "-inf", "0.1", "3e-45"])
def test_numbers_come_back(number: str) -> None:
    text = f"%0: f32[M, K] = input\n%1: f32[M, K] = add(%0, {number})\nstore %1"
    assert parse(text).steps[0].args[1] == float(number) and str(parse(text)) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%1: f32[M, K] = sinh(%0)", "unknown step 'sinh'"),
        ("%1: f32[M, K] = add(%0)", "add takes 2"),
        ("%1: f32[M, K] = add(%0, %1)", "earlier values"),
        ("%1: f32[M, K] = add(1.0, 2.0)", "earlier values"),
        ("%1: f32[M, K] = sum(%0)", "makes a column of a matrix"),
        ("%2: f32[M, K] = neg(%0)", "not a line"),
        ("%1: i8[M, K] = neg(%0)", "not a line"),
        ("x = y", "not a line"),
        ("%1: f32[M, 1] = sum(%0)\nquantize %1", "quantize takes no value"),
    ],
)
def test_what_is_no_program(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"%0: f32[M, K] = input\n{line}\nstore %0")


def test_a_program_reads_a_matrix_and_gives_something() -> None:
    for text in ("%0: f32[M, 1] = input\nstore %0", "%0: f32[M, K] = input"):
        with pytest.raises(ValueError, match="has an input"):
            parse(text)


def test_reference_computes_each_step_and_rounds_it() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 48).bfloat16(), torch.randn(48)
    inverse, stored, q, scale, total = map_rows([x, weight], parse(RMS_NORM))
    wide = x.float()
    expected_inverse = (wide.square().sum(1, keepdim=True) / 48 + 1e-6).rsqrt()
    expected = (wide * expected_inverse * weight).bfloat16()
    assert torch.equal(inverse, expected_inverse) and torch.equal(stored, expected)
    assert torch.equal(q, quantize_rowwise_reference(expected)[0])
    assert torch.equal(scale, quantize_rowwise_reference(expected)[1])
    assert torch.equal(total, (wide * expected_inverse).sum(0))


PRODUCTS = {
    "read by a sum alone": ("%2: f32[M, K] = mul(%0, %1)\n%3: f32[M, K] = add(%2, %0)\nstore %3", "tl.fma(v0_0, v1_0, v0_0)"),
    "subtracted": ("%2: f32[M, K] = mul(%0, %1)\n%3: f32[M, K] = sub(%0, %2)\nstore %3", "tl.fma(-(v0_0), v1_0, v0_0)"),
    "less something": ("%2: f32[M, K] = mul(%0, %1)\n%3: f32[M, K] = sub(%2, %0)\nstore %3", "tl.fma(v0_0, v1_0, -(v0_0))"),
    "summed over rows": ("%2: f32[M, K] = mul(%0, %1)\nstore %0\nsum_rows %2: f32", "tl.fma(v0_0, v1_0, sum1_0)"),
    "stored as well": ("%2: f32[M, K] = mul(%0, %1)\n%3: f32[M, K] = add(%2, %0)\nstore %2\nstore %3", None),
    "read twice": ("%2: f32[M, K] = mul(%0, %1)\n%3: f32[M, K] = add(%2, %2)\nstore %3", None),
    "rounded": ("%2: bf16[M, K] = mul(%0, %1)\n%3: f32[M, K] = add(%2, %0)\nstore %3", None),
    "a column": ("%2: f32[M, 1] = sum(%0)\n%3: f32[M, 1] = mul(%2, %2)\n%4: f32[M, K] = add(%0, %3)\nstore %4", None),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_are_part_of_a_multiply_add(name: str) -> None:
    steps, folded = PRODUCTS[name]
    text = source(parse(f"%0: f32[M, K] = input\n%1: f32[M, K] = input\n{steps}"), 1)
    assert folded in text if folded else "tl.fma" not in text


def test_inputs_are_checked() -> None:
    program = parse(RMS_NORM)
    x, weight = torch.randn(6, 48).bfloat16(), torch.randn(48)
    for inputs, message in (
        ([x], "1 tensors for a program with 2 inputs"),
        ([x.float(), weight], "input %0 is torch.float32"),
        ([x[None], weight], "3 dimensions"),
        ([x, weight[:40]], r"input %1 is \(40,\), but must be \(48,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            map_rows(inputs, program)


def test_op_is_well_defined() -> None:
    x, weight = torch.randn(6, 48).bfloat16(), torch.randn(48)
    torch.library.opcheck(MAP_ROWS, ([x, weight], RMS_NORM))


def test_no_rows() -> None:
    results = map_rows([torch.randn(0, 48).bfloat16(), torch.randn(48)], parse(RMS_NORM))
    assert [tuple(r.shape) for r in results] == [(0, 1), (0, 48), (0, 48), (0, 1), (48,)]
    assert not results[-1].any()


def test_work() -> None:
    work = map_rows_work(parse(RMS_NORM), 6, 48)
    # read: x and the weight; written: the column, the stored and the int8 matrix, its scales, the sum
    assert work.bytes == 6 * 48 * 2 + 48 * 4 + 6 * 4 + 6 * 48 * 2 + (6 * 48 + 6 * 4) + 48 * 4
    assert work.flops == 6 * 48 * (4 + 2 + 1)  # four steps over features, two to quantise, one to sum

