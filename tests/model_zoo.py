"""Real models, randomly initialised and tiny, each with what to call it with and the counts that a test asserts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

BATCH, LENGTH, WIDTH, VOCABULARY = 4, 64, 64, 96
"""256 tokens: int8 noise flips the sign of some of T5's ReLU inputs, and their gradients need others to average with."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs, and what the rewrite must find in it."""

    model: nn.Module
    kwargs: dict[str, Any]
    num_linears: int
    """Linear layers in the blocks: `output` matmuls to be rewritten."""
    num_heads: int
    """Linear layers before the output, which stay as they are."""
    num_other: int = 0
    """Matmuls of two activations, forward and backward."""
    num_without_grad_input: int = 0
    """Linear layers whose input needs no gradient."""

    def loss(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        result = (self.model if model is None else model)(**self.kwargs)
        if isinstance(result, torch.Tensor):
            target = torch.randn(result.shape, generator=torch.Generator().manual_seed(4)).to(result)
            return (result - target).square().mean()
        return result.loss


def _ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def _images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _block(num_layers: int, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 128}
    return sizes | {"num_hidden_layers": num_layers} | changes


def vit(num_layers: int = 2) -> Case:
    config = transformers.ViTConfig(**_block(num_layers, image_size=32, patch_size=8, num_labels=10))
    model = transformers.ViTForImageClassification(config)
    return Case(model, {"pixel_values": _images(), "labels": torch.arange(BATCH)}, num_linears=6 * num_layers, num_heads=1)


def clip(num_layers: int = 2) -> Case:
    config = transformers.CLIPConfig(
        text_config=_block(
            num_layers, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=2, bos_token_id=1, projection_dim=32
        ),
        vision_config=_block(num_layers, image_size=32, patch_size=8, projection_dim=32),
        projection_dim=32,
    )
    kwargs = {"input_ids": _ids(), "pixel_values": _images(), "return_loss": True}
    # Two projections before the output; the logits are a product of two activations (one forward, two backward).
    return Case(transformers.CLIPModel(config), kwargs, num_linears=12 * num_layers, num_heads=2, num_other=3)


def llama(num_layers: int = 2) -> Case:
    config = transformers.LlamaConfig(**_block(num_layers, num_key_value_heads=2, vocab_size=VOCABULARY))
    kwargs = {"input_ids": _ids(), "labels": _ids(), "use_cache": False}
    return Case(transformers.LlamaForCausalLM(config), kwargs, num_linears=7 * num_layers, num_heads=1)


def gpt2(num_layers: int = 2) -> Case:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=num_layers, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else transformers logs a warning, which breaks the graph
    kwargs = {"input_ids": _ids(), "labels": _ids(), "use_cache": False}
    return Case(model, kwargs, num_linears=4 * num_layers, num_heads=1)


def bert(num_layers: int = 2) -> Case:
    config = transformers.BertConfig(
        **_block(num_layers, vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    kwargs = {"input_ids": _ids(), "labels": _ids()}
    # Six a layer and the transform before the tied decoder.
    return Case(transformers.BertForMaskedLM(config), kwargs, num_linears=6 * num_layers + 1, num_heads=1)


def t5(num_layers: int = 2) -> Case:
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=16, num_layers=num_layers, num_decoder_layers=num_layers, num_heads=4, d_ff=128,
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    kwargs = {"input_ids": _ids(), "labels": _ids(1), "use_cache": False}
    # The position bias needs a gradient, so self-attention is explicit: two products forward and four backward.
    return Case(transformers.T5ForConditionalGeneration(config), kwargs, num_linears=16 * num_layers, num_heads=1, num_other=12 * num_layers)


def torch_encoder(num_layers: int = 2) -> Case:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
    src = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    model = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    return Case(model, {"src": src}, num_linears=4 * num_layers, num_heads=0, num_without_grad_input=1)


class EinsumBlock(nn.Module):
    """A pre-norm block in einsum, with one three-dimensional weight a projection and explicit attention."""

    def __init__(self) -> None:
        super().__init__()
        heads, head_dim = 4, WIDTH // 4
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, heads, head_dim) / 8) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, head_dim, WIDTH) / 8)
        self.up = nn.Parameter(torch.randn(128, WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(WIDTH, 128) / 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (torch.einsum("btd,dhk->bhtk", h, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhtk,bhsk->bhts", q, k).div(4.0).softmax(-1)
        x = x + torch.einsum("bhtk,hkd->btd", torch.einsum("bhts,bhsk->bhtk", weights, v), self.o)
        h = torch.einsum("od,btd->bto", self.up, self.norm2(x))
        return x + nn.functional.gelu(h) @ self.down.T


def einsum(num_layers: int = 2) -> Case:
    model = nn.Sequential(*(EinsumBlock() for _ in range(num_layers)))
    src = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    return Case(model, {"input": src}, num_linears=6 * num_layers, num_heads=0, num_other=6 * num_layers)


CASES: dict[str, Callable[[int], Case]] = {
    case.__name__: case for case in (vit, clip, llama, gpt2, bert, t5, torch_encoder, einsum)
}
"""Name -> function that makes the case, with its weights from the current seed."""
