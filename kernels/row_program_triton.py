"""Runs a row program by the Triton kernel that `row_program_source.py` writes: configurations, launch.

Shapes: M rows, K features a row.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from swcompile.kernels import int8, row_math, row_program_source
from swcompile.kernels.launch import device_facts, triton
from swcompile.kernels.quantize_rowwise import PIECE_PER_WARP
from swcompile.kernels.row_program import Action, RowProgram, Shape, matrix_size
from swcompile.kernels.row_program_source import source
from swcompile.kernels.tuning import Tuner, bucket

MAX_PIECES = 8
"""Pieces a thread holds of one matrix at most; fewer where a program has many matrices."""
MAX_WARPS_PER_ROW = 16
MAX_COLUMNS = PIECE_PER_WARP * MAX_PIECES * MAX_WARPS_PER_ROW
"""The longest row: 32,768 features."""


class RowConfig(NamedTuple):
    """How rows are shared out among warps."""

    warps_per_row: int
    """1 reduces a row without a barrier."""
    num_warps: int
    """Warps a program, a multiple of `warps_per_row`."""
    programs_each: int = 0
    """0: one tile of rows a program. Else: so many programs a multiprocessor, which loop over the tiles."""


def launch(inputs: Sequence[torch.Tensor], program: RowProgram, outputs: Sequence[torch.Tensor]) -> None:
    """Run a program by its kernel.

    Args:
        inputs: matrices [M, K] with rows contiguous in themselves, columns [M, 1], rows [K], as many as the program has.
        program: what to compute.
        outputs: contiguous tensors, written.
    """
    num_rows, num_columns = matrix_size(inputs, program)

    def run(config: RowConfig) -> None:
        launch_config(config, inputs, program, outputs)

    key = (bucket(num_rows), num_columns, _digest(program))
    run(TUNER.choose(key, lambda: candidates(program, num_columns), run, inputs[0].device))


def launch_config(
    config: RowConfig, inputs: Sequence[torch.Tensor], program: RowProgram, outputs: Sequence[torch.Tensor]
) -> None:
    """`launch` in the given configuration."""
    num_rows, num_columns = matrix_size(inputs, program)
    rows = config.num_warps // config.warps_per_row
    width = PIECE_PER_WARP * config.warps_per_row
    num_programs = triton.cdiv(num_rows, rows)
    if config.programs_each:
        num_programs = min(num_programs, config.programs_each * device_facts(inputs[0].device).num_multiprocessors)
    pointers: list[Any] = []
    for tensor, value in zip(inputs, program.inputs, strict=True):
        pointers += [tensor, tensor.stride(0)] if value.shape is Shape.MATRIX else [tensor]
    actions = _actions(program)
    totals = [tensor for tensor, action in zip(outputs, actions, strict=True) if action is Action.SUM_ROWS]
    partial = inputs[0].new_empty((len(totals), num_programs, num_columns), dtype=torch.float32)
    parts = iter(partial)
    pointers += [next(parts) if action is Action.SUM_ROWS else t for t, action in zip(outputs, actions, strict=True)]
    module = compile_source(source(program, triton.cdiv(num_columns, width)))
    module.row_kernel[(num_programs,)](
        *pointers,
        num_rows,
        K=num_columns,
        BLOCK_M=rows,
        WIDTH=width,
        EVEN_M=num_rows % rows == 0,
        EVEN_K=num_columns % width == 0,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # each step rounds, like the reference
    )
    if totals:
        grid = (triton.cdiv(num_columns, _SUM_COLUMNS), len(totals))
        module.sum_kernel[grid](partial, *totals, num_programs, K=num_columns, BLOCK_P=64, BLOCK_K=_SUM_COLUMNS)


_SUM_COLUMNS = 64
"""Features that a program of the second kernel adds the sums of all programs of the first one for."""


def empty_outputs(inputs: Sequence[torch.Tensor], program: RowProgram) -> list[torch.Tensor]:
    """Tensors for what a program gives, contiguous and not yet written."""
    num_rows, num_columns = matrix_size(inputs, program)
    results = []
    for output in program.outputs:
        value = program.value(output.ref)
        if output.action is Action.STORE:
            width = num_columns if value.shape is Shape.MATRIX else 1
            results.append(inputs[0].new_empty((num_rows, width), dtype=value.dtype))
        elif output.action is Action.QUANTIZE:
            results.append(inputs[0].new_empty((num_rows, num_columns), dtype=torch.int8))
            results.append(inputs[0].new_empty((num_rows, 1), dtype=torch.float32))
        else:
            results.append(inputs[0].new_empty((num_columns,), dtype=output.dtype))
    return results


@cache
def _actions(program: RowProgram) -> list[Action]:
    """What each output tensor is of."""
    return [o.action for o in program.outputs for _ in range(2 if o.action is Action.QUANTIZE else 1)]


def candidates(program: RowProgram, num_columns: int) -> list[RowConfig]:
    """A few configurations, the likeliest first: few warps a row, but no more elements a thread than registers hold.

    Three to compile at most, as a model has some ten programs; how many programs loop over the rows costs no compiling.
    """
    sums = sum(output.action is Action.SUM_ROWS for output in program.outputs)
    matrices = sum(value.shape is Shape.MATRIX for value in program.inputs)
    # Registers a piece takes: 4 for 16-bit inputs that wait, 8 for a float32 result that does, 8 for each running sum.
    registers = 4 * matrices + 8 * (1 + sums)
    most_pieces = max(1, min(MAX_PIECES, 160 // registers))
    configs: list[tuple[float, RowConfig]] = []
    for warps_per_row in (1, 2, 4, 8, 16):
        num_pieces = triton.cdiv(num_columns, PIECE_PER_WARP * warps_per_row)
        is_widest = warps_per_row == MAX_WARPS_PER_ROW
        if (num_pieces > most_pieces and not is_widest) or (num_pieces == 1 and warps_per_row > 1 and configs):
            continue
        padding = num_pieces * PIECE_PER_WARP * warps_per_row - num_columns
        for num_warps in sorted({max(warps_per_row, 4), max(warps_per_row, 8)}):
            badness = abs(num_pieces - min(most_pieces, 5)) + 16 * padding / num_columns + num_warps / 16
            configs.append((badness, RowConfig(warps_per_row, num_warps)))
    likeliest = [config for _, config in sorted(configs)[:3]]
    if not sums:
        return likeliest
    return [config._replace(programs_each=each * max(1, 16 // config.num_warps)) for config in likeliest for each in (1, 2)]


TUNER: Tuner[RowConfig] = Tuner(
    "map_rows", [__file__, int8.__file__, row_math.__file__, row_program_source.__file__]
)


@cache
def _digest(program: RowProgram) -> str:
    return hashlib.sha256(str(program).encode()).hexdigest()[:16]


@cache
def compile_source(text: str) -> Any:
    """The module of a source, which is kept as a file in Inductor's cache folder: Triton reads it from there."""
    from torch._inductor.codecache import PyCodeCache  # 2 s to import where Inductor is not

    return PyCodeCache.load(text)
