"""Runs a row program by the Triton kernel that `row_program_source.py` writes: configurations, launch.

Shapes: M rows, K features a row.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cache, partial
from itertools import product, takewhile
from typing import Any, NamedTuple

import torch

from swcompile.kernels.launch import (
    INTERPRETED,
    DeviceFacts,
    Launcher,
    device_facts,
    empty,
    load,
    resident_programs,
    settle_key,
    triton,
)
from swcompile.kernels.row_program import POINTWISE, Action, RowProgram, Shape, matrix_size
from swcompile.kernels.row_program_source import source
from swcompile.kernels.tuning import run_together
from swcompile.kernels.workers import prepare, submit, threads, wait_for

MAX_WARPS_PER_ROW = 16
MAX_ELEMENTS = 64
"""Of a row that a thread holds at most."""
MAX_COLUMNS = 32 * MAX_ELEMENTS * MAX_WARPS_PER_ROW
"""The longest row: 32,768 features."""
MAX_SPILLS = 8
"""Values of a thread that may lie in memory so that registers suffice for another program."""
_ELEMENTS_OF_TWO = range(41, 57)
"""Of a row that a thread holds where two programs of 8 warps fit, but only if they are told to."""
_SUM_COLUMNS, _SUM_ROWS = 16, 256
"""Features that a program of the second kernel adds the sums of the first one's programs for, and of how many at a time.

Few features, so that there are many programs: each of them waits for memory most of the time.
"""


class RowConfig(NamedTuple):
    """How rows are shared out among warps."""

    warps_per_row: int
    """1 reduces a row without a barrier."""
    num_warps: int
    """Warps a program, a multiple of `warps_per_row`."""
    adjacent: int = 8
    """Adjacent elements a thread takes of each piece of a row: 8 are one load of 16 bytes."""
    max_registers: int | None = None
    """Of a thread, so that a multiprocessor holds two programs; worth it where few values then lie in memory instead."""

    @property
    def width(self) -> int:
        """Elements of a piece of a row."""
        return 32 * self.warps_per_row * self.adjacent

    @property
    def rows(self) -> int:
        """Rows that a program works on at a time."""
        return self.num_warps // self.warps_per_row


def launcher(
    inputs: Sequence[torch.Tensor], program: RowProgram, config: RowConfig | None = None
) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]:
    """Runs a program by its kernel, on (inputs like these, contiguous outputs to be written).

    Args:
        inputs: matrices [M, K] with rows contiguous in themselves, columns [M, 1], rows [K], as many as the program has.
        program: what to compute.
        config: how; left out, what `chosen` says. Nothing is timed.
    """
    num_rows, num_columns = matrix_size(inputs, program)
    device = inputs[0].device
    if config is None:
        if _pending and (compiling := _pending.pop((program, num_columns, device), None)):
            wait([compiling])  # if it failed, the launch shows how
        config = chosen(program, num_columns, device)
    num_programs = triton.cdiv(num_rows, config.rows)
    if program.sums:
        resident = _resident_programs(program, config, num_columns, num_rows % config.rows == 0, device)
        num_programs = min(num_programs, resident)
    facts = device_facts(device)
    kernels, overlap = _kernels(program, config, num_columns, facts), _overlaps(facts)
    strides = [t.stride(0) for t, value in zip(inputs, program.inputs, strict=True) if value.shape is Shape.MATRIX]
    rows = Launcher(
        kernels.row_kernel, (num_programs,), *strides, num_rows, **_options(config, num_rows, num_columns, overlap)
    )
    if not program.sums:
        return lambda inputs, outputs: rows(*inputs, *outputs)
    grid = (triton.cdiv(num_columns, _SUM_COLUMNS), len(program.sums))
    sums = Launcher(kernels.sum_kernel, grid, num_programs, **_sum_options(num_columns, overlap))
    is_total = [action is Action.SUM_ROWS for action in _actions(program)]

    def launch(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        partial = empty((len(program.sums), num_programs, num_columns), torch.float32, device)
        parts = iter(partial.unbind())
        written = [next(parts) if total else tensor for tensor, total in zip(outputs, is_total, strict=True)]
        rows(*inputs, *written)
        sums(partial, *[tensor for tensor, total in zip(outputs, is_total, strict=True) if total])

    return launch


_pending: dict[tuple[RowProgram, int, torch.device], Future[Any]] = {}


def compile_in_background(program: RowProgram, num_rows: int | None, num_columns: int, device: torch.device) -> None:
    """Start to compile a program's kernels, while Inductor is busy with the rest of the graph; `launcher` waits for them.

    Args:
        program: what will be launched.
        num_rows: M; None where it is not known yet.
        num_columns: K.
        device: a CUDA device.
    """
    key = program, num_columns, device
    if key in _pending:
        return
    facts = device_facts(device)
    target = prepare(device)
    elsewhere = []
    for config in _considered(program, num_columns):
        _kernels(program, config, num_columns, facts)  # imports, which is better not done in a thread
        elsewhere.append(submit(_warm_up, program, config, num_columns, _is_even(num_rows, config), facts, target=target))

    def work() -> None:
        wait_for(filter(None, elsewhere))  # what is compiled there is found below
        config = chosen(program, num_columns, device)
        for compiled in _compile(program, config, num_columns, _is_even(num_rows, config), device):
            load(compiled, device)

    _pending[key] = threads.submit(work)


def _is_even(num_rows: int | None, config: RowConfig) -> bool:
    """Whether the last program has as many rows as the others, as far as one knows."""
    return num_rows is None or num_rows % config.rows == 0


@cache
def chosen(program: RowProgram, num_columns: int, device: torch.device) -> RowConfig:
    """The likeliest candidate for a program, but none whose registers suffice for no more than a part of its values."""
    considered = _considered(program, num_columns)
    if len(considered) > 1 and not INTERPRETED:  # one after the other they would take longer than Inductor takes
        run_together([partial(_compile, program, config, num_columns, True, device) for config in considered], device)

    def suffices(config: RowConfig) -> bool:
        if config.max_registers is None or INTERPRETED:
            return True
        compiled, *_ = _compile(program, config, num_columns, True, device)
        two = 2 * device_facts(device).num_multiprocessors
        return resident_programs(compiled, config.num_warps, device) >= two and compiled.n_spills <= MAX_SPILLS

    return next(config for config in considered if suffices(config))


def _considered(program: RowProgram, num_columns: int) -> list[RowConfig]:
    """The candidates up to the first whose registers are not limited, which always suffices."""
    configs = candidates(program, num_columns)
    limited = list(takewhile(lambda config: config.max_registers is not None, configs))
    return configs[: len(limited) + 1]


def _kernels(program: RowProgram, config: RowConfig, num_columns: int, facts: DeviceFacts) -> Any:
    """The module that holds a program's kernels."""
    ahead = loads_ahead(program, config, num_columns, facts.shared_memory)
    return compile_source(source(program, triton.cdiv(num_columns, config.width), ahead))


def loads_ahead(program: RowProgram, config: RowConfig, num_columns: int, shared_memory: int) -> bool:
    """Whether to fetch the next tile while one is computed: where programs loop, if a multiprocessor has room for it."""
    itemsizes = sum(value.dtype.itemsize for value in program.inputs if value.shape is not Shape.COLUMN)
    num_elements = config.rows * config.width * triton.cdiv(num_columns, config.width)
    return bool(program.sums) and itemsizes * num_elements + _SHARED_MEMORY_BESIDE <= shared_memory


_SHARED_MEMORY_BESIDE = 8192
"""Bytes of shared memory for reductions, and what the driver keeps."""


def _overlaps(facts: DeviceFacts) -> bool:
    """Whether the second kernel is launched while the first one runs (programmatic dependent launch)."""
    return not INTERPRETED and facts.capability >= (9, 0)


def _options(config: RowConfig, num_rows: int, num_columns: int, overlap: bool) -> dict[str, Any]:
    return {
        "K": num_columns,
        "BLOCK_M": config.rows,
        "WIDTH": config.width,
        "EVEN_M": num_rows % config.rows == 0,
        "EVEN_K": num_columns % config.width == 0,
        "OVERLAP": overlap,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # the quantiser rounds the product before it rounds to an integer
        "maxnreg": config.max_registers,
    }


def _sum_options(num_columns: int, overlap: bool) -> dict[str, Any]:
    launch_ahead = {"launch_pdl": True} if overlap else {}
    return {"K": num_columns, "BLOCK_P": _SUM_ROWS, "BLOCK_K": _SUM_COLUMNS, "OVERLAP": overlap, **launch_ahead}


@cache
def _resident_programs(
    program: RowProgram, config: RowConfig, num_columns: int, even_rows: bool, device: torch.device
) -> int:
    """How many programs a device holds at once: a program that sums rows loops over them, and its sums are few."""
    if INTERPRETED:
        return device_facts(device).num_multiprocessors
    compiled, *_ = _compile(program, config, num_columns, even_rows, device)
    return resident_programs(compiled, config.num_warps, device)


def _compile(
    program: RowProgram, config: RowConfig, num_columns: int, even_rows: bool, device: torch.device
) -> list[Any]:
    """A program's `row_kernel` and, if it sums rows, `sum_kernel`, compiled for inputs that are aligned, as most are."""
    with torch.cuda.device(device):
        return _warm_up(program, config, num_columns, even_rows, device_facts(device))


def _warm_up(
    program: RowProgram, config: RowConfig, num_columns: int, even_rows: bool, facts: DeviceFacts
) -> list[Any]:
    """`_compile` for Triton's current target."""
    kernels = _kernels(program, config, num_columns, facts)
    settle_key(kernels.row_kernel)
    pointers: list[Any] = []
    pointers += [value.dtype for value in program.inputs]
    for output in program.outputs:
        stored = program.value(output.ref).dtype
        dtypes = {Action.STORE: [stored], Action.QUANTIZE: [torch.int8, torch.float32], Action.SUM_ROWS: [torch.float32]}
        pointers += dtypes[output.action]
    pointers += [num_columns for value in program.inputs if value.shape is Shape.MATRIX]
    num_rows, overlap = config.rows if even_rows else config.rows + 1, _overlaps(facts)
    rows = kernels.row_kernel.warmup(*pointers, num_rows, **_options(config, num_rows, num_columns, overlap), grid=(1,))
    if not program.sums:
        return [rows]
    totals = [output.dtype for output in program.sums]
    return [rows, kernels.sum_kernel.warmup(torch.float32, *totals, 16, **_sum_options(num_columns, overlap), grid=(1,))]


def output_kinds(inputs: Sequence[torch.Tensor], program: RowProgram) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor that a program gives."""
    num_rows, num_columns = matrix_size(inputs, program)
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = []
    for output in program.outputs:
        value = program.value(output.ref)
        if output.action is Action.STORE:
            kinds.append(((num_rows, num_columns if value.shape is Shape.MATRIX else 1), value.dtype))
        elif output.action is Action.QUANTIZE:
            kinds += [((num_rows, num_columns), torch.int8), ((num_rows, 1), torch.float32)]
        else:
            assert output.dtype is not None
            kinds.append(((num_columns,), output.dtype))
    return kinds


@cache
def _actions(program: RowProgram) -> list[Action]:
    """What each output tensor is of."""
    return [o.action for o in program.outputs for _ in range(2 if o.action is Action.QUANTIZE else 1)]


@cache
def candidates(program: RowProgram, num_columns: int) -> list[RowConfig]:
    """Configurations that fit a program, the likeliest first.

    A thread should hold as many elements as registers last for: about 40 of a program that reads, computes and rounds,
    fewer where each element also has running sums or several results that wait for their scale. Elements beyond the
    end of the row cost as much as others, narrow loads and wide programs a little. With sums, four warps are best, if
    need be with more elements each, and loads through shared memory may be narrow; but a multiprocessor that holds one
    program alone idles while that reduces its rows, and longer if its loads are narrow. So it does without sums if two
    results of a long row wait for their scales: if no value waits for another reduction, a limit of registers makes
    room for a second program.
    """
    sums = len(program.sums)
    results = sum(output.action is Action.QUANTIZE for output in program.outputs)
    matrices = sum(value.shape is Shape.MATRIX for value in program.inputs)
    wanted = 70 / (1.0 + sums + 0.5 * results + 0.5 * matrices) if sums else 50 / (results + 0.25)
    limited: list[RowConfig] = []
    configs: list[tuple[float, RowConfig]] = []
    waits = any(step.op not in POINTWISE for step in program.steps)
    for warps_per_row, adjacent in product((1, 2, 4, 8, 16), (8, 4, 2)):
        num_warps = max(warps_per_row, 4)
        config = RowConfig(warps_per_row, num_warps, adjacent)
        num_pieces = triton.cdiv(num_columns, config.width)
        elements = num_pieces * adjacent
        if elements > MAX_ELEMENTS or (num_pieces == 1 and warps_per_row > 1 and configs):
            continue
        padding = num_pieces * config.width / num_columns - 1
        registers = min(255, 30 + elements * (1.5 + sums + 0.5 * matrices))
        if sums:
            half = 0.0 if sums == 1 or registers == 255 else 0.5
            badness = abs(elements - wanted) / 24 + 16 * padding + num_warps / 4 + {8: 0.1, 4: half, 2: 1.5}[adjacent]
            if 2 * registers * 32 * num_warps > 65536:
                badness += 2.0 if adjacent == 8 else 5.0
        else:
            badness = abs(elements - wanted) / 12 + 16 * padding + num_warps / 16 + {8: 0.0, 4: 0.5, 2: 1.5}[adjacent]
        configs.append((badness, config))
        if num_warps == 8 and elements in _ELEMENTS_OF_TWO and adjacent > 2 and sums + results > 1 and not waits:
            limited.append(config._replace(max_registers=128))
    return limited + [config for _, config in sorted(configs)][: 4 - len(limited)]


@cache
def compile_source(text: str) -> Any:
    """The module of a source, which is kept as a file in Inductor's cache folder: Triton reads it from there."""
    from torch._inductor.codecache import PyCodeCache  # 2 s to import where Inductor is not

    return PyCodeCache.load(text)
