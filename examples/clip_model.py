"""The CLIP of `train_clip.py`: Hugging Face's model at several sizes, its loss, and zero-shot classification."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from glyphs import NameTokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """One of the two transformers."""

    width: int
    num_layers: int
    num_heads: int

    def as_config(self) -> dict[str, int]:
        """The fields that the configurations of both towers share."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSize:
    """Dimensions of a CLIP, with the training schedule that suits it."""

    vision: Tower
    text: Tower
    embed_dim: int
    image_size: int
    patch_size: int
    batch_size: int
    num_steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: got {self.patch_size}, wanted a divisor of the image size, {self.image_size}"
            )


SIZES = {
    "tiny": ClipSize(
        vision=Tower(width=192, num_layers=2, num_heads=3),
        text=Tower(width=128, num_layers=2, num_heads=2),
        embed_dim=128,
        image_size=32,
        patch_size=8,
        batch_size=128,
        num_steps=300,
        learning_rate=1e-3,
    ),
    "small": ClipSize(
        vision=Tower(width=384, num_layers=12, num_heads=6),
        text=Tower(width=256, num_layers=6, num_heads=4),
        embed_dim=256,
        image_size=32,
        patch_size=4,
        batch_size=1024,
        num_steps=2000,
        learning_rate=5e-4,
    ),
    "base": ClipSize(
        vision=Tower(width=768, num_layers=12, num_heads=12),
        text=Tower(width=512, num_layers=12, num_heads=8),
        embed_dim=512,
        image_size=64,
        patch_size=8,
        batch_size=1024,
        num_steps=2000,
        learning_rate=3e-4,
    ),
    "large": ClipSize(
        vision=Tower(width=1024, num_layers=24, num_heads=16),
        text=Tower(width=768, num_layers=12, num_heads=12),
        embed_dim=768,
        image_size=112,
        patch_size=14,
        batch_size=512,
        num_steps=2000,
        learning_rate=2e-4,
    ),
    "huge": ClipSize(
        vision=Tower(width=1280, num_layers=32, num_heads=16),
        text=Tower(width=1024, num_layers=24, num_heads=16),
        embed_dim=1024,
        image_size=224,
        patch_size=14,
        batch_size=128,
        num_steps=2000,
        learning_rate=1e-4,
    ),
}
"""From seconds a step on a laptop to the ViT-H/14 of the SwitchBack paper."""


class GlyphClip(nn.Module):
    """A CLIP that takes grey uint8 images and token ids, and returns its contrastive loss."""

    def __init__(self, size: ClipSize, tokenizer: NameTokenizer, context_length: int) -> None:
        super().__init__()
        self.clip = CLIPModel(
            CLIPConfig(
                vision_config={
                    **size.vision.as_config(),
                    "image_size": size.image_size,
                    "patch_size": size.patch_size,
                    "num_channels": 1,
                },
                text_config={
                    **size.text.as_config(),
                    "vocab_size": tokenizer.vocab_size,
                    "max_position_embeddings": context_length,
                    "pad_token_id": tokenizer.pad_id,
                    "bos_token_id": tokenizer.bos_id,
                    "eos_token_id": tokenizer.eos_id,
                },
                projection_dim=size.embed_dim,
            )
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors, float32 [batch, embed_dim], of uint8 images [batch, height, width]."""
        pixel_values = images.unsqueeze(1).float() / 127.5 - 1
        features = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        return F.normalize(features.float(), dim=-1)

    def encode_names(self, token_ids: Tensor) -> Tensor:
        """Unit vectors, float32 [batch, embed_dim], of padded token ids [batch, context_length]."""
        features = self.clip.get_text_features(input_ids=token_ids).pooler_output
        return F.normalize(features.float(), dim=-1)

    def forward(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """The symmetric contrastive loss: image i belongs to text i. In float32 also under autocast."""
        image_features = self.encode_images(images)
        text_features = self.encode_names(token_ids)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.clip.logit_scale.exp() * (image_features @ text_features.T)
            targets = torch.arange(len(images), device=images.device)
            return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale, a logarithm, in the bounds of the CLIP papers: factors of 1 to 100."""
        self.clip.logit_scale.clamp_(0, math.log(100))


def encode_in_batches(encode: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> Tensor:
    """`encode` of all rows, in batches of one size; the last is padded by repeating its last row."""
    features = []
    for batch in inputs.split(batch_size):
        padding = batch[-1:].expand(batch_size - len(batch), *batch.shape[1:])
        features.append(encode(torch.cat([batch, padding]))[: len(batch)])
    return torch.cat(features)


def zero_shot_accuracy(image_features: Tensor, text_features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of picking each image's name among all names by cosine similarity."""
    ranked = (image_features @ text_features.T).topk(5, dim=1).indices
    hits = ranked == labels.unsqueeze(1)
    return hits[:, 0].float().mean().item(), hits.any(dim=1).float().mean().item()
