"""Speed of every kernel on this GPU, against the copy bandwidth and the bf16 matmul measured in the same run.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only scaled_mm --all-configs --extra-configs

Operands rotate through buffers larger than the L2 cache, and times are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from reporting import header, markdown_table, write
from swcompile.kernels import (
    dequantize,
    quantize_columnwise,
    quantize_rowwise,
    quantize_tensorwise,
    scaled_mm,
)
from swcompile.kernels.library import Work
from swcompile.kernels.quantize_rowwise import RowwiseConfig
from swcompile.kernels.quantize_tensorwise import TileConfig
from swcompile.kernels.scaled_mm_kernels import MatmulConfig
from triton.errors import TritonError

# Run as a program from this folder, this file is what a probe for a module named `kernels` finds (transformers).
__version__ = "0.0.0"

TOKENS = 32768
WEIGHTS = [(1280, 5120), (5120, 1280), (4096, 4096), (4096, 16384)]
LAYERS = [(1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280), (2048, 8192), (4096, 4096), (4096, 16384), (16384, 4096)]
"""in features -> out features"""
ROTATION_BYTES = 200_000_000
"""Operands of successive calls together: more than the 50 to 60 MB of L2 cache that a large GPU has."""
GEMM, MEMORY = "TOP/s", "GB/s"

EXTRA_CONFIGS: dict[str, list[Any]] = {
    "quantize_rowwise": [RowwiseConfig(1, 4, 3), RowwiseConfig(1, 8, 2), RowwiseConfig(2, 8, 3), RowwiseConfig(1, 2)],
    "quantize_tensorwise": [TileConfig(64, 256, 8), TileConfig(256, 64, 8), TileConfig(32, 128, 4), TileConfig(128, 256, 8)],
    "scaled_mm": [
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, num_stores=2, lead=2),
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, num_stores=2, lead=0),
        MatmulConfig("wgmma", 128, 256, 64, 4, 8, group_rows=16, num_stores=2, lead=4),
        MatmulConfig("wgmma", 128, 256, 64, 4, 6, num_stores=1, lead=2),
        MatmulConfig("wgmma", 128, 256, 128, 4, 4, num_stores=2, lead=1),
        MatmulConfig("wgmma", 128, 256, 128, 4, 3, num_stores=1, lead=1),
        MatmulConfig("wgmma", 256, 128, 128, 4, 4, num_stores=2, lead=1),
        MatmulConfig("wgmma", 256, 128, 64, 4, 8, num_stores=2, lead=4),
        MatmulConfig("tma", 128, 256, 128, 8, 4, group_rows=16, num_stores=2),
        MatmulConfig("tma", 256, 128, 128, 8, 3, num_stores=2),
        MatmulConfig("tma", 128, 128, 128, 4, 3, programs_each=2),
        MatmulConfig("tma", 128, 256, 64, 8, 6, num_stores=2),
        MatmulConfig("tma", 64, 256, 128, 4, 2, num_stores=2, programs_each=2),
        MatmulConfig("pointers", 128, 256, 128, 8, 4),
        MatmulConfig("pointers", 256, 128, 128, 8, 4),
        MatmulConfig("pointers", 128, 128, 128, 4, 3),
    ],
}
"""Candidates for the lists in the kernels' modules."""


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


def median_ms(calls: Sequence[Callable[[], Any]], *, num_samples: int = 30) -> float:
    """Median time of a call, taking turns among `calls`, once all are queued: launching is not timed."""
    for call in islice(cycle(calls), max(3, len(calls))):
        call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_samples + 1)]
    torch.cuda._sleep(5_000_000)
    for event, call in zip(events, cycle(calls), strict=False):
        event.record()
        call()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events))


def host_us(call: Callable[[], Any]) -> float:
    """Time that the host spends on a call."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 200 * 1e6


def copy_gb_s() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms([lambda: target.copy_(source)]) / 1e6


def rotated(make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many results of `make` as exceed the L2 cache together, two at least."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    return [first, *(make() for _ in range(min(max(1, ROTATION_BYTES // size), 16)))]


def normal(*shape: int) -> tuple[torch.Tensor]:
    """A bf16 activation, gradient or weight."""
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16),)


def quantizer_cases(only: str) -> Iterable[Case]:
    """Every quantiser whose name contains `only` on the shapes of real layers, and the way back."""
    for width in (1280, 4096, 5120, 16384) if only in "quantize_rowwise" else []:
        yield Case(
            op="quantize_rowwise",
            shape=f"{TOKENS} x {width}",
            work=quantize_rowwise.quantize_rowwise_work(TOKENS, width, 2),
            unit=MEMORY,
            operands=rotated(partial(normal, TOKENS, width)),
            run=quantize_rowwise.QUANTIZE_ROWWISE,
            tuner=quantize_rowwise.TUNER,
            candidates=quantize_rowwise.candidates(width),
            launch=_launch_rowwise,
        )
    for shape in WEIGHTS if only in "quantize_tensorwise_transpose_both" else []:
        operands = rotated(partial(normal, *shape))
        for suffix in ("", "_transpose", "_both"):
            yield Case(
                op="quantize_tensorwise" + suffix,
                shape="{} x {}".format(*shape),
                work=quantize_tensorwise.quantize_tensorwise_work(*shape, 2, num_outputs=1 + (suffix == "_both")),
                unit=MEMORY,
                operands=operands,
                run=getattr(torch.ops.swcompile, "quantize_tensorwise" + suffix).default,
                tuner=quantize_tensorwise.TUNER,
                candidates=quantize_tensorwise.CANDIDATES,
                launch=partial(_launch_tensorwise, same=suffix != "_transpose", transposed=suffix != ""),
            )
    for shape in [*WEIGHTS, (TOKENS, 1280), (TOKENS, 5120)] if only in "quantize_columnwise_transpose" else []:
        yield Case(
            op="quantize_columnwise_transpose",
            shape="{} x {}".format(*shape),
            work=quantize_columnwise.quantize_columnwise_transpose_work(*shape, 2),
            unit=MEMORY,
            operands=rotated(partial(normal, *shape)),
            run=quantize_columnwise.QUANTIZE_COLUMNWISE_TRANSPOSE,
            tuner=quantize_columnwise.TUNER,
            candidates=quantize_columnwise.CANDIDATES,
            launch=_launch_columnwise,
        )
    for width in (1280, 5120) if only in "dequantize" else []:
        yield Case(
            op="dequantize",
            shape=f"{TOKENS} x {width}",
            work=dequantize.dequantize_work(TOKENS, width, 2, num_scales=TOKENS),
            unit=MEMORY,
            operands=rotated(lambda width=width: (*_quantized(TOKENS, width), torch.bfloat16)),  # type: ignore[misc]
            run=dequantize.DEQUANTIZE,
        )


def _launch_rowwise(config: RowwiseConfig, x: torch.Tensor) -> None:
    quantize_rowwise.launch(config, x, torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), device="cuda"))


def _launch_tensorwise(config: TileConfig, x: torch.Tensor, *, same: bool, transposed: bool) -> None:
    partial_P = torch.empty(quantize_tensorwise.MAX_PARTIALS, dtype=torch.int32, device="cuda")
    outputs = (torch.empty(shape, dtype=torch.int8, device="cuda") for shape in (x.shape, x.t().shape))
    x_q, x_q_t = (output if wanted else None for output, wanted in zip(outputs, (same, transposed), strict=True))
    quantize_tensorwise.launch(config, x, partial_P, x_q, x_q_t, torch.empty((1, 1), device="cuda"))


def _launch_columnwise(config: Any, x: torch.Tensor) -> None:
    num_columns = x.shape[1]
    partial_PK = torch.empty((quantize_columnwise.MAX_PARTIALS, num_columns), dtype=torch.int32, device="cuda")
    x_q = torch.empty(x.t().shape, dtype=torch.int8, device="cuda")
    quantize_columnwise.launch(config, x, partial_PK, x_q, torch.empty((num_columns, 1), device="cuda"))


def _quantized(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rowwise.quantize_rowwise(*normal(num_rows, width))


def matmul_cases(num_rows: int, only: str) -> Iterable[Case]:
    """The forward matmul of linear layers, on quantised normal data."""
    for num_summed, num_columns in LAYERS if only in "scaled_mm" else []:

        def operands(num_summed: int = num_summed, num_columns: int = num_columns) -> tuple[Any, ...]:
            a_q, scale_a = _quantized(num_rows, num_summed)
            b_q, scale_b = quantize_tensorwise.quantize_tensorwise(*normal(num_columns, num_summed))
            return a_q, b_q, scale_a, scale_b, None, torch.bfloat16

        sets = rotated(operands)
        out = torch.empty((num_rows, num_columns), dtype=torch.bfloat16, device="cuda")
        yield Case(
            op="scaled_mm",
            shape=f"{num_rows}: {num_summed} -> {num_columns}",
            work=scaled_mm.scaled_mm_work(num_rows, num_columns, num_summed, 2),
            unit=GEMM,
            operands=sets,
            run=scaled_mm.SCALED_MM,
            tuner=scaled_mm.TUNER,
            candidates=scaled_mm.candidates(out.device, scaled_mm.fits_copy_engine(*sets[0][:2], out)),
            launch=lambda config, *arguments, out=out: scaled_mm.launch(config, *arguments[:-1], out),
        )


def bf16_matmul_ms(case: Case) -> float:
    """The same matmul in bf16 by PyTorch."""
    return median_ms([partial(torch.mm, a.bfloat16(), b.bfloat16().t()) for a, b, *_ in case.operands[:2]])


def describe(config: Any) -> str:
    """A configuration in a table."""
    return " ".join(map(str, config))


def measure(case: Case, copy: float) -> dict[str, Any]:
    """A row of the main table."""
    ms = median_ms([partial(case.run, *arguments) for arguments in case.operands])
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "ms": ms, case.unit: case.rate(ms)}
    if case.tuner is not None:
        row["config"] = describe(case.tuner.latest)
    if case.unit == MEMORY:
        return row | {"of copy": case.rate(ms) / copy}
    bf16_ms = bf16_matmul_ms(case)
    return row | {"bf16 TFLOP/s": case.rate(bf16_ms), "speed-up": bf16_ms / ms}


def measure_configs(case: Case, extra: Sequence[Any], copy: float) -> dict[Any, str]:
    """The case's rate in each configuration; of one that does not compile or launch, the error's name."""
    assert case.launch is not None
    rates: dict[Any, str] = {}
    for config in dict.fromkeys([*case.candidates, *extra]):
        try:
            ms = median_ms([partial(case.launch, config, *arguments) for arguments in case.operands], num_samples=15)
            rates[config] = format(case.rate(ms), ".0f") if case.unit == GEMM else format(case.rate(ms) / copy, ".2f")
        except (TritonError, RuntimeError) as error:
            rates[config] = type(error).__name__
    return rates


def config_tables(measured: Sequence[tuple[Case, dict[Any, str]]]) -> Iterable[str]:
    """A table an op: a row a configuration a column a shape."""
    for op in dict.fromkeys(case.op for case, _ in measured):
        cases = [(case, rates) for case, rates in measured if case.op == op]
        rows = [
            {"config": describe(config)} | {case.shape: rates[config] for case, rates in cases if config in rates}
            for config in dict.fromkeys(config for _, rates in cases for config in rates)
        ]
        unit = "TOP/s" if cases[0][0].unit == GEMM else "of copy"
        yield f"{op}, {unit}:\n\n" + markdown_table(rows, {"config": ""} | {case.shape: "" for case, _ in cases})


def host_rows() -> list[dict[str, Any]]:
    """Host time of a call of each op, on operands too small to keep the GPU busy."""
    x_q, scale = _quantized(64, 256)
    calls = [
        (quantize_rowwise.QUANTIZE_ROWWISE, normal(64, 256)),
        (quantize_tensorwise.QUANTIZE_TENSORWISE, normal(64, 256)),
        (dequantize.DEQUANTIZE, (x_q, scale, torch.bfloat16)),
        (scaled_mm.SCALED_MM, (x_q, x_q, scale, scale, None, torch.bfloat16)),
    ]
    return [{"op": op.name(), "host us a call": host_us(partial(op, *arguments))} for op, arguments in calls]


def matmul_config(text: str) -> MatmulConfig:
    """ "tma,128,256,128,8,3,8,2,1" as a configuration."""
    kernel, *numbers = text.split(",")
    return MatmulConfig(kernel, *map(int, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--rows", type=int, nargs="+", default=[TOKENS], help="rows of the matmuls (default 32768)")
    parser.add_argument("--all-configs", action="store_true", help="time each configuration as well")
    parser.add_argument("--extra-configs", action="store_true", help="with --all-configs: also those that are not listed")
    parser.add_argument("--config", type=matmul_config, action="append", default=[], metavar="KERNEL,ROWS,COLUMNS,...",
                        help="with --all-configs: one more for scaled_mm, as in MatmulConfig; repeatable")
    parser.add_argument("--output", help="write the same markdown to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    parts = [header("Kernels")]
    print(parts[0], flush=True)
    copy = copy_gb_s()
    rows, measured = [], []
    makers = [quantizer_cases, *(partial(matmul_cases, num_rows) for num_rows in arguments.rows)]
    for case in (case for make in makers for case in make(arguments.only)):
        rows.append(measure(case, copy))
        print(rows[-1], flush=True)
        if arguments.all_configs and case.launch is not None:
            extra = EXTRA_CONFIGS.get(case.op, []) if arguments.extra_configs else []
            extra = extra + (arguments.config if case.op == "scaled_mm" else [])
            measured.append((case, measure_configs(case, extra, copy)))
            print(measured[-1][1], flush=True)
    memory = {"op": "", "shape": "", "ms": ".3f", MEMORY: ".0f", "of copy": ".2f", "config": ""}
    gemm = {"op": "", "shape": "", "ms": ".3f", GEMM: ".0f", "bf16 TFLOP/s": ".0f", "speed-up": ".2f", "config": ""}
    parts.append(f"Copy bandwidth {copy:.0f} GB/s, read and written.")
    for unit, columns in ((MEMORY, memory), (GEMM, gemm)):
        if chosen := [row for row in rows if unit in row]:
            parts.append(markdown_table(chosen, columns))
    parts.append(markdown_table(host_rows(), {"op": "", "host us a call": ".0f"}))
    parts += config_tables(measured)
    print("\n\n".join(parts[1:]))
    write(parts, arguments.output)


if __name__ == "__main__":
    main()
