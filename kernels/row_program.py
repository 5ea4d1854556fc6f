"""What `map_rows` computes, as data: steps over the rows of matrices. Shapes: M rows (tokens), K features a row."""

import dataclasses
import enum
import re
from collections.abc import Callable, Sequence
from functools import cache

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "b8": torch.bool}
_SHORT = {dtype: name for name, dtype in _DTYPES.items()}


class Shape(enum.Enum):
    """What a value spans, as the text of a program writes it."""

    MATRIX = "M, K"
    COLUMN = "M, 1"
    """One number a row."""
    ROW = "1, K"
    """One number a feature, the same for all rows."""


class Action(enum.Enum):
    """What becomes of a value at the end."""

    STORE = "store"
    """It is written: a matrix as [M, K], a column as [M, 1]."""
    QUANTIZE = "quantize"
    """A matrix is quantised to int8 by row, as `quantize_rowwise` does: [M, K] int8, then [M, 1] float32."""
    SUM_ROWS = "sum_rows"
    """A matrix is summed over its rows in float32: [K]."""


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """An input, or what a step gives."""

    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{_SHORT[self.dtype]}[{self.shape.value}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One operation: computed in float32 from its arguments, then rounded to the dtype of its value."""

    op: str
    """A name in `POINTWISE` or `REDUCTIONS`."""
    args: tuple["Ref | float", ...]
    value: Value


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """The value with this number: inputs come first, then the steps in order."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One line at the end of a program."""

    action: Action
    ref: Ref
    dtype: torch.dtype | None = None
    """Of the sum, for `Action.SUM_ROWS`."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RowProgram:
    """Steps over rows. ``str(program)`` is its text, and `parse` reads it back, to one object for one text.

    A row over its norm, quantised::

        %0: bf16[M, K] = input
        %1: f32[M, K] = mul(%0, %0)
        %2: f32[M, 1] = sum(%1)
        %3: f32[M, 1] = rsqrt(%2)
        %4: bf16[M, K] = mul(%0, %3)
        quantize %4
    """

    inputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    def __post_init__(self) -> None:
        matrices = [value for value in self.inputs if value.shape is Shape.MATRIX]
        if not matrices or not self.outputs:
            raise ValueError("a row program has an input [M, K] and an output")
        for number, step in enumerate(self.steps, len(self.inputs)):
            arity = POINTWISE[step.op].arity if step.op in POINTWISE else 1
            if step.op not in POINTWISE and step.op not in REDUCTIONS:
                raise ValueError(f"unknown step {step.op!r}; known are {', '.join([*POINTWISE, *REDUCTIONS])}")
            refs = [arg.index for arg in step.args if isinstance(arg, Ref)]
            if len(step.args) != arity or not refs or max(refs) >= number:
                raise ValueError(f"%{number}: {step.op} takes {arity} earlier values or numbers, got {step.args}")
            shapes = [self.value(Ref(index)).shape for index in refs]
            if step.op in REDUCTIONS and (step.value.shape, shapes) != (Shape.COLUMN, [Shape.MATRIX]):
                raise ValueError(f"%{number}: {step.op} makes a column of a matrix")
        for output in self.outputs:
            value = self.value(output.ref)
            if value.shape is Shape.ROW or (output.action is not Action.STORE and value.shape is not Shape.MATRIX):
                raise ValueError(f"{output.action.value} takes no value {value}")

    @property
    def sums(self) -> list[Output]:
        """The outputs that are sums over the rows."""
        return [output for output in self.outputs if output.action is Action.SUM_ROWS]

    def value(self, ref: Ref) -> Value:
        """Shape and dtype of a value."""
        is_input = ref.index < len(self.inputs)
        return self.inputs[ref.index] if is_input else self.steps[ref.index - len(self.inputs)].value

    def __str__(self) -> str:
        return "\n".join(self._lines())

    @property
    def text(self) -> str:
        """The program in one line, as operators take it: Inductor writes their arguments into one-line comments."""
        return "; ".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"%{number}: {value} = input" for number, value in enumerate(self.inputs)]
        for number, step in enumerate(self.steps, len(self.inputs)):
            lines.append(f"%{number}: {step.value} = {step.op}({', '.join(map(_format_argument, step.args))})")
        for output in self.outputs:
            suffix = f": {_SHORT[output.dtype]}" if output.dtype else ""
            lines.append(f"{output.action.value} {output.ref}{suffix}")
        return lines

    def num_flops(self, num_columns: int) -> int:
        """Arithmetic operations a row, one for each step and feature, whatever the step costs on a device."""
        matrices = sum(
            step.value.shape is Shape.MATRIX
            or any(isinstance(a, Ref) and self.value(a).shape is Shape.MATRIX for a in step.args)
            for step in self.steps
        )
        extra = {Action.STORE: 0, Action.QUANTIZE: 2, Action.SUM_ROWS: 1}
        return num_columns * (matrices + sum(extra[output.action] for output in self.outputs))


def matrix_size(inputs: Sequence[torch.Tensor], program: RowProgram) -> tuple[int, int]:
    """(M, K), which may be symbolic."""
    matrix = next(t for t, value in zip(inputs, program.inputs, strict=True) if value.shape is Shape.MATRIX)
    return matrix.shape[0], matrix.shape[1]


def _format_argument(argument: Ref | float) -> str:
    return str(argument) if isinstance(argument, Ref) else repr(float(argument))


_LINE = re.compile(r"%(\d+): (\w+)\[(M, K|M, 1|1, K)\] = (\w+)(?:\((.*)\))?")
_END = re.compile(r"(store|quantize|sum_rows) %(\d+)(?:: (\w+))?")


@cache
def parse(text: str) -> RowProgram:
    """Read the text of a program: a step a line, or several with semicolons between them.

    Raises:
        ValueError: a line that is none, a step that is not known, or one with wrong arguments.
    """
    inputs: list[Value] = []
    steps: list[Step] = []
    outputs: list[Output] = []
    for line in filter(None, map(str.strip, re.split(r"[;\n]", text))):
        if found := _END.fullmatch(line):
            dtype = _DTYPES[found[3]] if found[3] else None
            outputs.append(Output(Action(found[1]), Ref(int(found[2])), dtype))
            continue
        found = _LINE.fullmatch(line)
        if found is None or int(found[1]) != len(inputs) + len(steps) or found[2] not in _DTYPES:
            raise ValueError(f"not a line of a row program: {line!r}")
        value = Value(Shape(found[3]), _DTYPES[found[2]])
        if found[4] == "input":
            inputs.append(value)
        else:
            steps.append(Step(found[4], tuple(map(_parse_argument, (found[5] or "").split(", "))), value))
    return RowProgram(tuple(inputs), tuple(steps), tuple(outputs))


def _parse_argument(text: str) -> Ref | float:
    return Ref(int(text[1:])) if text.startswith("%") else float(text)


@dataclasses.dataclass(frozen=True, slots=True)
class Pointwise:
    """A step that gives each element from the elements at its place."""

    arity: int
    reference: Callable[..., torch.Tensor]
    """In PyTorch, for float32 arguments and numbers; the first one of ``where`` is bool."""
    source: str
    """In Triton, with ``{0}`` and so on for the arguments; names are those of `row_math.py`, or ``tl``."""


def _reference_where(condition: torch.Tensor, x: torch.Tensor | float, y: torch.Tensor | float) -> torch.Tensor:
    return torch.where(condition, x, y)


def _sub(x: torch.Tensor | float, y: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(x - y)


POINTWISE = {
    "cast": Pointwise(1, lambda x: x, "{0}"),
    "add": Pointwise(2, lambda x, y: x + y, "{0} + {1}"),
    "sub": Pointwise(2, _sub, "{0} - {1}"),
    "mul": Pointwise(2, lambda x, y: x * y, "{0} * {1}"),
    "div": Pointwise(2, lambda x, y: x / y, "{0} / {1}"),
    "neg": Pointwise(1, torch.neg, "-{0}"),
    "abs": Pointwise(1, torch.abs, "tl.abs({0})"),
    "exp": Pointwise(1, torch.exp, "tl.exp2({0} * 1.4426950408889634)"),
    "erf": Pointwise(1, torch.erf, "erf({0}, 1.0)"),
    "tanh": Pointwise(1, torch.tanh, "tanh({0})"),
    "sigmoid": Pointwise(1, torch.sigmoid, "sigmoid({0})"),
    "sqrt": Pointwise(1, torch.sqrt, "tl.sqrt_rn({0})"),
    "rsqrt": Pointwise(1, torch.rsqrt, "tl.rsqrt({0})"),
    "reciprocal": Pointwise(1, torch.reciprocal, "1.0 / {0}"),
    "relu": Pointwise(1, torch.relu, "relu({0})"),
    "where": Pointwise(3, _reference_where, "tl.where({0}, {1}, {2})"),
    "le": Pointwise(2, lambda x, y: x <= y, "{0} <= {1}"),
    "lt": Pointwise(2, lambda x, y: x < y, "{0} < {1}"),
    "ge": Pointwise(2, lambda x, y: x >= y, "{0} >= {1}"),
    "gt": Pointwise(2, lambda x, y: x > y, "{0} > {1}"),
}
"""The steps that work on each element by itself."""

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum(1, keepdim=True),
    "amax": lambda x: x.amax(1, keepdim=True),
}
"""The steps that give one number for each row of a matrix, in PyTorch."""
