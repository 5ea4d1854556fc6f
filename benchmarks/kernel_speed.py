"""Speed of every kernel on this GPU, against the copy bandwidth and the bf16 matmul measured in the same run.

    python benchmarks/kernel_speed.py
    python benchmarks/kernel_speed.py --only scaled_mm --all-configs --extra-configs

Operands rotate through buffers larger than the L2 cache; times are medians over the turns through them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import torch
from kernel_cases import (
    EXTRA_CONFIGS,
    GEMM,
    MEMORY,
    TOKENS,
    Case,
    matmul_cases,
    normal,
    quantized,
    quantizer_cases,
    row_program_cases,
)
from reporting import header, markdown_table, write
from triton.errors import TritonError

from swcompile.kernels.scaled_mm_kernels import MatmulConfig
from swcompile.kernels.timing import intervals_ms


def median_ms(calls: Sequence[Callable[[], Any]], *, num_calls: int = 30) -> float:
    """Time of a call, in the median of turns through all `calls`, once all are queued: launching is not timed.

    A turn is timed as a whole. An event between two calls adds two microseconds to each (clearing a number takes 3.6 of
    them instead of 1.7 on an H200), and a training step has none there.
    """

    def turn() -> None:
        for call in calls:
            call()

    return statistics.median(samples_ms([turn], max(10, num_calls // len(calls)))) / len(calls)


def samples_ms(calls: Sequence[Callable[[], Any]], num_samples: int) -> list[float]:
    """Times of calls, which take turns, once all are queued: of so many, or fewer that take some two seconds, but ten at least."""
    for call in islice(cycle(calls), max(3, len(calls))):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    in_time = int(2.0 * len(calls) / (time.perf_counter() - start))
    return intervals_ms(calls, max(10, min(num_samples, in_time)))


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


def measure(case: Case, copy: float) -> dict[str, Any]:
    """A row of the main table."""
    ms = median_ms([partial(case.run, *arguments) for arguments in case.operands])
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "ms": ms, case.unit: case.rate(ms)}
    if case.tuner is not None:
        row["config"] = " ".join(map(str, case.tuner.latest))
    if case.unit == MEMORY:
        return row | {"of copy": case.rate(ms) / copy}
    bf16_ms = median_ms([partial(torch.mm, a.bfloat16(), b.bfloat16().t()) for a, b, *_ in case.operands[:2]])
    return row | {"bf16 TFLOP/s": case.rate(bf16_ms), "speed-up": bf16_ms / ms}


def measure_configs(case: Case, extra: Sequence[Any], copy: float) -> dict[Any, str]:
    """The case's rate in each configuration; of one that does not compile or launch, the error's name."""
    assert case.launch is not None
    rates: dict[Any, str] = {}
    for config in dict.fromkeys([*case.candidates, *extra]):
        try:
            ms = median_ms(
                [partial(case.launch, config, *arguments) for arguments in case.operands], num_calls=15
            )
            rates[config] = (
                format(case.rate(ms), ".0f") if case.unit == GEMM else format(case.rate(ms) / copy, ".2f")
            )
        except (TritonError, RuntimeError) as error:
            rates[config] = type(error).__name__
    return rates


def config_tables(measured: Sequence[tuple[Case, dict[Any, str]]]) -> Iterable[str]:
    """A table an op: a row a configuration a column a shape."""
    for op in dict.fromkeys(case.op for case, _ in measured):
        cases = [(case, rates) for case, rates in measured if case.op == op]
        rows = [
            {"config": " ".join(map(str, config))}
            | {case.shape: rates[config] for case, rates in cases if config in rates}
            for config in dict.fromkeys(config for _, rates in cases for config in rates)
        ]
        unit = "TOP/s" if cases[0][0].unit == GEMM else "of copy"
        yield f"{op}, {unit}:\n\n" + markdown_table(
            rows, {"config": ""} | {case.shape: "" for case, _ in cases}
        )


def host_rows() -> list[dict[str, Any]]:
    """Host time of a call of each op, on operands too small to keep the GPU busy."""
    ops, (x_q, scale) = torch.ops.swcompile, quantized(64, 256)
    calls = {
        "quantize_rowwise": partial(ops.quantize_rowwise.default, *normal(64, 256)),
        "quantize_tensorwise": partial(ops.quantize_tensorwise.default, *normal(64, 256)),
        "scaled_mm": partial(ops.scaled_mm.default, x_q, x_q, scale, scale, None, torch.bfloat16),
    }
    return [{"op": op, "host us a call": host_us(call)} for op, call in calls.items()]


def matmul_config(text: str) -> MatmulConfig:
    """ "tma,128,256,128,8,3,8,2,1" as a configuration."""
    kernel, *numbers = text.split(",")
    return MatmulConfig(kernel, *map(int, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[TOKENS], help="rows of the matmuls (default 32768)"
    )
    parser.add_argument("--all-configs", action="store_true", help="time each configuration as well")
    parser.add_argument(
        "--extra-configs", action="store_true", help="with --all-configs: also those that are not listed"
    )
    parser.add_argument(
        "--config",
        type=matmul_config,
        action="append",
        default=[],
        metavar="KERNEL,ROWS,COLUMNS,...",
        help="with --all-configs: one more for scaled_mm, as in MatmulConfig; repeatable",
    )
    parser.add_argument("--output", help="write the same markdown to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    copy = copy_gb_s()
    parts = [header("Kernels"), f"Copy bandwidth {copy:.0f} GB/s, read and written."]
    print(*parts, sep="\n\n", flush=True)
    rows, measured = [], []
    matmuls = (matmul_cases(num_rows, arguments.only) for num_rows in arguments.rows)
    for case in chain(quantizer_cases(arguments.only), row_program_cases(arguments.only), *matmuls):
        rows.append(measure(case, copy))
        print(rows[-1], flush=True)
        if arguments.all_configs and case.launch is not None:
            extra = (
                EXTRA_CONFIGS.get(case.op.removesuffix("_transpose").removesuffix("_both"), [])
                if arguments.extra_configs
                else []
            )
            extra = extra + (arguments.config if case.op == "scaled_mm" else [])
            measured.append((case, measure_configs(case, extra, copy)))
            print(measured[-1][1], flush=True)
    memory = {"op": "", "shape": "", "ms": ".3f", MEMORY: ".0f", "of copy": ".2f", "config": ""}
    gemm = {
        "op": "",
        "shape": "",
        "ms": ".3f",
        GEMM: ".0f",
        "bf16 TFLOP/s": ".0f",
        "speed-up": ".2f",
        "config": "",
    }
    for unit, columns in ((MEMORY, memory), (GEMM, gemm)):
        if chosen := [row for row in rows if unit in row]:
            parts.append(markdown_table(chosen, columns))
    parts.append(markdown_table(host_rows(), {"op": "", "host us a call": ".0f"}))
    parts += config_tables(measured)
    print("\n\n".join(parts[2:]))
    write(parts, arguments.output)


if __name__ == "__main__":
    main()
