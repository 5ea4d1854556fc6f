"""Attention is found in every usual spelling, with its queries and keys where heads are split."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import swcompile
from swcompile.attention import Attention, HeadSplit, attentions

BATCH, LENGTH, HEADS, CHANNELS = 2, 6, 4, 8
WIDTH = HEADS * CHANNELS


class Block(nn.Module):
    """Projections of one input, and attention by a function of (module, input)."""

    def __init__(self, attend: Callable[..., torch.Tensor], num_key_heads: int = HEADS):
        super().__init__()
        self.attend = attend
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, num_key_heads * CHANNELS)
        self.v = nn.Linear(WIDTH, num_key_heads * CHANNELS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(CHANNELS)
        self.queries = nn.Parameter(torch.randn(HEADS, LENGTH, CHANNELS))
        self.probe = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.w = nn.Parameter(torch.randn(3, WIDTH, HEADS, CHANNELS))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())
        angle = torch.randn(LENGTH, CHANNELS)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self, x)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, CHANNELS)).transpose(1, 2)


def split(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return heads(m.q(x)), heads(m.k(x)), heads(m.v(x))


def masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m, x)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(CHANNELS) + m.bias
    scores = scores.masked_fill(~m.mask, float("-inf"))
    return F.dropout(scores.float().softmax(-1).to(q.dtype), 0.1) @ v


def folded(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.reshape(BATCH * HEADS, LENGTH, CHANNELS) for t in split(m, x))
    scores = torch.baddbmm(torch.zeros(()), q * 0.3, k.mT, beta=0)
    return torch.bmm(F.softmax(scores, dim=-1), v)


def einsums(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (torch.einsum("btd,dhc->bthc", x, w) for w in m.w)
    return torch.einsum("bhts,bshc->bthc", torch.einsum("bthc,bshc->bhts", q, k).softmax(-1), v)


def rotated(m: Any, x: torch.Tensor) -> torch.Tensor:
    def rotate(t: torch.Tensor) -> torch.Tensor:
        left, right = t.chunk(2, -1)
        return t * m.cos + torch.cat((-right, left), -1) * m.sin

    q, k, v = split(m, x)
    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


def packed(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).reshape(BATCH, LENGTH, 3, HEADS, CHANNELS).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def interleaved(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).view(BATCH, LENGTH, HEADS, 3 * CHANNELS).transpose(1, 2).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


def grouped(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m, x)
    k, v = (t[:, :, None].expand(-1, -1, HEADS // 2, -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def learned(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention that pools: its queries are projections of a parameter."""
    q, k, v = heads(m.q(m.probe.expand(BATCH, -1, -1))), heads(m.k(x)), heads(m.v(x))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def clipped(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m, x)
    return torch.clip(q @ k.mT, -50, 50).softmax(-1).nan_to_num() @ v


NUMBERS = torch.arange(WIDTH).view(HEADS, CHANNELS)
SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor]] = {
    "explicit": (masked, NUMBERS, NUMBERS),
    "folded": (folded, NUMBERS, NUMBERS),
    "einsum": (einsums, NUMBERS, NUMBERS),
    "rotary": (rotated, NUMBERS, NUMBERS),
    "learned queries": (learned, NUMBERS, NUMBERS),
    "clipped": (clipped, NUMBERS, NUMBERS),
    "packed": (packed, NUMBERS, NUMBERS + WIDTH),
    "interleaved": (
        interleaved,
        (torch.arange(HEADS) * 3 * CHANNELS)[:, None] + torch.arange(CHANNELS),
        (torch.arange(HEADS) * 3 * CHANNELS)[:, None] + torch.arange(CHANNELS) + CHANNELS,
    ),
    "grouped": (grouped, NUMBERS, NUMBERS[:2]),
}


def found_in(attend: Callable[..., torch.Tensor], **options: Any) -> list[Attention]:
    captured = swcompile.capture_forward(Block(attend, **options), torch.randn(BATCH, LENGTH, WIDTH))
    return attentions(captured.graph)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_queries_and_keys_are_split_into_heads(spelling: str) -> None:
    attend, query, key = SPELLINGS[spelling]
    (attention,) = found_in(attend, **({"num_key_heads": 2} if spelling == "grouped" else {}))
    for side, columns in ((attention.query, query), (attention.key, key)):
        assert isinstance(side, HeadSplit)
        assert torch.equal(side.columns, columns)
        assert side.value.meta["val"].shape[side.channel_dim] == CHANNELS
        assert math.prod(side.joint.meta["val"].shape[dim] for dim in side.joint_dims) == columns.numel()
        assert side.is_private


def latent(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m, x)
    return F.scaled_dot_product_attention(torch.cat((q, heads(m.v(x))), -1), torch.cat((k, k), -1), v)


WITHOUT = {
    "is normalised already": lambda m, x: F.scaled_dot_product_attention(*(m.norm(t) for t in split(m, x))),
    "comes from no projection": lambda m, x: F.scaled_dot_product_attention(m.queries[None], *split(m, x)[1:]),
    "comes from 2 projections": latent,
    "no dimension has the 8 channels of a head before they are mixed": lambda m, x: F.scaled_dot_product_attention(
        heads(m.q(x).tanh()), *split(m, x)[1:]
    ),
}


@pytest.mark.parametrize("reason", WITHOUT)
def test_why_there_is_no_place_for_a_norm(reason: str) -> None:
    (attention,) = found_in(WITHOUT[reason])
    assert attention.query == reason


def test_features_that_others_read_are_not_private() -> None:
    def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, _ = split(m, x)
        return F.scaled_dot_product_attention(q, k, k)  # the keys are the values

    (attention,) = found_in(shared)
    assert isinstance(attention.query, HeadSplit) and attention.query.is_private
    assert isinstance(attention.key, HeadSplit) and not attention.key.is_private


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, x: m.q(x).softmax(-1) @ m.v(x).mT,  # a router: the softmax is of one projection
        lambda m, x: (m.q(x) @ m.k(x).mT).softmax(-1).sum(),  # nothing is attended to
        lambda m, x: (m.q(x) @ m.k(x).mT) @ m.v(x),  # no softmax
    ],
    ids=["router", "unused", "linear"],
)
def test_what_is_no_attention(attend: Callable[..., torch.Tensor]) -> None:
    assert found_in(attend) == []
