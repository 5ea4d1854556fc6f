"""Time and peak memory of a whole train step (forward, loss, backward): compiled bf16 against each recipe.

Prints one table a model. All routes of a model run in one process on the same weights, taking turns, so that their
ratios do not depend on the clock of the moment; times are medians.
"""

import argparse
import dataclasses
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from reporting import header, markdown_table, write
from torch import nn

import swcompile

BASELINE = "torch.compile bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and one batch for it."""

    description: str
    model: nn.Module
    loss: Callable[[Callable[..., Any]], torch.Tensor]
    """(the model, compiled or not) -> the loss of the batch."""


def vit(name: str, batch: int) -> Workload:
    """A timm vision transformer at 224 pixels, bf16 weights, classifying random images."""
    import timm

    model = timm.create_model(name, num_classes=1000).to("cuda", torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(1000, (batch,), device="cuda")
    return Workload(
        description=f"{name}, batch {batch}, bf16 weights",
        model=model,
        loss=lambda call: nn.functional.cross_entropy(call(images).float(), labels),
    )


def llama(layers: int, batch: int, length: int) -> Workload:
    """A decoder with Llama-3-8B's layer, bf16 weights, predicting random tokens."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=length,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(32000, (batch, length), device="cuda")
    return Workload(
        description=f"Llama shape (4096, 14336, 32 heads, 8 KV heads), {layers} layers, {batch} x {length} tokens",
        model=model,
        loss=lambda call: call(input_ids=ids, labels=ids, use_cache=False).loss,
    )


def mlp(width: int, tokens: int) -> Workload:
    """A small MLP: too small for int8 to pay."""
    layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    return Workload(
        description=f"MLP, width {width}, 3 layers, {tokens} tokens",
        model=model,
        loss=lambda call: call(x).float().square().mean(),
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "vit_h": lambda: vit("vit_huge_patch14_224", 128),
    "vit_l": lambda: vit("vit_large_patch14_224", 256),
    "llama": lambda: llama(4, 8, 2048),
    "mlp": lambda: mlp(64, 8192),
}


def step_of(workload: Workload, call: Callable[..., Any]) -> Callable[[], None]:
    def step() -> None:
        workload.model.zero_grad(set_to_none=True)
        workload.loss(call).backward()

    return step


def measure(workload: Workload, routes: list[str], rounds: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a route: seconds to compile, ms a step, GiB at the peak."""
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for route in routes:
        torch._dynamo.reset()
        is_recipe = route in swcompile.RECIPES
        call = torch.compile(
            workload.model,
            backend="switchback" if is_recipe else "inductor",
            options={"recipe": route, **options} if is_recipe else None,
            fullgraph=True,
        )
        steps[route] = step_of(workload, call)
        start = time.perf_counter()
        steps[route]()
        torch.cuda.synchronize()
        rows[route] = {"route": route, "compile s": time.perf_counter() - start}
        for _ in range(2):
            steps[route]()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        steps[route]()
        torch.cuda.synchronize()
        rows[route]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if is_recipe:
            print(swcompile.reports()[-1].summary(), flush=True)
    times = defaultdict(list)
    for _ in range(rounds):
        for route, step in steps.items():
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step()  # the caches and the clock of this route, not of the one before
            start_event.record()
            step()
            end_event.record()
            torch.cuda.synchronize()
            times[route].append(start_event.elapsed_time(end_event))
    for route, row in rows.items():
        row["ms"] = statistics.median(times[route])
        row["spread ms"] = statistics.quantiles(times[route], n=4)[2] - statistics.quantiles(times[route], n=4)[0]
    base = rows.get(BASELINE)
    for row in rows.values():
        row["speed-up"] = base["ms"] / row["ms"] if base else float("nan")
        row["memory"] = row["GiB"] / base["GiB"] if base else float("nan")
    return list(rows.values())


def breakdown(step: Callable[[], None], top: int = 30) -> str:
    """GPU time of one step by kernel, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    lines = [f"{total / 1e3:9.2f} ms in all"]
    lines += [f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:5d} x  {e.key[:110]}" for e in events[:top]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["vit_h", "llama"], choices=[*WORKLOADS, []], metavar="WORKLOAD",
                        help=f"what to run: {', '.join(WORKLOADS)} (default: vit_h llama)")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", default=["switchback", "switchback_m"], choices=list(swcompile.RECIPES))
    parser.add_argument("--rounds", type=int, default=10, help="timed steps a route (default: 10)")
    parser.add_argument("--all-eligible", action="store_true", help="rewrite matmuls that int8 makes slower, too")
    parser.add_argument("--breakdown", action="store_true", help="also print GPU time by kernel, a route")
    parser.add_argument("--report", action="store_true", help="also print what was rewritten")
    parser.add_argument("--output", help="also write the tables to this markdown file")
    args = parser.parse_args()
    options = {"skip_slower": False} if args.all_eligible else {}
    text = [header("Train step: forward, loss, backward")]
    for name in args.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        rows = measure(workload, [BASELINE, *args.recipes], args.rounds, options)
        columns = {"ms": ".1f", "spread ms": ".1f", "speed-up": ".3f", "GiB": ".2f", "memory": ".3f", "compile s": ".0f"}
        text.append(f"## {workload.description}\n\n{markdown_table(rows, {'route': '', **columns})}")
        print(text[-1], flush=True)
        if args.report:
            print(swcompile.reports()[-1])
        if args.breakdown:
            for route in (BASELINE, *args.recipes):
                backend = "switchback" if route in swcompile.RECIPES else "inductor"
                options_of = {"recipe": route, **options} if backend == "switchback" else None
                torch._dynamo.reset()
                step = step_of(workload, torch.compile(workload.model, backend=backend, options=options_of))
                for _ in range(3):
                    step()
                print(f"\n{name}, {route}\n{breakdown(step)}", flush=True)
        del workload
        gc.collect()
        torch.cuda.empty_cache()
    write(text, args.output)


if __name__ == "__main__":
    main()
