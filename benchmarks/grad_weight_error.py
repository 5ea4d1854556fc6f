"""What rounding costs the gradient of a weight, on the real activations and gradients of a CLIP in training.

    python benchmarks/grad_weight_error.py --steps 10 100

A small CLIP of examples/train_clip.py is trained on glyphs; then each linear layer's input and output gradient of one
more batch are rounded in every way, and the product is compared with that in float64. "Half the batch" is how far the
gradient of half of the examples is from that of all of them: what stochastic gradient descent lives with anyway. A last
table is of random data that is harder on 8 bit than that.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import header, markdown_table, write
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from clip_model import SIZES, GlyphClip
from clip_training import Settings, build_optimizer, learning_rate
from glyphs import NameTokenizer, render_corpus, unique_name_batches

from swcompile.kernels.formats import E4M3
from swcompile.kernels.int8 import BLOCK_ROWS
from swcompile.kernels.quantize_blockwise import quantize_blockwise_transpose
from swcompile.kernels.quantize_columnwise import quantize_columnwise_transpose
from swcompile.kernels.quantize_rowwise import quantize_rowwise
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise
from swcompile.kernels.scaled_mm_blockwise import scaled_mm_blockwise
from swcompile.kernels.transpose import transpose

Pair = tuple[Tensor, Tensor]


def as_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def as_e4m3_by_channel(x: Tensor) -> Tensor:
    """No kernel here does it."""
    scale = (x.abs().amax(0) / E4M3.max_value).clamp(min=1e-30)
    return ((x / scale).to(E4M3.dtype).float() * scale).double()


def as_int8_by_channel(x: Tensor) -> Tensor:
    q, scale = quantize_columnwise_transpose(x)
    return (q * scale).t().double()


def as_int8_by_block(x: Tensor, rows: int = BLOCK_ROWS) -> Tensor:
    """A scale for each channel and block of tokens: no kernel here does it by itself."""
    return torch.cat([as_int8_by_channel(block) for block in x.split(rows)])


def as_int8_by_tensor(x: Tensor) -> Tensor:
    q, scale = quantize_tensorwise(x)
    return (q * scale).double()


def each(as_rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of a gradient and an activation that are rounded alike."""
    return lambda gradient, x: as_rounded(gradient).t() @ as_rounded(x)


def of_switchback_full(gradient: Tensor, x: Tensor) -> Tensor:
    gradient_q, token_scale = quantize_rowwise(gradient)
    x_q, scale = quantize_blockwise_transpose(x, token_scale)
    return scaled_mm_blockwise(transpose(gradient_q), x_q, scale, torch.float32).double()


def of_switchback_full_from_int8(gradient: Tensor, x: Tensor) -> Tensor:
    """With `save_int8_activations`."""
    gradient_q, token_scale = quantize_rowwise(gradient)
    x_q, x_scale = quantize_rowwise(x)
    x_q, scale = quantize_blockwise_transpose(x_q, token_scale * x_scale)
    return scaled_mm_blockwise(transpose(gradient_q), x_q, scale, torch.float32).double()


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bf16": each(as_bf16),
    "e4m3, a scale a channel": each(as_e4m3_by_channel),
    "int8, a scale a channel (llm_int8)": each(as_int8_by_channel),
    "int8, a scale a channel and block of 1024 tokens": each(as_int8_by_block),
    "int8, a scale a channel and block of 128 tokens": each(partial(as_int8_by_block, rows=128)),
    "int8, by token, activations by channel and block of 1024 (switchback_full)": of_switchback_full,
    "the same, with activations from int8 by token": of_switchback_full_from_int8,
    "int8, a scale a tensor": each(as_int8_by_tensor),
}


def operands_of_one_batch(num_steps: int, seed: int) -> dict[str, Pair]:
    """Layer -> (input [tokens, in], gradient of the output [tokens, out]), after so many steps of training."""
    size = replace(SIZES["tiny"], num_steps=max(num_steps, 2))
    settings = Settings(size=size, seed=seed)
    torch.manual_seed(seed)
    corpus = render_corpus(size.image_size)
    labels = corpus.train.labels
    tokenizer = NameTokenizer([corpus.names[label] for label in labels.unique().tolist()])
    token_ids = tokenizer.encode_all(corpus.names)
    model = GlyphClip(size, tokenizer, token_ids.shape[1])
    optimizer = build_optimizer(model, settings, "stable_adamw")
    batches = unique_name_batches(labels, size.batch_size, seed=seed)

    def backward() -> None:
        glyphs = next(batches)
        model(corpus.train.images[glyphs], token_ids[labels[glyphs]]).backward()

    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size)
        optimizer.zero_grad()
        backward()
        optimizer.step()
        model.clamp_logit_scale()
    inputs: dict[str, Tensor] = {}
    pairs: dict[str, Pair] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach()

        def keep_pair(_: nn.Module, __: Any, gradients: Any) -> None:
            pairs[name] = inputs[name].flatten(0, -2), gradients[0].flatten(0, -2)

        layer.register_forward_pre_hook(keep_input)
        layer.register_full_backward_hook(keep_pair)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            watch(name, layer)
    backward()
    return pairs


def operands_with_outliers(seed: int, num_tokens: int = 32768, width: int = 256) -> dict[str, Pair]:
    """Distribution -> (activation, gradient): 3 % of channels are 20 times larger, and tokens over two decades.

    A part of the gradient is a linear function of the activation, so that the sum over tokens does not vanish.
    """
    torch.manual_seed(seed)

    def uneven(values: Tensor) -> Tensor:
        return values * torch.where(torch.rand(width) < 0.03, 20.0, 1.0) * torch.rand(num_tokens, 1).mul(2).sub(1).mul(math.log(10)).exp()

    shape = num_tokens, width
    distributions: dict[str, Callable[[tuple[int, int]], Tensor]] = {
        "normal": torch.randn,
        "Student's t (3)": torch.distributions.StudentT(3.0).sample,
    }
    pairs = {}
    for name, sample in distributions.items():
        x, noise = uneven(sample(shape)), uneven(sample(shape))
        pairs[name] = x, noise + 0.3 * x @ torch.randn(width, width) / width**0.5
    return pairs


def errors(pairs: dict[str, Pair]) -> list[dict[str, str | float]]:
    """A row a rounding: relative error of the layers' gradients, and the cosine of all of them together."""
    relative: dict[str, list[float]] = defaultdict(list)
    products: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def compare(name: str, gradient: Tensor, exact: Tensor) -> None:
        relative[name].append(float((gradient - exact).norm() / exact.norm()))
        for index, product in enumerate((gradient * exact, gradient * gradient, exact * exact)):
            products[name][index] += float(product.sum())

    for x, gradient in pairs.values():
        exact = gradient.double().t() @ x.double()
        for name, product in PRODUCTS.items():
            compare(name, product(gradient, x), exact)
        half = len(x) // 2
        compare("half the batch, in float64", 2 * gradient[:half].double().t() @ x[:half].double(), exact)
    return [
        {
            "operands": name,
            "median": statistics.median(values),
            "largest": max(values),
            "cosine": products[name][0] / (products[name][1] * products[name][2]) ** 0.5,
        }
        for name, values in relative.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[10, 100], help="of training before the batch (default: 10, and 100)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    parser.add_argument("--output", help="also write the table to this markdown file")
    args = parser.parse_args()
    text = [header("Error of the weight's gradient")]
    columns = {"operands": "", "median": ".4f", "largest": ".4f", "cosine": ".6f"}
    for num_steps in args.steps:
        pairs = operands_of_one_batch(num_steps, args.seed)
        tokens = sorted({len(x) for x, _ in pairs.values()})
        text.append(
            f"Relative error over {len(pairs)} linear layers of a CLIP after {num_steps} steps; sums over {tokens[0]} to "
            f"{tokens[-1]} tokens."
        )
        text.append(markdown_table(errors(pairs), columns))
    for name, pair in operands_with_outliers(args.seed).items():
        text.append(f"Relative error of random data over 32768 tokens: {name}, 3 % of channels 20 times larger, tokens over two decades.")
        text.append(markdown_table(errors({name: pair}), {"operands": "", "median": ".4f", "cosine": ".6f"}).replace("median", "error ", 1))
    print("\n\n".join(text))
    write(text, args.output)


if __name__ == "__main__":
    main()
