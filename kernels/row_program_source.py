"""Writes the Triton kernel of a row program.

A row is cut into pieces of equal width, one variable each: as many adjacent elements a thread, so that all loads and
stores have one layout and nothing moves between threads but what is reduced. The pieces stay in registers from the
loads to the stores. A product that a sum alone reads is part of a fused multiply-add. Shapes: M rows, K features a row.
"""

import math
from collections import Counter
from functools import cache

import torch

from swcompile.kernels.row_program import POINTWISE, Action, Output, Ref, RowProgram, Shape, Step


@cache
def source(program: RowProgram, num_pieces: int, loads_ahead: bool = False) -> str:
    """The source of a module with the Triton function `row_kernel` for rows of so many pieces.

    A program that sums rows leaves a sum for each program of its grid; `sum_kernel` adds these, in the same order always.
    With `loads_ahead` it holds all matrices of the tile that comes next in shared memory.
    """
    return _Writer(program, num_pieces, loads_ahead).write()


_HEADER = '''\
"""Row program:

{program}
"""

import triton
import triton.language as tl

from swcompile.kernels.int8 import magnitude_bits, round_to_int8, scale_and_inverse
from swcompile.kernels.row_math import erf, erf_by, from_bfloat16, inverse_of_positive, larger, relu, sigmoid, tanh, to_bfloat16


@triton.jit(do_not_specialize=["num_rows"])
def row_kernel(
    {arguments}, num_rows,
    K: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    columns = tl.zeros([BLOCK_M, 1], tl.int32) + tl.arange(0, WIDTH)[None, :]
'''

_SUM_KERNEL = '''

@triton.jit(do_not_specialize=["num_programs"])
def sum_kernel(
    partial, {totals}, num_programs,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # `row_kernel` has ended; nothing was read before
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = partial + tl.program_id(1).to(tl.int64) * num_programs * K
    sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for first in range(0, num_programs, BLOCK_P):
        rows = (first + tl.arange(0, BLOCK_P))[:, None]
        sums += tl.load(start + rows * K + columns[None, :], mask=(rows < num_programs) & (columns < K)[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
'''

_LOG2_E = 1.4426950408889634
_TRITON_DTYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}


class _Writer:
    """Writes the lines of a kernel, each value when it is first needed: a thread then holds few at a time."""

    def __init__(self, program: RowProgram, num_pieces: int, loads_ahead: bool):
        self.program = program
        self.loads_ahead = loads_ahead
        self.pieces = range(num_pieces)
        self.lines: list[str] = []
        self.written: set[str] = set()
        arguments = [arg for step in program.steps for arg in step.args if isinstance(arg, Ref)]
        self.num_readers = Counter(arguments + [output.ref for output in program.outputs])
        quantized = {output.ref for output in program.outputs if output.action is Action.QUANTIZE}
        # Where both arguments have 16 bits, the compiler finds an instruction for two results.
        self.packed = {
            step
            for index, step in enumerate(program.steps, len(program.inputs))
            if Ref(index) in quantized
            and any(isinstance(arg, float) or program.value(arg).dtype == torch.float32 for arg in step.args)
        }

    def write(self) -> str:
        program = self.program
        arguments = [f"in{number}" for number in range(len(program.inputs))]
        for number, output in enumerate(program.outputs):
            arguments += [f"out{number}"] + ([f"scale{number}"] if output.action is Action.QUANTIZE else [])
        arguments += [f"stride{n}" for n, value in enumerate(program.inputs) if value.shape is Shape.MATRIX]
        header = _HEADER.format(program=program, arguments=", ".join(arguments))
        sums = [number for number, output in enumerate(program.outputs) if output.action is Action.SUM_ROWS]
        for number in sums:
            for i in self.pieces:
                self._line(f"sum{number}_{i} = tl.zeros([BLOCK_M, WIDTH], tl.float32)")
        stages = ", num_stages=2" if self.loads_ahead else ""
        self._line(f"for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0){stages}):")
        self._tile()
        if sums:
            self._line("if OVERLAP:")
            self._line("    tl.extra.cuda.gdc_launch_dependents()  # `sum_kernel`, which waits inside")
        for number in sums:
            for i in self.pieces:
                where = f"tl.arange(0, WIDTH) + {i} * WIDTH"
                self._line(
                    f"tl.store(out{number} + tl.program_id(0).to(tl.int64) * K + {where}, tl.sum(sum{number}_{i}, axis=0)"
                    + (f", mask={where} < K)" if self._is_cut(i) else ")")
                )
        return header + "\n".join(f"    {line}" for line in self.lines) + "\n" + (self._sum_kernel(sums) if sums else "")

    def _sum_kernel(self, sums: list[int]) -> str:
        lines = [_SUM_KERNEL.format(totals=", ".join(f"out{number}" for number in sums)).rstrip()]
        for position, number in enumerate(sums):
            dtype = self.program.outputs[number].dtype
            assert dtype is not None
            lines.append(f"    if tl.program_id(1) == {position}:")
            lines.append(f"        tl.store(out{number} + columns, total.to({_TRITON_DTYPES[dtype]}), mask=columns < K)")
        return "\n".join(lines) + "\n"

    def _line(self, text: str) -> None:
        self.lines.append(text)

    def _is_cut(self, piece: int) -> bool:
        """Whether a piece may reach beyond the end of the row."""
        return piece == self.pieces[-1]

    def _tile(self) -> None:
        """The body of the loop over tiles of rows."""
        start = len(self.lines)
        # Rows beyond the last repeat it: the same bits are written twice, and no mask is needed.
        self._line("first = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]")
        self._line("rows = tl.minimum(first, num_rows - 1).to(tl.int64)")
        self._line("is_row = first < num_rows")
        if self.pieces:
            self._line(f"in_row = columns + {self.pieces[-1]} * WIDTH < K")
        for number, value in enumerate(self.program.inputs):  # all loads are under way before the first is waited for
            if value.shape is Shape.MATRIX:
                for i in self.pieces:
                    self._matrix(Ref(number), i)
        for number, output in enumerate(self.program.outputs):
            if self.program.value(output.ref).shape is Shape.COLUMN:
                self._line(f"tl.store(out{number} + rows, {self._column(output.ref)})")
        matrices = [
            (number, output)
            for number, output in enumerate(self.program.outputs)
            if self.program.value(output.ref).shape is Shape.MATRIX
        ]
        for i in self.pieces:
            for number, output in matrices:
                self._finish(number, output, i)
        for number, output in matrices:
            if output.action is Action.QUANTIZE:
                self._quantize(number, output.ref)
        self.lines[start:] = [f"    {line}" for line in self.lines[start:]]

    def _finish(self, number: int, output: Output, i: int) -> None:
        """What is done with a piece of an output as soon as it is there."""
        if output.action is Action.SUM_ROWS:
            total = f"sum{number}_{i}"
            if factors := self._factors(output.ref, i):
                product = " * ".join(factors)
                more = f"tl.fma({', '.join(factors)}, {total})"
            else:
                product = self._argument(output.ref, i)
                more = f"{total} + {product}"
            self._line(f"{total} = {more} if EVEN_M else {total} + tl.where(is_row, {product}, 0.0)")
            return
        name = self._matrix(output.ref, i)
        if output.action is Action.STORE:
            self._store(f"out{number}", name, i)
        else:
            bits = self._within(f"magnitude_bits({self._argument(output.ref, i)})", i, "0")
            self._line(f"bits{number} = {bits if i == 0 else f'tl.maximum(bits{number}, {bits})'}")

    def _quantize(self, number: int, ref: Ref) -> None:
        self._line(f"s{number}, inverse{number} = scale_and_inverse(tl.max(bits{number}, axis=1, keep_dims=True))")
        for i in self.pieces:
            self._store(f"out{number}", f"round_to_int8({self._argument(ref, i)}, inverse{number})", i)
        self._line(f"tl.store(scale{number} + rows, s{number})")

    def _store(self, pointer: str, value: str, i: int) -> None:
        place = f"{pointer} + rows * K + (columns + {i} * WIDTH)"
        if self._is_cut(i):
            self._line(f"tl.store({place}, {value}, mask=None if EVEN_K else in_row)")
        else:
            self._line(f"tl.store({place}, {value})")

    def _within(self, value: str, i: int, other: str) -> str:
        """A value of a piece, with `other` beyond the end of the row."""
        return f"({value} if EVEN_K else tl.where(in_row, {value}, {other}))" if self._is_cut(i) else value

    def _load(self, place: str, i: int) -> str:
        return f"tl.load({place}, mask=None if EVEN_K else in_row)" if self._is_cut(i) else f"tl.load({place})"

    def _matrix(self, ref: Ref, i: int) -> str:
        """The name of a piece of a matrix or of a row of features, written where it is not yet."""
        value = self.program.value(ref)
        name = f"v{ref.index}_{i}"
        if name in self.written:
            return name
        self.written.add(name)
        if ref.index < len(self.program.inputs):
            start = f"in{ref.index}" + (f" + rows * stride{ref.index}" if value.shape is Shape.MATRIX else "")
            self._line(f"{name} = {self._load(f'{start} + (columns + {i} * WIDTH)', i)}")
        else:
            self._step(name, self._step_of(ref), i)
        return name

    def _column(self, ref: Ref) -> str:
        """The name of a column, written where it is not yet."""
        name = f"c{ref.index}"
        if name in self.written:
            return name
        self.written.add(name)
        if ref.index < len(self.program.inputs):
            self._line(f"{name} = tl.load(in{ref.index} + rows)")
            return name
        step = self._step_of(ref)
        if step.op in POINTWISE:
            self._step(name, step, None)
            return name
        (argument,) = step.args
        join, reduce, other = {
            "sum": ("{0} + {1}", "tl.sum({0}, axis=1, keep_dims=True)", "0.0"),
            "amax": ("larger({0}, {1})", "tl.reduce({0}, 1, larger, keep_dims=True)", 'float("-inf")'),
        }[step.op]
        for i in self.pieces:
            if step.op == "sum" and 0 < i < self.pieces[-1] and (factors := self._factors(argument, i)):
                self._line(f"{name} = tl.fma({', '.join(factors)}, {name})")
                continue
            term = self._within(self._argument(argument, i), i, other)
            self._line(f"{name} = {term if i == 0 else join.format(name, term)}")
        self._line(f"{name} = {self._rounded(reduce.format(name), step)}")
        return name

    def _step(self, name: str, step: Step, i: int | None) -> None:
        if step.op in ("add", "sub") and (sum_of_product := self._multiply_add(step, i)):
            self._line(f"{name} = {self._rounded(sum_of_product, step)}")
            return
        if step.op in ("exp", "erf") and (of_scaled := self._of_scaled(step, i)):
            self._line(f"{name} = {self._rounded(of_scaled, step)}")
            return
        dtypes = {step.value.dtype} | {self.program.value(arg).dtype for arg in step.args if isinstance(arg, Ref)}
        arguments = [self._argument(argument, i, in_16_bits=dtypes == {torch.bfloat16}) for argument in step.args]
        template = POINTWISE[step.op].source
        if step.op == "where":
            arguments[0] = f"({arguments[0]} != 0.0)"
        if step.op == "div":
            template, arguments[1] = self._division(step.args[1], arguments[1])
        self._line(f"{name} = {self._rounded(template.format(*arguments), step)}")

    def _rounded(self, expression: str, step: Step) -> str:
        """What a step computes, in the dtype of its value."""
        value = step.value
        if value.dtype == torch.bool:
            return f"({expression}) != 0"
        if value.dtype == torch.bfloat16 and step in self.packed:
            return f"to_bfloat16({expression})"
        return expression if value.dtype == torch.float32 else f"({expression}).to({_TRITON_DTYPES[value.dtype]})"

    def _multiply_add(self, step: Step, i: int | None) -> str | None:
        """A sum or difference as a fused multiply-add, if one side is a product that nothing else reads."""
        for product, other in ((0, 1), (1, 0)):
            if factors := self._factors(step.args[product], i):
                rest = self._argument(step.args[other], i)
                if step.op == "sub":
                    factors, rest = (factors, f"-({rest})") if product == 0 else ([f"-({factors[0]})", factors[1]], rest)
                return f"tl.fma({', '.join(factors)}, {rest})"
        return None

    def _factors(self, argument: Ref | float, i: int | None) -> list[str] | None:
        """The factors of a float32 product that is read once, here."""
        if isinstance(argument, float) or argument.index < len(self.program.inputs) or self.num_readers[argument] > 1:
            return None
        step, value = self._step_of(argument), self.program.value(argument)
        if step.op != "mul" or value.dtype != torch.float32 or (i is None) != (value.shape is Shape.COLUMN):
            return None
        if not all(isinstance(factor, Ref) or 1e-37 < abs(factor) < 1e38 for factor in step.args):
            return None  # a number that Triton might take for a float64
        return [self._argument(factor, i) for factor in step.args]

    def _of_scaled(self, step: Step, i: int | None) -> str | None:
        """`exp` or `erf` of a product that nothing else reads, with its number among the function's own."""
        base, scale = self._scaled(step.args[0])
        source = self._argument(base, i)
        if step.op == "exp" and scale != 1.0:
            return f"tl.exp2({source} * {scale * _LOG2_E!r})"
        if step.op == "erf" and scale > 0.0 and (gaussian := self._gaussian(base, scale)):
            return f"erf_by({source}, {self._argument(gaussian, i)}, {scale!r})"
        return f"erf({source}, {scale!r})" if step.op == "erf" and scale > 0.0 else None

    def _gaussian(self, base: Ref | float, scale: float) -> Ref | None:
        """Where the program computes ``e^-(scale * base)²``, as the gradient of GELU does beside the error function."""
        for index, step in enumerate(self.program.steps, len(self.program.inputs)):
            if step.op != "exp" or step.value.dtype != torch.float32:
                continue
            square, factor = self._scaled(step.args[0])
            if isinstance(square, float) or square.index < len(self.program.inputs):
                continue
            product = self._step_of(square)
            if product.op == "mul" and product.value.dtype == torch.float32 and product.args == (base, base) and math.isclose(-factor, scale**2, rel_tol=1e-6):
                return Ref(index)
        return None

    def _scaled(self, argument: Ref | float) -> tuple[Ref | float, float]:
        """(value, number) of a float32 product that is read once, here; of anything else (itself, 1)."""
        if isinstance(argument, float) or argument.index < len(self.program.inputs) or self.num_readers[argument] > 1:
            return argument, 1.0
        step = self._step_of(argument)
        numbers = [factor for factor in step.args if isinstance(factor, float)]
        if step.op != "mul" or step.value.dtype != torch.float32 or len(numbers) != 1 or not 1e-18 < abs(numbers[0]) < 1e18:
            return argument, 1.0
        (value,) = (factor for factor in step.args if isinstance(factor, Ref))
        return value, numbers[0]

    def _division(self, divisor: Ref | float, argument: str) -> tuple[str, str]:
        """(source of the division, its second argument)."""
        if isinstance(divisor, Ref):
            return ("{0} * inverse_of_positive({1})" if self._is_above_one(divisor) else "{0} / {1}"), argument
        divisor = torch.tensor(divisor, dtype=torch.float32).item()  # few bits are left of a subnormal one
        if 2.0**-100 <= abs(divisor) <= 2.0**100:
            return "{0} * {1}", _number(1.0 / divisor)
        if divisor == 0.0:  # Triton 3.6 has no constant of -0
            return ("{0} / {1}" if math.copysign(1.0, divisor) > 0 else "-({0} / {1})"), "0.0"
        scale = 2.0**64 if abs(divisor) < 1 else 2.0**-64  # as an inverse may be no float32
        return f"{{0}} * {scale!r} * {{1}}", _number(1.0 / (divisor * scale))

    def _is_above_one(self, ref: Ref) -> bool:
        """Whether a value is 1 or more for sure: ``1 + e^x``, which silu divides by."""
        if ref.index < len(self.program.inputs):
            return False
        step = self._step_of(ref)
        numbers = [argument for argument in step.args if isinstance(argument, float)]
        refs = [argument for argument in step.args if isinstance(argument, Ref)]
        if step.op != "add" or len(numbers) != 1 or numbers[0] < 1 or refs[0].index < len(self.program.inputs):
            return False
        return self._step_of(refs[0]).op == "exp"

    def _argument(self, argument: Ref | float, i: int | None, *, in_16_bits: bool = False) -> str:
        """An argument of a step, in float32."""
        if isinstance(argument, float):
            return _number(argument)
        value = self.program.value(argument)
        if value.shape is Shape.COLUMN:
            name = self._column(argument)
        else:
            assert i is not None, "a column comes from columns and numbers alone"
            name = self._matrix(argument, i)
        if value.dtype == torch.bfloat16 and value.shape is not Shape.COLUMN and not in_16_bits:
            return f"from_bfloat16({name})"
        return name if value.dtype == torch.float32 else f"{name}.to(tl.float32)"

    def _step_of(self, ref: Ref) -> Step:
        return self.program.steps[ref.index - len(self.program.inputs)]


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'
