"""Time and peak memory of a whole train step (forward, loss, backward): bf16, each recipe, and other libraries' 8 bit.

    python benchmarks/train_step.py
    python benchmarks/train_step.py llama --peers --gradients
    python benchmarks/train_step.py llama_short --accumulate 8

Prints one table a model. All routes of a model run in one process on the same weights, taking turns, so that their
ratios do not depend on the clock of the moment; times are medians. "Of floor" is the share that the matmuls of the
linear layers would take at the rates of large ones on this GPU, in the formats in which they run. "In int8" counts all matmuls
of the model, both passes: the cost rule may leave some.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.metadata
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from reporting import add_workloads, alone, header, markdown_table, write
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config

import swcompile
from swcompile.rates import device_rates

BASELINE = "torch.compile bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and one batch for it."""

    description: str
    model: nn.Module
    loss: Callable[[Callable[..., Any]], torch.Tensor]
    """(the model, compiled or not) -> the loss of the batch."""


def vit(name: str, batch: int, depth: int | None = None) -> Workload:
    """A timm vision transformer at 224 pixels, all blocks or so many, bf16 weights, classifying random images."""
    import timm

    size = {} if depth is None else {"depth": depth}
    model = timm.create_model(name, num_classes=1000, **size).to("cuda", torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(1000, (batch,), device="cuda")
    return Workload(
        description=f"{name}, {depth or 'all'} blocks, batch {batch}, bf16 weights",
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


def encoder(width: int, layers: int, batch: int, length: int) -> Workload:
    """A pre-norm encoder of torch's, bf16 weights, with the mean square of its output as the loss."""
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to("cuda", torch.bfloat16)
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)
    return Workload(
        description=f"nn.TransformerEncoder, width {width}, {layers} layers, {batch} x {length} tokens, bf16 weights",
        model=model,
        loss=lambda call: call(x).float().square().mean(),
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
    "vit_h8": lambda: vit("vit_huge_patch14_224", 128, depth=8),
    "vit_l": lambda: vit("vit_large_patch14_224", 256),
    "llama": lambda: llama(4, 8, 2048),
    "llama_short": lambda: llama(4, 1, 2048),
    "encoder": lambda: encoder(1024, 12, 32, 256),
    "mlp": lambda: mlp(64, 8192),
}


FLOAT8 = "torchao float8 "
"""torchao's float8 training, by the name of its recipe: its modules in the place of the linear layers, then compiled."""
TORCHAO_INT8 = "torchao int8 mixed precision"
"""Likewise torchao's int8 training, by a weight that is a tensor subclass. Whether it runs in int8 is seen by its gradients."""
PEERS = [
    "eager bf16",
    "torch.compile bf16, max-autotune",
    *(FLOAT8 + name for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")),
    TORCHAO_INT8,
]
UNFUSED = ", not fused"
"""After a recipe's name: every quantisation of an activation or gradient is a kernel of its own."""
HELD = ", weights once"
"""Likewise: a weight is quantised once for all micro-batches of a step."""


@dataclasses.dataclass
class Route:
    """A way to run a workload's step."""

    model: nn.Module
    """The one whose gradients the step leaves: the workload's, or a copy that another library has changed."""
    step: Callable[[], None]
    decisions: list[swcompile.Decision] | None = None
    """About all matmuls, if the route is ours and has been compiled."""
    recipe: swcompile.Recipe | None = None
    """If the route is ours."""


def make_route(workload: Workload, name: str, options: dict[str, Any], micro_batches: int) -> Route:
    """Compile nothing yet: the first step does."""
    model, call = workload.model, None
    recipe, is_held = name.removesuffix(UNFUSED).removesuffix(HELD), name.endswith(HELD)
    if recipe in swcompile.RECIPES:
        options = {"recipe": recipe, **options, **({"fuse": False} if name.endswith(UNFUSED) else {})}
        options |= {"micro_batches": micro_batches} if is_held else {}
        call = torch.compile(model, backend="switchback", options=options, fullgraph=True)
    elif name.startswith(FLOAT8):
        model = with_float8(model, name.removeprefix(FLOAT8))
        call = torch.compile(model, fullgraph=True)
    elif name == TORCHAO_INT8:
        model = with_int8(model)
        call = torch.compile(model)
    elif name == BASELINE:
        call = torch.compile(model, fullgraph=True)
    elif name == "torch.compile bf16, max-autotune":
        call = torch.compile(model, fullgraph=True, mode="max-autotune-no-cudagraphs")
    elif name == "eager bf16":
        call = model
    else:
        raise ValueError(f"no route {name!r}")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with swcompile.gradient_accumulation() if is_held else contextlib.nullcontext():
            for _ in range(micro_batches):
                workload.loss(call).backward()

    return Route(model, step, recipe=swcompile.RECIPES[recipe]() if recipe in swcompile.RECIPES else None)


def hush_autotuning() -> None:
    """Keep what `max-autotune` tried, and what of it does not fit the GPU, from the output: it is pages to each table."""
    inductor_config.autotune_num_choices_displayed = 0
    inductor_config.max_autotune_report_choices_stats = False
    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.CRITICAL)


def with_float8(model: nn.Module, recipe: str) -> nn.Module:
    """A copy of a model with torchao's float8 in all linear layers but the last, as its guide has it."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(copy.deepcopy(model), config=config, module_filter_fn=all_but_the_last(model))


def with_int8(model: nn.Module) -> nn.Module:
    """A copy of a model with torchao's int8 training in all linear layers but the last, as its guide has it."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8MixedPrecisionTrainingConfig(), all_but_the_last(model))
    return model


def all_but_the_last(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """(module, its name) -> whether it is a linear layer other than the last, of sizes that 8-bit matmuls take."""
    *_, last = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))

    def is_wanted(module: nn.Module, name: str) -> bool:
        fits = isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
        return fits and name != last

    return is_wanted


def float32_gradients(workload: Workload) -> dict[str, torch.Tensor]:
    """Gradients of the same weights and batch in float32, eager."""
    model = copy.deepcopy(workload.model).float()

    def call(*args: Any, **kwargs: Any) -> Any:
        wide = [a.float() if a.is_floating_point() else a for a in args]
        return model(*wide, **kwargs)

    workload.loss(call).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cosine(model: nn.Module, reference: dict[str, torch.Tensor]) -> float:
    """Of the gradients of all parameters together, with those in float32."""
    dot = own = other = 0.0
    for name, parameter in model.named_parameters():
        if name in reference and parameter.grad is not None:
            grad, wanted = parameter.grad.double(), reference[name].double()
            dot, own, other = dot + float((grad * wanted).sum()), own + float(grad.square().sum()), other + float(wanted.square().sum())
    return dot / (own * other) ** 0.5


def measure(
    workload: Workload, names: list[str], rounds: int, options: dict[str, Any], *, micro_batches: int, gradients: bool, kernels: bool
) -> list[dict[str, Any]]:
    """One row a route: seconds to compile, matmuls in int8, ms a step, GiB at the peak; the cosine of its gradients if asked for.

    `kernels` also prints the GPU time of each.
    """
    reference = float32_gradients(workload) if gradients else {}
    routes: dict[str, Route] = {}
    rows: dict[str, dict[str, Any]] = {}
    torch._dynamo.reset()
    # All routes stay compiled while they take turns, and are recompilations of one forward to Dynamo.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 2 * len(names))
    for name in names:
        try:
            route = make_route(workload, name, options, micro_batches)
            start = time.perf_counter()
            route.step()
        except Exception as error:  # a peer that does not run here is a row that says so
            if name not in PEERS:
                raise
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
            rows[name] = {"route": f"{name} (does not run: {type(error).__name__})"}
            continue
        routes[name] = route
        torch.cuda.synchronize()
        rows[name] = {"route": name, "compile s": time.perf_counter() - start}
        for _ in range(2):
            route.step()
        if gradients:
            rows[name]["cosine"] = cosine(route.model, reference)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        own = sum(p.nbytes for p in route.model.parameters()) + sum(p.nbytes for p in route.model.parameters() if p.grad is not None)
        route.step()
        torch.cuda.synchronize()
        # What other routes keep (their copy of the model, the reference's gradients) does not count.
        rows[name]["GiB"] = (torch.cuda.max_memory_allocated() - before + own) / 2**30
        if route.recipe:
            route.decisions = swcompile.reports()[-1].decisions
            rows[name]["in int8"] = f"{sum(decision.rewritten for decision in route.decisions)} of {len(route.decisions)}"
            print(f"{name}: {swcompile.reports()[-1].summary()}", flush=True)
    times = defaultdict(list)
    with alone():
        for name, route in [*routes.items()] * rounds:
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            route.step()  # the caches and the clock of this route, not of the one before
            start_event.record()
            route.step()
            end_event.record()
            torch.cuda.synchronize()
            times[name].append(start_event.elapsed_time(end_event))
    for name, route in routes.items() if kernels else ():
        print(f"\n{name}\n{breakdown(route.step)}", flush=True)
    for name, samples in times.items():
        quartiles = statistics.quantiles(samples, n=4)
        rows[name] |= {"ms": statistics.median(samples), "spread ms": quartiles[2] - quartiles[0]}
    known = next((route.decisions for route in routes.values() if route.decisions), [])
    for name, route in routes.items():
        if not name.startswith("torchao"):  # whose matmuls nothing here has measured
            floor = floor_ms(route.decisions or known, route.recipe)
            rows[name]["of floor"] = micro_batches * floor / rows[name]["ms"]
    base = rows.get(BASELINE)
    for row in rows.values():
        if base and "ms" in row:
            row |= {"speed-up": base["ms"] / row["ms"], "memory": row["GiB"] / base["GiB"]}
    return list(rows.values())


def floor_ms(decisions: list[swcompile.Decision], recipe: swcompile.Recipe | None) -> float:
    """Milliseconds that the matmuls of linear layers take on this device, each at the rate of a large one in its format.

    Args:
        decisions: about all matmuls of the model, by one of our recipes.
        recipe: by which the formats are what was decided; without one, all are in 16 bit.
    """
    seconds = 0.0
    device = torch.device("cuda", torch.cuda.current_device())
    for decision in decisions:
        role = decision.role
        gemm = recipe.format_of(role) if recipe and decision.rewritten and isinstance(role, swcompile.Role) else None
        rates = device_rates(device, torch.bfloat16, gemm is not None and gemm.is_by_block)
        m, n, k = decision.shape
        if decision.parameter is not None and gemm is None:
            seconds += 2 * m * n * k / rates.matmul + m * n * rates.output
        elif decision.parameter is not None:
            seconds += 2 * m * n * k / rates.quantized_matmul + m * n * rates.quantized_output
    return 1e3 * seconds


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
    add_workloads(parser, WORKLOADS, ["vit_h", "llama"])
    parser.add_argument("--recipes", nargs="+", default=["switchback", "switchback_m", "switchback_full"], choices=list(swcompile.RECIPES))
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="NAME", help=f"also run these, or all of {'; '.join(PEERS)}"
    )
    parser.add_argument("--unfused", action="store_true", help="also run the first recipe without fused quantisation")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="passes a step; with several also quantise weights once for all"
    )
    parser.add_argument("--gradients", action="store_true", help="also compare the gradients with those in float32")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps a route (default: 10)")
    parser.add_argument("--all-eligible", action="store_true", help="rewrite matmuls that int8 makes slower, too")
    parser.add_argument("--breakdown", action="store_true", help="also print GPU time by kernel, a route")
    parser.add_argument("--report", action="store_true", help="also print what was rewritten")
    parser.add_argument("--output", help="also write the tables to this markdown file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    options = {"skip_slower": False} if args.all_eligible else {}
    names = [BASELINE, *args.recipes]
    names += [args.recipes[0] + UNFUSED] if args.unfused else []
    names += [recipe + HELD for recipe in args.recipes] if args.accumulate > 1 else []
    names += [] if args.peers is None else args.peers or PEERS
    text = [header("Train step: forward, loss, backward") + (f"\n\ntorchao {version('torchao')}" if args.peers is not None else "")]
    columns = {"in int8": "", "ms": ".1f", "spread ms": ".1f", "speed-up": ".3f", "of floor": ".2f", "GiB": ".2f", "memory": ".3f", "compile s": ".0f"}
    if args.gradients:
        columns["cosine"] = ".5f"
    hush_autotuning()
    for name in args.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        rows = measure(workload, names, args.rounds, options, micro_batches=args.accumulate, gradients=args.gradients, kernels=args.breakdown)
        passes = f", {args.accumulate} passes" if args.accumulate > 1 else ""
        text.append(f"## {workload.description}{passes}\n\n{markdown_table(rows, {'route': '', **columns})}")
        print(text[-1], flush=True)
        if args.report:
            print(swcompile.reports()[-1])
        del workload
        gc.collect()
        torch.cuda.empty_cache()
    write(text, args.output)


def version(package: str) -> str:
    """Of an installed package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


if __name__ == "__main__":
    main()
