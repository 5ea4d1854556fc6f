"""Residual branches are found by what is added to what, and to the end of what computes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import swcompile
from swcompile.attention import attentions
from swcompile.residual import Merge, branch_places, merges_of, residual_branches

WIDTH = 8


class Block(nn.Module):
    """Layers, and a forward by a function of (module, input)."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.gamma = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def drop_path(x: torch.Tensor) -> torch.Tensor:
    mask = x.new_empty(x.shape[0], 1).bernoulli_(0.9)
    return x.div(0.9) * mask


def in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    x += m.mlp(x)
    return x


PLACES: dict[str, tuple[Callable[..., torch.Tensor], list[str]]] = {
    "pre-norm": (lambda m, x: x + m.mlp(m.norm(x)), ["down_layer_scale"]),
    "post-norm": (lambda m, x: m.norm(m.mlp(x) + x), ["down_layer_scale"]),
    "norm on the branch": (lambda m, x: x + m.norm(m.mlp(x)), ["norm_layer_scale"]),
    "dropout": (lambda m, x: x + m.dropout(m.mlp(x)), ["down_layer_scale"]),
    "drop-path": (lambda m, x: x + drop_path(m.mlp(x)), ["down_layer_scale"]),
    "views": (lambda m, x: x + m.mlp(x).unsqueeze(0).transpose(0, 1).squeeze(1), ["down_layer_scale"]),
    "scaled skip": (lambda m, x: 0.9 * x + m.mlp(x), ["down_layer_scale"]),
    "parallel": (lambda m, x: m.mlp(x) + m.other(x) + x, ["down_layer_scale", "other_layer_scale"]),
    "parallel, other order": (lambda m, x: x + (m.mlp(x) + m.other(x)), ["down_layer_scale", "other_layer_scale"]),
    "one after the other": (lambda m, x: x + m.mlp(x) + m.other(x), ["down_layer_scale", "other_layer_scale"]),
    "one after the other, dropout": (
        lambda m, x: x + m.dropout(m.mlp(x)) + m.dropout(m.other(x)),
        ["down_layer_scale", "other_layer_scale"],
    ),
    "parallel under a factor": (
        lambda m, x: x + 0.5 * m.dropout(m.mlp(x) + m.other(x)),
        ["down_layer_scale", "other_layer_scale"],
    ),
    "two in a row": (lambda m, x: (y := x + m.mlp(x)) + m.other(m.norm(y)), ["down_layer_scale", "other_layer_scale"]),
    "own code": (lambda m, x: (y := x + m.norm(x) @ m.weight) + y @ m.weight, ["layer_scale", "layer_scale_1"]),
    "in place": (in_place, ["down_layer_scale"]),
    "no linear layer": (lambda m, x: x + m.norm(x).tanh(), []),
    "gelu written out": (lambda m, x: m.other(x * (1 + torch.tanh(x + 0.04 * x**3))), []),
    "not from it": (lambda m, x: m.mlp(x) + m.bias, []),
    "another shape": (lambda m, x: x + m.other(x).mean(-1, keepdim=True), []),
    "minus": (lambda m, x: torch.add(x, m.mlp(x), alpha=-1), []),
}


def branches_of(function: Callable[..., torch.Tensor]) -> tuple[swcompile.ForwardGraph, list[Any]]:
    captured = swcompile.capture_forward(Block(function), torch.randn(4, WIDTH))
    return captured, residual_branches(captured.graph, attentions(captured.graph))


@pytest.mark.parametrize("spelling", PLACES)
def test_places(spelling: str) -> None:
    function, expected = PLACES[spelling]
    _, found = branches_of(function)
    assert branch_places(found) == expected


def test_position_bias_is_no_way_round_attention() -> None:
    """The bias is added to the scores of the second layer, which were computed from it."""
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    embedding = nn.Parameter(torch.randn(4, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.embedding = nn.ModuleList([first, second]), embedding

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.embedding.exp()
            for layer in self.layers:
                y = layer(x)
                x = x + (y @ y.T + bias).softmax(-1) @ y
            return x

    captured = swcompile.capture_forward(Model(), torch.randn(4, WIDTH))
    found = attentions(captured.graph)
    assert len(found) == 2 and len(residual_branches(captured.graph, found)) == 2


def test_a_layer_scale_that_is_there_is_seen() -> None:
    _, (branch,) = branches_of(lambda m, x: x + m.gamma * m.mlp(x))
    assert branch.has_layer_scale
    _, (branch,) = branches_of(lambda m, x: x + m.mlp(x) * m.gamma)
    assert branch.has_layer_scale
    _, (branch,) = branches_of(lambda m, x: x + m.norm(m.mlp(x)))
    assert not branch.has_layer_scale


@pytest.mark.parametrize("spelling", PLACES)
def test_every_branch_of_a_rewritten_graph_is_scaled(spelling: str) -> None:
    function, expected = PLACES[spelling]
    captured, _ = branches_of(function)
    captured.run_passes([swcompile.insert_layer_scale])
    x = torch.randn(4, WIDTH)

    def output() -> torch.Tensor:
        torch.manual_seed(0)  # of dropout
        return captured(x.clone())

    without = output()
    gammas = {name: p for name, p in captured.module.named_parameters() if name.endswith("layer_scale.gamma") or "layer_scale_" in name}
    assert len(gammas) == len(expected)
    for gamma in gammas.values():
        with torch.no_grad():
            gamma.fill_(1.0)
        assert not torch.equal(output(), without)
        with torch.no_grad():
            gamma.zero_()


class Images(nn.Module):
    """Features are the second dimension."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def test_features_that_are_not_last() -> None:
    def moved(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model, x = Images(moved), torch.randn(2, 8, 6, 10)
    swcompile.prepare(model, x, layer_scale=True)
    assert model.linear_layer_scale.gamma.shape == (8,) and torch.equal(model(x), x)
    larger = torch.randn(1, 8, 3, 5)
    assert torch.equal(model(larger), larger)

    def excited(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return x + y * torch.sigmoid(m.linear(y.mean((2, 3))))[:, :, None, None]

    with pytest.raises(ValueError, match="its last dimension does not hold the features"):
        swcompile.prepare(Images(excited), x, layer_scale=True)


MERGES: dict[str, tuple[Callable[..., torch.Tensor], list[Any]]] = {
    "linear": (lambda m, x: x + m.dropout(m.mlp(x)), [Merge(weight="down.weight", feature_dim=0, bias="down.bias")]),
    "addmm": (
        lambda m, x: x + torch.addmm(m.gamma, x, m.weight),
        [Merge(weight="weight", feature_dim=1, bias="gamma")],
    ),
    "norm": (lambda m, x: x + m.norm(m.mlp(x)), ["the branch ends in layer_norm, not in a linear layer"]),
    "shared": (lambda m, x: (y := x + m.other(x)) + m.other(y), ["other.weight has other uses"] * 2),
    "computed": (lambda m, x: x + F.linear(x, m.weight * 2), ["the weight of the branch's last linear layer is computed"]),
}


@pytest.mark.parametrize("case", MERGES)
def test_where_a_gamma_can_be_folded_in(case: str) -> None:
    function, expected = MERGES[case]
    captured, found = branches_of(function)
    assert merges_of(captured, found) == expected
