"""Seconds that a model's first step takes (forward, loss, backward), which compiles it: bf16 and each recipe.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py encoder --recipes switchback

Every step runs in a process of its own: the first with empty caches (cold), the second with those that the first one filled
(warm). What our recipes find out once a GPU, its rates and the fastest configuration of each kernel, is part of the first.
Importing libraries and making the model is part of neither, and a small model comes first, unseen, so that the compilers' and
libraries' files are in memory for all.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from reporting import add_workloads, alone, header, markdown_table, write
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
        return time.perf_counter() - start


def in_a_process(*args: str) -> float:
    """`first_step` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(first_step, *args).result()


def measure(workload: str, routes: list[str]) -> list[dict[str, Any]]:
    """One row a route: seconds, and times as long as bf16, cold and warm."""
    rows: list[dict[str, Any]] = []
    for route in routes:
        row: dict[str, Any] = {"route": route}
        with tempfile.TemporaryDirectory() as caches:
            for name in ("cold", "warm"):
                row[f"{name} s"] = in_a_process(workload, route, caches)
                row[f"{name} ratio"] = row[f"{name} s"] / (rows or [row])[0][f"{name} s"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, WORKLOADS, ["llama"])
    parser.add_argument(
        "--recipes", nargs="+", default=["switchback", "switchback_full"], choices=list(swcompile.RECIPES)
    )
    parser.add_argument("--output", help="also write the tables to this markdown file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    measure("mlp", args.recipes[:1])
    columns = {"route": "", "cold s": ".1f", "cold ratio": ".2f", "warm s": ".1f", "warm ratio": ".2f"}
    text = [header("First step, which compiles")]
    for name in args.workloads:
        text.append(f"## {name}\n\n{markdown_table(measure(name, [BASELINE, *args.recipes]), columns)}")
        print(text[-1], flush=True)
    write(text, args.output)


if __name__ == "__main__":
    main()
