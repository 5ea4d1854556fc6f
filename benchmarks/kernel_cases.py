"""The shapes on which kernels are measured, and the configurations to measure beside those that they list."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from row_programs import PROGRAMS, make_inputs, program_at

from swcompile.kernels import (
    dequantize,
    quantize_blockwise,
    quantize_columnwise,
    quantize_rowwise,
    quantize_tensorwise,
    row_program_triton,
    scaled_mm,
    scaled_mm_blockwise,
    transpose,
)
from swcompile.kernels.int8 import num_blocks, padded
from swcompile.kernels.library import Work
from swcompile.kernels.map_rows import MAP_ROWS, map_rows_work
from swcompile.kernels.quantize_rowwise import RowwiseConfig
from swcompile.kernels.quantize_tensorwise import TileConfig
from swcompile.kernels.row_program import parse
from swcompile.kernels.scaled_mm_kernels import MatmulConfig, candidates, fits_tma, launcher

TOKENS = 32768
WEIGHTS = [(1280, 5120), (5120, 1280), (4096, 4096), (4096, 16384)]
LAYERS = [
    (1280, 3840),
    (1280, 1280),
    (1280, 5120),
    (5120, 1280),
    (2048, 8192),
    (4096, 4096),
    (4096, 16384),
    (16384, 4096),
]
"""in features -> out features"""
ROTATION_BYTES = 200_000_000
"""Operands of successive calls together: more than the 50 to 60 MB of L2 cache that a large GPU has."""
GEMM, MEMORY = "TOP/s", "GB/s"
EXTRA_CONFIGS: dict[str, list[Any]] = {
    "quantize_rowwise": [
        RowwiseConfig(1, 4, 3),
        RowwiseConfig(1, 8, 2),
        RowwiseConfig(2, 8, 3),
        RowwiseConfig(1, 2),
    ],
    "quantize_tensorwise": [
        TileConfig(64, 256, 8),
        TileConfig(256, 64, 8),
        TileConfig(32, 128, 4),
        TileConfig(128, 256, 8),
    ],
    "scaled_mm": [
        MatmulConfig("wgmma", 128, 256, 64, 4, 6, num_stores=1, lead=3),
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, num_stores=2, lead=2),
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, num_stores=2, lead=0),
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, group_m=16, num_stores=2, lead=4),
        MatmulConfig("wgmma", 128, 256, 128, 4, 4, num_stores=2, lead=1),
        MatmulConfig("wgmma", 128, 256, 128, 4, 3, num_stores=1, lead=1),
        MatmulConfig("wgmma", 256, 128, 128, 4, 4, num_stores=2, lead=1),
        MatmulConfig("wgmma", 256, 128, 64, 4, 8, num_stores=2, lead=4),
        MatmulConfig("tma", 128, 256, 128, 8, 4, group_m=16, num_stores=2),
        MatmulConfig("tma", 128, 256, 64, 8, 6, num_stores=2),
        MatmulConfig("pointers", 128, 256, 128, 8, 4),
        MatmulConfig("pointers", 256, 128, 128, 8, 4),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on one shape."""

    op: str
    shape: str
    work: Work
    unit: str
    operands: list[tuple[Any, ...]]
    """Sets of arguments to rotate through."""
    run: Callable[..., Any]
    tuner: Any = None
    candidates: Sequence[Any] = ()
    launch: Callable[..., Any] | None = None
    """(config, *arguments): run in one configuration."""

    def rate(self, ms: float) -> float:
        """In the case's unit."""
        return self.work.flops / ms / 1e9 if self.unit == GEMM else self.work.bytes / ms / 1e6


def rotated(make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many results of `make` as exceed the L2 cache together, two at least."""
    first = make()
    size = sum(t.nbytes for t in first if isinstance(t, torch.Tensor))
    return [first, *(make() for _ in range(min(max(1, ROTATION_BYTES // size), 16)))]


def normal(*shape: int) -> tuple[torch.Tensor]:
    """A bf16 activation, gradient or weight."""
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16),)


def quantizer_cases(only: str) -> Iterable[Case]:
    """Every quantiser whose name contains `only` on the shapes of real layers, and the way back."""
    row, tensor, column, block = quantize_rowwise, quantize_tensorwise, quantize_columnwise, quantize_blockwise

    def case(
        op: str, shape: tuple[int, int], work: Work, operands: Callable[[], Any], **tuned: Any
    ) -> Iterable[Case]:
        if only in op:
            run = getattr(torch.ops.swcompile, op).default
            label = "{} x {}".format(*shape)
            yield Case(
                op=op, shape=label, work=work, unit=MEMORY, operands=rotated(operands), run=run, **tuned
            )

    for width in (1280, 4096, 5120, 16384):
        shape = (TOKENS, width)
        tuned: dict[str, Any] = {
            "tuner": row.TUNER,
            "candidates": row.candidates(width),
            "launch": _launch_rowwise,
        }
        yield from case(
            "quantize_rowwise", shape, row.quantize_rowwise_work(*shape, 2), partial(normal, *shape), **tuned
        )
    for shape in WEIGHTS:
        for suffix in ("", "_transpose", "_both"):
            run = partial(_launch_tensorwise, same=suffix != "_transpose", transposed=suffix != "")
            tuned = {"tuner": tensor.TUNER, "candidates": tensor.CANDIDATES, "launch": run}
            work = tensor.quantize_tensorwise_work(*shape, 2, num_outputs=1 + (suffix == "_both"))
            yield from case("quantize_tensorwise" + suffix, shape, work, partial(normal, *shape), **tuned)
        work = tensor.quantize_by_scale_work(*shape, 2)
        yield from case("quantize_by_scale", shape, work, partial(_with_scale, *shape), tuner=tensor.TUNER)
    for shape in [*WEIGHTS, (TOKENS, 1280), (TOKENS, 5120)]:
        tuned = {"tuner": column.TUNER, "candidates": column.CANDIDATES, "launch": _launch_columnwise}
        work = column.quantize_columnwise_transpose_work(*shape, 2)
        yield from case("quantize_columnwise_transpose", shape, work, partial(normal, *shape), **tuned)
    for width in (1280, 4096, 5120, 14336):
        shape = (TOKENS, width)
        tuned = {"tuner": block.TUNER, "candidates": block.CANDIDATES, "launch": _launch_blockwise}
        work = block.quantize_blockwise_transpose_work(*shape, 2)
        yield from case("quantize_blockwise_transpose", shape, work, partial(_with_factors, *shape), **tuned)
        tuned = {"tuner": transpose.TUNER, "candidates": transpose.CANDIDATES, "launch": _launch_transpose}
        yield from case("transpose", shape, transpose.transpose_work(*shape), partial(_codes, *shape), **tuned)
    for width in (1280, 5120):
        work = dequantize.dequantize_work(TOKENS, width, 2, num_scales=TOKENS)
        operands = partial(lambda width: (*quantized(TOKENS, width), torch.bfloat16), width)
        yield from case("dequantize", (TOKENS, width), work, operands)


def _with_scale(*shape: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A weight, its scale, and that it is to be transposed."""
    (x,) = normal(*shape)
    return x, quantize_tensorwise.quantize_tensorwise(x)[1], True


def _with_factors(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation, and the scales of another tensor's tokens."""
    (x,) = normal(*shape)
    return x, torch.rand(len(x), 1, device="cuda")


def _codes(*shape: int) -> tuple[torch.Tensor]:
    """A gradient in int8."""
    return quantized(*shape)[:1]


def row_program_cases(only: str) -> Iterable[Case]:
    """Norms and activations, forward and backward, with the quantisation and all sums over tokens in the same kernel."""
    for name in PROGRAMS:
        for width in (1280, 4096, 5120, 14336) if only in f"map_rows {name}" else ():
            text = program_at(name, width)
            program = parse(text)
            yield Case(
                op=f"map_rows {name}",
                shape=f"{TOKENS} x {width}",
                work=map_rows_work(program, TOKENS, width),
                unit=MEMORY,
                operands=rotated(partial(_program_inputs, text, width)),
                run=partial(_run_program, text),
                candidates=row_program_triton.candidates(program, width),
                launch=partial(_launch_program, text),
            )


def _program_inputs(text: str, width: int) -> tuple[torch.Tensor, ...]:
    return tuple(make_inputs(text, TOKENS, width, "cuda"))


def _run_program(text: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return MAP_ROWS(list(inputs), text)


def _launch_program(text: str, config: Any, *inputs: torch.Tensor) -> None:
    program = parse(text)
    kinds = row_program_triton.output_kinds(inputs, program)
    outputs = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in kinds]
    row_program_triton.launcher(inputs, program, config)(inputs, outputs)


def _launch_rowwise(config: RowwiseConfig, x: torch.Tensor) -> None:
    outputs = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), device="cuda")
    quantize_rowwise.launcher(config, x)(x, *outputs)


def _launch_tensorwise(config: TileConfig, x: torch.Tensor, *, same: bool, transposed: bool) -> None:
    outputs = (torch.empty(shape, dtype=torch.int8, device="cuda") for shape in (x.shape, x.t().shape))
    x_q, x_q_t = (
        output if wanted else None for output, wanted in zip(outputs, (same, transposed), strict=True)
    )
    launch = quantize_tensorwise.launcher(config, x, same=same, transposed=transposed)
    launch(x, x_q, x_q_t, torch.empty((1, 1), device="cuda"))


def _launch_columnwise(config: Any, x: torch.Tensor) -> None:
    x_q = torch.empty(x.t().shape, dtype=torch.int8, device="cuda")
    quantize_columnwise.launcher(config, x)(x, x_q, torch.empty((x.shape[1], 1), device="cuda"))


def _launch_blockwise(config: Any, x: torch.Tensor, factor: torch.Tensor) -> None:
    num_rows, num_columns = x.shape
    x_q = torch.empty((num_columns, padded(num_rows)), dtype=torch.int8, device="cuda")
    quantize_blockwise.launcher(config, x)(x, factor, x_q, torch.empty((num_blocks(num_rows), num_columns), device="cuda"))


def _launch_transpose(config: Any, q: torch.Tensor) -> None:
    transpose.launcher(config, q)(q, torch.empty((q.shape[1], padded(len(q))), dtype=torch.int8, device="cuda"))


def quantized(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rowwise.quantize_rowwise(*normal(num_rows, width))


def _launch_matmul(config: MatmulConfig, a_q: Any, b_q: Any, *scales: Any, out: torch.Tensor, blockwise: bool) -> None:
    scale_a, scale_b = (None, scales[0]) if blockwise else scales[:2]
    operands = a_q, b_q, scale_a, scale_b, None, out
    launcher(config, *operands, blockwise=blockwise)(*operands)


def matmul_cases(num_rows: int, only: str) -> Iterable[Case]:
    """The forward matmul of linear layers in int8, and the one that makes the weight's gradient, of normal data."""
    quantize_blocks = quantize_blockwise.quantize_blockwise_transpose
    for in_features, out_features in LAYERS if only in "scaled_mm" else []:

        def operands(in_features: int = in_features, out_features: int = out_features) -> tuple[Any, ...]:
            a_q, scale_a = quantized(num_rows, in_features)
            b_q, scale_b = quantize_tensorwise.quantize_tensorwise(*normal(out_features, in_features))
            return a_q, b_q, scale_a, scale_b, None, torch.bfloat16

        yield _matmul_case(scaled_mm, "scaled_mm", f"{num_rows}: {in_features} -> {out_features}", operands)
    for in_features, out_features in LAYERS if only in "scaled_mm_blockwise" else []:

        def operands(in_features: int = in_features, out_features: int = out_features) -> tuple[Any, ...]:
            gradient_q, token_scale = quantized(num_rows, out_features)
            b_q, scale = quantize_blocks(*normal(num_rows, in_features), token_scale)
            return transpose.transpose(gradient_q), b_q, scale, torch.bfloat16

        yield _matmul_case(scaled_mm_blockwise, "scaled_mm_blockwise", f"{out_features} x {in_features}: {num_rows}", operands)


def _matmul_case(module: Any, op: str, shape: str, operands: Callable[[], tuple[Any, ...]]) -> Case:
    """A matmul's rate, of its module's op and tuner."""
    sets = rotated(operands)
    (num_rows, num_summed), num_columns, blockwise = sets[0][0].shape, sets[0][1].shape[0], module is scaled_mm_blockwise
    out = torch.empty((num_rows, num_columns), dtype=torch.bfloat16, device="cuda")
    return Case(
        op=op,
        shape=shape,
        work=scaled_mm.scaled_mm_work(num_rows, num_columns, num_summed, 2),
        unit=GEMM,
        operands=sets,
        run=getattr(torch.ops.swcompile, op).default,
        tuner=module.TUNER,
        candidates=candidates(out.device, fits_tma(*sets[0][:2], out), 1, 1, 1, out.dtype, blockwise=blockwise),  # all
        launch=partial(_launch_matmul, out=out, blockwise=blockwise),
    )
