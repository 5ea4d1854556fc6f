"""Time of an optimizer's step: StableAdamW against torch's AdamW, and against optimi's StableAdamW where it is installed.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py small --rounds 50

All routes of a workload run in one process on tensors of the same shapes, taking turns; times are medians. "Device" is a
step's time there with the host well ahead, "in a row" the time of each of several steps one after the other, where the
slower one of both counts, "host" how long the call itself takes in such a row, and "first" the first step, with everything
that is compiled in it. "Alone" is the host's time for a single call that finds other routes' tensors in its caches.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from kernel_speed import copy_gb_s
from reporting import add_workloads, alone, header, markdown_table, write
from torch import nn

from swcompile import StableAdamW

Shapes = Sequence[tuple[int, ...]]
NUM_IN_A_ROW = 5
BASELINE = "torch AdamW, compiled"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def vit_h() -> Shapes:
    """Shapes of ViT-H/14 without a head: timm's vit_huge_patch14_224, 32 blocks of width 1280."""
    width, hidden = 1280, 5120
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    ends = [(1, 1, width), (1, 257, width), (width, 3, 14, 14), (width,), (width,), (width,)]
    return [*block * 32, *ends]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "vit_h": vit_h,
    "small": lambda: [(64, 64)] * 2000,
}


def torch_compiled(params: list[nn.Parameter]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(params, foreach=True, capturable=True, **OPTIONS)
    return torch.compile(lambda: optimizer.step(), fullgraph=False)


def routes(workload: str) -> dict[str, Callable[[list[nn.Parameter]], Callable[[], Any]]]:
    """Name -> what makes the step of an optimizer of some parameters."""
    known: dict[str, Any] = {
        "torch AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True, **OPTIONS).step,
        "StableAdamW": lambda params: StableAdamW(params, **OPTIONS).step,
        "StableAdamW, no clipping": lambda params: StableAdamW(
            params, clip_threshold=None, skip_nonfinite=False, **OPTIONS
        ).step,
    }
    if workload == "vit_h":  # Inductor takes minutes for thousands of tensors
        known = {BASELINE: torch_compiled} | known
    try:
        import optimi
    except ImportError:
        return known
    for name in ("triton", "foreach"):
        ways = {"triton": False, "foreach": False, name: True}
        known[f"optimi StableAdamW, {name}"] = partial(_optimi, optimi, ways)
    return known


def _optimi(optimi: Any, ways: dict[str, bool], params: list[nn.Parameter]) -> Callable[[], Any]:
    return optimi.StableAdamW(params, **OPTIONS, **ways).step


def measure(workload: str, num_rounds: int, floor_ms: float) -> list[dict[str, Any]]:
    """A row a route. Each has its own parameters and gradients, so that no step finds another's in the cache."""
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in routes(workload).items():
        params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in WORKLOADS[workload]()]
        for param in params:
            param.grad = torch.randn_like(param)
        torch.cuda.synchronize()
        start = time.perf_counter()
        steps[name] = make(params)
        steps[name]()
        torch.cuda.synchronize()
        rows[name] = {"optimizer": name, "first s": time.perf_counter() - start}
        for _ in range(3):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    cold: dict[str, list[float]] = {name: [] for name in steps}
    in_a_row: dict[str, list[float]] = {name: [] for name in steps}
    with alone():
        for name, step in [*steps.items()] * num_rounds:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            cold[name].append(1e3 * (time.perf_counter() - begin))
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(200_000_000)  # 0.1 s: the host is done before the device begins
            events[0].record()
            step()
            events[1].record()
            torch.cuda.synchronize()
            times[name].append(events[0].elapsed_time(events[1]))
            begin = time.perf_counter()
            for _ in range(NUM_IN_A_ROW):
                called = time.perf_counter()
                step()
                host[name].append(1e3 * (time.perf_counter() - called))
            torch.cuda.synchronize()
            in_a_row[name].append(1e3 * (time.perf_counter() - begin) / NUM_IN_A_ROW)
    baseline = BASELINE if BASELINE in rows else "torch AdamW, fused"
    for name, row in rows.items():
        for column, samples in (("device ms", times), ("host ms", host), ("alone ms", cold), ("in a row ms", in_a_row)):
            row[column] = statistics.median(samples[name])
            row[column.removesuffix("ms") + "ratio"] = row[column] / statistics.median(samples[baseline])
        row["of floor"] = floor_ms / row["device ms"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, WORKLOADS, list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=10, help="timed steps a route (default: 10)")
    parser.add_argument("--output", help="also write the tables to this markdown file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    copy = copy_gb_s()
    text = [header("Optimizer step"), f"Copy bandwidth {copy:.0f} GB/s; the floor is 28 bytes a parameter, AdamW's."]
    print("\n\n".join(text), flush=True)
    for name in args.workloads:
        num_elements = sum(torch.Size(shape).numel() for shape in WORKLOADS[name]())
        rows = measure(name, args.rounds, 28 * num_elements / copy / 1e6)
        columns = {"optimizer": "", "device ms": ".3f", "device ratio": ".3f", "of floor": ".2f", "host ms": ".2f", "alone ms": ".2f"}
        columns |= {"in a row ms": ".3f", "in a row ratio": ".3f", "first s": ".1f"}
        tensors = f"{len(WORKLOADS[name]())} float32 tensors, {num_elements / 1e6:.1f} M elements"
        text.append(f"## {name}: {tensors}\n\n{markdown_table(rows, columns)}")
        print(text[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    write(text, args.output)


if __name__ == "__main__":
    main()
