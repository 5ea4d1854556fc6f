"""Norms, activations, their gradients and the like in one op, with quantisation at the end: a program over rows.

Shapes: M rows (tokens), K features a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from swcompile.kernels.int8 import with_unit_inner_stride
from swcompile.kernels.launch import Plans, empty
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference
from swcompile.kernels.row_program import (
    POINTWISE,
    REDUCTIONS,
    Action,
    Ref,
    RowProgram,
    Shape,
    matrix_size,
    parse,
)
from swcompile.kernels.row_program_triton import MAX_COLUMNS, launcher, output_kinds


def map_rows(inputs: Sequence[torch.Tensor], program: RowProgram) -> list[torch.Tensor]:
    """Run a program over the rows of matrices.

    Each step is computed in float32 and rounded to its dtype, so the result does not depend on what is fused with
    what; a kernel may differ from the reference in the last bits of float32 of a sum, of a transcendental function, or
    of a product that a sum alone reads, which a GPU does not round.
    A quantised value is rounded to its own dtype first: int8 is that of the value as it would be stored.

    Args:
        inputs: one for each of ``program.inputs``: matrices [M, K] of any strides, columns [M, 1], rows [K] or [1, K].
        program: what to compute.

    Returns:
        One tensor for each `Action.STORE` and `Action.SUM_ROWS`, two for each `Action.QUANTIZE`, all contiguous.

    Raises:
        ValueError: shapes or dtypes other than the program's.
    """
    return MAP_ROWS(list(inputs), program.text)


def map_rows_reference(inputs: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    """`map_rows` in plain PyTorch, of a program's text."""
    parsed = parse(program)
    check_inputs(inputs, parsed)
    values = [
        tensor.reshape(1, -1) if value.shape is Shape.ROW else tensor
        for tensor, value in zip(inputs, parsed.inputs, strict=True)
    ]
    for step in parsed.steps:
        arguments = [values[arg.index].float() if isinstance(arg, Ref) else arg for arg in step.args]
        if step.op == "where":
            arguments[0] = arguments[0] != 0.0
        function = POINTWISE[step.op].reference if step.op in POINTWISE else REDUCTIONS[step.op]
        values.append(function(*arguments).to(step.value.dtype))
    results: list[torch.Tensor] = []
    num_rows, num_columns = matrix_size(inputs, parsed)
    for output in parsed.outputs:
        value = values[output.ref.index]
        if output.action is Action.STORE:
            width = num_columns if parsed.value(output.ref).shape is Shape.MATRIX else 1
            stored = value.expand(num_rows, width)
            results.append(stored.clone(memory_format=torch.contiguous_format))
        elif output.action is Action.QUANTIZE:
            results += quantize_rowwise_reference(value)
        else:
            results.append(value.float().sum(0).to(output.dtype))
    return results


def map_rows_triton(inputs: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    """`map_rows` by the Triton kernel that the program is made into: what the op does on CUDA.

    Raises:
        ValueError: also rows of more than 32,768 features, which no thread block holds.
    """
    plan = PLANS.find(inputs, program)
    if plan is None:
        return map_rows_reference(inputs, program)
    if plan.launch is None:
        return map_rows_triton(_readable(inputs, parse(program)), program)
    device = inputs[0].device
    outputs = [empty(shape, dtype, device) for shape, dtype in plan.outputs]
    plan.launch(inputs, outputs)
    return outputs


class _Plan(NamedTuple):
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    """(shape, dtype) of each."""
    launch: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None] | None
    """Takes inputs and outputs; None where an input must be laid out anew."""


def _readable(inputs: Sequence[torch.Tensor], program: RowProgram) -> list[torch.Tensor]:
    """The inputs, or copies of those that a kernel cannot read where they lie."""
    return [
        with_unit_inner_stride(tensor) if value.shape is Shape.MATRIX else tensor.contiguous()
        for tensor, value in zip(inputs, program.inputs, strict=True)
    ]


def _prepare(*inputs_and_program: Any) -> _Plan | None:
    """How to run a program; None where there is nothing to read."""
    *inputs, text = inputs_and_program
    program = parse(text)
    check_inputs(inputs, program)
    num_rows, num_columns = matrix_size(inputs, program)
    if num_columns > MAX_COLUMNS:
        raise ValueError(f"map_rows: K={num_columns}, but a kernel holds rows of up to {MAX_COLUMNS}")
    if num_rows == 0 or num_columns == 0:
        return None
    as_they_lie = all(a is b for a, b in zip(inputs, _readable(inputs, program), strict=True))
    return _Plan(output_kinds(inputs, program), launcher(inputs, program) if as_they_lie else None)


PLANS = Plans(_prepare)


def map_rows_work(program: RowProgram, num_rows: int, num_columns: int) -> Work:
    """Every input read once and every output written once; a sum over rows as if it were written once."""
    count = {Shape.MATRIX: num_rows * num_columns, Shape.COLUMN: num_rows, Shape.ROW: num_columns}
    num_bytes = sum(count[value.shape] * value.dtype.itemsize for value in program.inputs)
    for output in program.outputs:
        value = program.value(output.ref)
        if output.action is Action.STORE:
            num_bytes += count[value.shape] * value.dtype.itemsize
        elif output.action is Action.QUANTIZE:
            num_bytes += num_rows * num_columns + 4 * num_rows
        else:
            assert output.dtype is not None
            num_bytes += num_columns * output.dtype.itemsize
    return Work(flops=num_rows * program.num_flops(num_columns), bytes=num_bytes)


def check_inputs(inputs: Sequence[torch.Tensor], program: RowProgram) -> None:
    """Raise `ValueError` unless the tensors are what the program takes."""
    check_dtypes(inputs, program)
    num_rows, num_columns = matrix_size(inputs, program)
    wanted: dict[Shape, list[tuple[int, ...]]] = {
        Shape.MATRIX: [(num_rows, num_columns)],
        Shape.COLUMN: [(num_rows, 1)],
        Shape.ROW: [(num_columns,), (1, num_columns)],
    }
    for number, (tensor, value) in enumerate(zip(inputs, program.inputs, strict=True)):
        if tuple(tensor.shape) not in wanted[value.shape]:
            raise ValueError(f"map_rows: input %{number} is {tuple(tensor.shape)}, but must be {wanted[value.shape][0]}")


def check_dtypes(inputs: Sequence[torch.Tensor], program: RowProgram) -> None:
    """Raise `ValueError` on a wrong number of inputs, dtype or rank. Looks at no size: sizes may be symbolic."""
    if len(inputs) != len(program.inputs):
        raise ValueError(f"map_rows: {len(inputs)} tensors for a program with {len(program.inputs)} inputs")
    for number, (tensor, value) in enumerate(zip(inputs, program.inputs, strict=True)):
        ranks = (1, 2) if value.shape is Shape.ROW else (2,)
        if tensor.dtype != value.dtype or tensor.dim() not in ranks:
            raise ValueError(
                f"map_rows: input %{number} is {tensor.dtype} with {tensor.dim()} dimensions, but must be {value}"
            )


def _fake(inputs: Sequence[torch.Tensor], program: str) -> list[torch.Tensor]:
    parsed = parse(program)
    check_dtypes(inputs, parsed)
    return [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in output_kinds(inputs, parsed)]


MAP_ROWS = define_op(
    "map_rows(Tensor[] inputs, str program) -> Tensor[]", reference=map_rows_reference, cuda=map_rows_triton, fake=_fake
)
"""The op as it stands in a graph: ``torch.ops.swcompile.map_rows.default``."""
