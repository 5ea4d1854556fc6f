"""Speed of one linear layer, forward and backward with all quantisation, against compiled bf16: the paper's figure.

    python benchmarks/layer_speed.py                                    # the layers of well-known models, 32768 tokens
    python benchmarks/layer_speed.py --sweep --plot runs/layer_speed.png

A sweep goes over widths and numbers of tokens, through both layers of an MLP (width -> 4 x width and back). "Rule" is
what the cost rule made of the layer, and "of the better" its time against the faster of bf16 and int8.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_speed import median_ms
from reporting import header, markdown_table, write
from torch import nn

import swcompile

Layer = tuple[int, int, int]
"""In features, out features, tokens."""
LAYERS: list[Layer] = [
    (1280, 5120, 32768), (5120, 1280, 32768), (2048, 8192, 32768), (8192, 2048, 32768), (4096, 16384, 32768),
    (16384, 4096, 32768),
]  # fmt: skip
WIDTHS = [256, 512, 1024, 1280, 2048, 4096, 8192]
TOKENS = [256, 1024, 4096, 16384, 32768, 131072]
EVERYTHING: dict[str, Any] = {"include": "*", "skip_slower": False}
ROUTES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "switchback": EVERYTHING,
    "switchback_full": EVERYTHING | {"recipe": "switchback_full"},
    "rule": {"include": "*"},
}
"""Name -> options of the backend; None is Inductor."""


def make_step(layer: nn.Linear, x: torch.Tensor, gradient: torch.Tensor, options: dict[str, Any] | None) -> Callable[[], None]:
    """Forward and backward of a layer, compiled."""
    torch._dynamo.reset()
    backend = "inductor" if options is None else "switchback"
    compiled = torch.compile(layer, backend=backend, options=options, fullgraph=True, dynamic=False)

    def step() -> None:
        x.grad = layer.weight.grad = None
        compiled(x).backward(gradient)

    return step


def measure(shape: Layer, device: str) -> dict[str, Any]:
    """A row: milliseconds of each route, and what they say."""
    num_in, num_out, tokens = shape
    torch.manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias=False, device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, num_in, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, num_out, device=device, dtype=torch.bfloat16)
    row: dict[str, Any] = {"layer": f"{num_in} -> {num_out}", "tokens": tokens}
    for name, options in ROUTES.items():
        step = make_step(layer, x, gradient, options)
        for _ in range(3):
            step()
        row[name] = median_ms([step])
        if name == "rule":
            row["rewritten"] = swcompile.reports()[-1].num_rewritten()
    return row | verdict(row)


def verdict(row: dict[str, Any]) -> dict[str, float]:
    """Speed-ups over bf16, and the cost rule's time against that of the better of both."""
    return {
        "int8": row["bf16"] / row["switchback"],
        "full": row["bf16"] / row["switchback_full"],
        "of the better": min(row["bf16"], row["switchback"]) / row["rule"],
    }


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
    shapes = LAYERS
    if args.sweep:
        pairs = [(width, tokens) for width in args.widths for tokens in args.tokens]
        shapes = [shape for width, tokens in pairs for shape in ((width, 4 * width, tokens), (4 * width, width, tokens))]
    rows = []
    for shape in shapes:
        rows.append(measure(shape, "cuda"))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    columns = {"layer": "", "tokens": "", "bf16": ".3f", "switchback": ".3f", "switchback_full": ".3f", "rule": ".3f"}
    columns |= {"int8": ".2f", "full": ".2f", "rewritten": "", "of the better": ".2f"}
    text = [
        header("One linear layer: forward and backward"),
        "Milliseconds, and times as fast as bf16 (int8: switchback; full: switchback_full); rule: what the cost rule chose.",
        markdown_table(rows, columns),
    ]
    print("\n\n".join(text))
    write(text, args.output)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
