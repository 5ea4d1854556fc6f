"""Seconds that a model's first step takes (forward, loss, backward), which compiles it: bf16 and each recipe.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py encoder --recipes switchback --cold 1

Every step runs in a process of its own, with empty caches (cold) or with those that a cold one filled (warm). Routes take
turns, and the table has the median of each route's processes: one alone is off by up to a second, as the host has other things
to do. What our recipes find out once a GPU, its rates and the fastest configuration of each kernel, is part of a cold step.
Making the model and importing what a program imports is part of neither; what PyTorch imports when it first compiles, Inductor
among it, is part of both, in bf16 as in the recipes. A small model comes first, unseen, so that all files are in memory.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from reporting import add_workloads, alone, header, markdown_table, write
from torch._inductor.async_compile import shutdown_compile_workers
from train_step import BASELINE, WORKLOADS, make_route

import swcompile


def first_step(workload: str, route: str, caches: str) -> float:
    """Seconds of a route's first step, with Inductor's and Triton's caches in a folder."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    torch.manual_seed(0)
    step = make_route(WORKLOADS[workload](), route, {}, 1).step
    torch.cuda.synchronize()
    with alone():
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    shutdown_compile_workers()  # a forked process leaves them to nobody
    return seconds


os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # CUDA, if asked before a fork, fails after it
_forkserver = get_context("forkserver")
"""Forks processes from one that has imported what is listed and has not touched the GPU."""
_forkserver.set_forkserver_preload(["swcompile", "transformers", "timm"])


def in_a_process(*args: str) -> float:
    """`first_step` in a new process."""
    with ProcessPoolExecutor(1, mp_context=_forkserver) as pool:
        return pool.submit(first_step, *args).result()


def measure(workload: str, routes: list[str], num_cold: int, num_warm: int) -> list[dict[str, Any]]:
    """One row a route: seconds, and times as long as the first route, cold and warm.

    Args:
        workload: name of what compiles.
        routes: names of how.
        num_cold: processes a route with empty caches, at least one, each of which has a folder of its own.
        num_warm: processes a route with the caches that its last cold one filled.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    turns = [("cold", number) for number in range(num_cold)] + [("warm", num_cold - 1)] * num_warm
    with tempfile.TemporaryDirectory() as folder:
        for (kind, turn), route in product(turns, routes):
            taken = in_a_process(workload, route, f"{folder}/{turn}/{routes.index(route)}")
            seconds.setdefault((kind, route), []).append(taken)
            print(f"{workload}, {route}, {kind}: {taken:.1f} s", file=sys.stderr, flush=True)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {"route": route}
        | {f"{kind} s": median[kind, route] for kind in ("cold", "warm")}
        | {f"{kind} ratio": median[kind, route] / median[kind, routes[0]] for kind in ("cold", "warm")}
        for route in routes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, WORKLOADS, ["llama"])
    parser.add_argument(
        "--recipes", nargs="+", default=["switchback", "switchback_full"], choices=list(swcompile.RECIPES)
    )
    parser.add_argument("--cold", type=int, default=3, help="processes a route with empty caches (default: 3)")
    parser.add_argument("--warm", type=int, default=5, help="and with filled ones (default: 5)")
    parser.add_argument("--output", help="also write the tables to this markdown file")
    args = parser.parse_args()
    if min(args.cold, args.warm) < 1:
        parser.error("--cold and --warm are 1 or more")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    measure("mlp", args.recipes[:1], 1, 1)
    columns = {"route": "", "cold s": ".1f", "cold ratio": ".2f", "warm s": ".1f", "warm ratio": ".2f"}
    text = [header("First step, which compiles")]
    for name in args.workloads:
        text.append(f"## {name}\n\n{markdown_table(measure(name, [BASELINE, *args.recipes], args.cold, args.warm), columns)}")
        print(text[-1], flush=True)
    write(text, args.output)


if __name__ == "__main__":
    main()
