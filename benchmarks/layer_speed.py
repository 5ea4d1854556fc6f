"""Speed of one linear layer, forward and backward with all quantisation, against compiled bf16: the paper's figure.

    python benchmarks/layer_speed.py                                    # the layers of well-known models, 32768 tokens
    python benchmarks/layer_speed.py --sweep --plot runs/layer_speed.png

A sweep goes over widths and numbers of tokens, through both layers of an MLP (width -> 4 x width and back). It shows
what the cost rule makes of the two eligible matmuls of a layer, a frozen one: each in bf16 and in int8, and which of the
two the rule finds to be faster on the device, as these times leave out what the host takes to launch. The rule's
choice is held against the best of all four: none of them in int8, one, the other, both, where they share a scale.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_speed import median_ms, samples_ms
from reporting import header, markdown_table, write
from torch import nn

import swcompile
from swcompile.cost import MIN_SPEEDUP

Layer = tuple[int, int, int]
"""In features, out features, tokens."""
LAYERS: list[Layer] = [
    (1280, 5120, 32768), (5120, 1280, 32768), (2048, 8192, 32768), (8192, 2048, 32768), (4096, 16384, 32768),
    (16384, 4096, 32768),
]  # fmt: skip
WIDTHS = [256, 512, 1024, 1280, 2048, 4096, 8192]
TOKENS = [256, 1024, 4096, 16384, 32768, 131072]
EVERYTHING: dict[str, Any] = {"include": "*", "skip_slower": False}
OWN_SCALES = EVERYTHING | {"micro_batches": 2}
"""Every matmul finds the scale of its weight itself: outside of `gradient_accumulation` nothing is kept."""
INT8 = "switchback", EVERYTHING
FULL = "switchback_full", EVERYTHING | {"recipe": "switchback_full"}
"""A name, and options of the backend."""
ON_DEVICE: dict[str, Any] = {"include": "*", "mode": "reduce-overhead"}
"""For `explain`: what the cost rule chooses where a CUDA graph launches."""
RULE_COLUMNS = {"x": ".2f", "by the rule": ".2f"}
ROLES = swcompile.Role.OUTPUT, swcompile.Role.GRAD_INPUT


def compiled(layer: nn.Linear, options: dict[str, Any] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer, compiled; without options by Inductor alone."""
    torch._dynamo.reset()
    backend = "inductor" if options is None else "switchback"
    return torch.compile(layer, backend=backend, options=options, fullgraph=True, dynamic=False)


def training_ms(layer: nn.Linear, x: torch.Tensor, gradient: torch.Tensor, options: dict[str, Any] | None) -> float:
    """Milliseconds of forward and backward."""
    forward = compiled(layer, options)

    def step() -> None:
        x.grad = layer.weight.grad = None
        forward(x).backward(gradient)

    return median_ms([step])


def role_ms(layer: nn.Linear, x: torch.Tensor, gradient: torch.Tensor, options: dict[str, Any] | None) -> list[float]:
    """Milliseconds of the forward and of the backward of a frozen layer: of `output` and of `grad_input`."""
    frozen, results = compiled(layer, options), []

    def forward() -> None:
        x.grad = None
        results.append(frozen(x))

    samples = samples_ms([forward, lambda: results.pop().backward(gradient)], 60)
    return [statistics.median(samples[start::2]) for start in range(2)]


def measure(shape: Layer, routes: Sequence[tuple[str, dict[str, Any]]], *, apart: bool) -> dict[str, Any]:
    """A row: milliseconds of each route and its speed-up over bf16; with `apart` also what the rule made of each matmul."""
    num_in, num_out, tokens = shape
    torch.manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, num_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, num_out, device="cuda", dtype=torch.bfloat16)
    row: dict[str, Any] = {"layer": f"{num_in} -> {num_out}", "tokens": tokens}
    row["bf16"] = training_ms(layer, x, gradient, None)
    for name, options in routes:
        row[name] = training_ms(layer, x, gradient, options)
        row[f"{name} x"] = row["bf16"] / row[name]
    if apart:
        layer.requires_grad_(False)
        plain, int8, alone = (role_ms(layer, x, gradient, options) for options in (None, EVERYTHING, OWN_SCALES))
        decisions = {decision.role: decision for decision in swcompile.explain(layer, x, **ON_DEVICE).decisions}
        for i, role in enumerate(ROLES):
            row[f"{role.value} x"] = plain[i] / int8[i]
            row[f"{role.value} by the rule"] = decisions[role].speedup
        times = {
            (False, False): sum(plain),
            (True, False): alone[0] + plain[1],
            (False, True): plain[0] + alone[1],
            (True, True): sum(int8),
        }
        choice = decisions[ROLES[0]].rewritten, decisions[ROLES[1]].rewritten
        row["of the best"] = min(times.values()) / times[choice]
    return row


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up of both layers of an MLP together over its width, a line for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for tokens in sorted({row["tokens"] for row in rows}):
        times: dict[int, tuple[float, float]] = {}
        for row in rows:
            if row["tokens"] == tokens:
                width = min(int(size) for size in row["layer"].split(" -> "))
                bf16, int8 = times.get(width, (0.0, 0.0))
                times[width] = bf16 + row["bf16"], int8 + row["switchback"]
        widths = sorted(times)
        axes.plot(widths, [times[width][0] / times[width][1] for width in widths], marker="o", label=f"{tokens:,} tokens")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set(xlabel="width", ylabel="times as fast as bf16", title="SwitchBack: both linear layers of an MLP, forward and backward")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="over widths and tokens")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of a sweep")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a sweep")
    parser.add_argument("--plot", type=Path, help="write the speed-ups of a sweep to this picture")
    parser.add_argument("--output", help="also write the table to this markdown file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if args.plot and not args.sweep:
        parser.error("--plot shows a sweep: give --sweep, too")
    if args.sweep:
        pairs = [(width, tokens) for width in args.widths for tokens in args.tokens]
        shapes = [
            shape
            for width, tokens in pairs
            for shape in ((width, 4 * width, tokens), (4 * width, width, tokens))
        ]
        routes = [INT8]
    else:
        shapes, routes = LAYERS, [INT8, FULL]
    rows = []
    for shape in shapes:
        rows.append(measure(shape, routes, apart=args.sweep))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    columns = {"layer": "", "tokens": "", "bf16": ".3f"}
    for name, _ in routes:
        columns |= {name: ".3f", f"{name} x": ".2f"}
    note = "Milliseconds, and times as fast as bf16 (x)."
    if args.sweep:
        columns |= {f"{role.value} {what}": form for role in ROLES for what, form in RULE_COLUMNS.items()} | {"of the best": ".2f"}
        note += (
            " Of each matmul: how much faster int8 is, where the output bears what finds the weight's scale for both, and how much by the "
            "rule, by which who gains more bears more of it. The rule predicts this, times it itself where that is near 1, and chooses "
            f"int8 at {MIN_SPEEDUP} or more. Of the layer, the best time of all choices over that of the rule's."
        )
    text = [header("One linear layer: forward and backward"), note, markdown_table(rows, columns)]
    print("\n\n".join(text))
    write(text, args.output)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
