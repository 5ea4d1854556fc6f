"""The passes that insert stabilisers: the graph before and after, and what is left alone."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import swcompile
from swcompile import (
    LayerScaleOptions,
    Norm,
    Over,
    QKLayernormOptions,
    insert_layer_scale,
    insert_qk_layernorm,
)

WIDTH = 8


class Mlp(nn.Module):
    """A residual branch with a layer of its own, and one in the block's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(x)
        return x + x @ self.weight


class Attention(nn.Module):
    """Attention over two heads, the keys of which are grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand(-1, 2, -1, -1) for t in self.kv(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v)


BEFORE_SCALE = """\
%0: f32[8, 8] = attribute weight
%1: f32[8, 8] = attribute mlp.0.weight
%2: f32[8] = attribute mlp.0.bias
%3: f32[4, 8] = input
%4: f32[4, 8] = aten.linear(%3, %1, %2)
%5: f32[4, 8] = aten.dropout(%4, 0.1, True)
%6: f32[4, 8] = aten.add.Tensor(%3, %5)
%7: f32[4, 8] = aten.matmul(%6, %0)
%8: f32[4, 8] = aten.add.Tensor(%6, %7)
return %8"""
AFTER_SCALE = """\
%0: f32[8, 8] = attribute weight
%1: f32[8, 8] = attribute mlp.0.weight
%2: f32[8] = attribute mlp.0.bias
%3: f32[4, 8] = input
%4: f32[4, 8] = aten.linear(%3, %1, %2)
%5: f32[4, 8] = mlp_layer_scale(%4)
%6: f32[4, 8] = aten.dropout(%5, 0.1, True)
%7: f32[4, 8] = aten.add.Tensor(%3, %6)
%8: f32[4, 8] = aten.matmul(%7, %0)
%9: f32[4, 8] = layer_scale(%8)
%10: f32[4, 8] = aten.add.Tensor(%7, %9)
return %10"""


def test_layer_scale_before_and_after() -> None:
    model, x = Mlp(), torch.randn(4, WIDTH)
    captured = swcompile.capture_forward(model, x)
    assert str(captured) == BEFORE_SCALE
    decisions = captured.run_passes([partial(insert_layer_scale, options=LayerScaleOptions(init=0.5))])
    assert str(captured) == AFTER_SCALE
    assert [d.reason for d in decisions] == ["mlp_layer_scale, starts at 0.5", "layer_scale, starts at 0.5"]
    new = {name: p for name, p in captured.module.named_parameters() if "layer_scale" in name}
    assert {name: p.tolist() for name, p in new.items()} == {
        "mlp_layer_scale.gamma": [0.5] * WIDTH,
        "layer_scale.gamma": [0.5] * WIDTH,
    }
    torch.manual_seed(0)
    actual = captured(x)
    torch.manual_seed(0)
    y = x + F.dropout(0.5 * model.mlp[0](x), 0.1)
    assert torch.equal(actual, y + 0.5 * (y @ model.weight))


AFTER_NORM = """\
%0: f32[8, 8] = attribute q.weight
%1: f32[8, 8] = attribute kv.weight
%2: f32[3, 5, 8] = input
%3: f32[3, 5, 8] = aten.linear(%2, %0)
%4: f32[3, 5, 2, 4] = aten.unflatten.int(%3, -1, [2, -1])
%5: f32[3, 2, 5, 4] = aten.transpose.int(%4, 1, 2)
%6: f32[3, 5, 8] = aten.linear(%2, %1)
%7: (f32[3, 5, 4], f32[3, 5, 4]) = aten.chunk(%6, 2, -1)
%8: f32[3, 5, 4] = getitem(%7, 0)
%9: f32[3, 5, 4] = getitem(%7, 1)
%10: f32[3, 1, 5, 4] = aten.unsqueeze(%8, 1)
%11: f32[3, 1, 5, 4] = k_norm(%10)
%12: f32[3, 2, 5, 4] = aten.expand(%11, [-1, 2, -1, -1])
%13: f32[3, 1, 5, 4] = aten.unsqueeze(%9, 1)
%14: f32[3, 2, 5, 4] = aten.expand(%13, [-1, 2, -1, -1])
%15: f32[3, 2, 5, 4] = q_norm(%5)
%16: f32[3, 2, 5, 4] = aten.scaled_dot_product_attention(%15, %12, %14)
return %16"""


def test_qk_layernorm_before_and_after() -> None:
    captured = swcompile.capture_forward(Attention(), torch.randn(3, 5, WIDTH))
    captured.run_passes([insert_qk_layernorm])
    assert str(captured) == AFTER_NORM
    names = [name for name, _ in captured.module.named_parameters() if "norm" in name]
    assert sorted(names) == ["k_norm.weight", "q_norm.weight"]


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("over", Over)
def test_every_norm_is_that_of_torch(over: Over, norm: Norm) -> None:
    model, x = Attention(), torch.randn(3, 5, WIDTH)
    captured = swcompile.capture_forward(model, x)
    options = QKLayernormOptions(over=over, norm=norm, eps=1e-3)
    captured.run_passes([partial(insert_qk_layernorm, options=options)])
    for parameter in (p for name, p in captured.module.named_parameters() if "norm" in name):
        nn.init.uniform_(parameter, 0.5, 1.5)
    new = dict(captured.module.named_parameters())

    def normalised(name: str, value: torch.Tensor, num_heads: int) -> torch.Tensor:
        heads = value.unflatten(-1, (num_heads, -1)) if over is Over.HEAD else value
        weight, bias = new[f"{name}.weight"], new.get(f"{name}.bias")
        if norm is Norm.RMS:
            heads = F.rms_norm(heads, heads.shape[-1:], weight, 1e-3)
        else:
            heads = F.layer_norm(heads, heads.shape[-1:], weight, bias, 1e-3)
        return heads.unflatten(-1, (num_heads, -1)) if over is Over.MODEL else heads

    assert ("q_norm.bias" in new) == (over is Over.MODEL and norm is Norm.LAYER)
    q = normalised("q_norm", model.q(x), 2).transpose(1, 2)
    k, v = model.kv(x).chunk(2, -1)
    k = normalised("k_norm", k, 1).transpose(1, 2).expand(-1, 2, -1, -1)
    v = v.unsqueeze(1).expand(-1, 2, -1, -1)
    torch.testing.assert_close(captured(x), F.scaled_dot_product_attention(q, k, v))


class SharedKeys(Attention):
    """The keys are the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, *[self.kv(x).unflatten(-1, (2, -1)).transpose(1, 2)] * 2)


def test_values_that_are_the_keys_are_not_normalised() -> None:
    model, x = SharedKeys(), torch.randn(3, 5, WIDTH)
    captured = swcompile.capture_forward(model, x)
    captured.run_passes([insert_qk_layernorm])
    q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (model.q(x), model.kv(x)))
    normed = (F.layer_norm(t, (4,), eps=1e-6) for t in (q, k))
    torch.testing.assert_close(captured(x), F.scaled_dot_product_attention(*normed, k))
    swcompile.prepare(model, x, qk_layernorm=True)
    assert torch.equal(model(x), captured(x))


class ReadHeads(Attention):
    """The heads of the queries are read once more, on the way to the scores."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.q(x).unflatten(-1, (2, -1))
        k, v = (t.unsqueeze(1).expand(-1, 2, -1, -1) for t in self.kv(x).chunk(2, -1))
        return F.scaled_dot_product_attention(heads.transpose(1, 2), k, v) + heads.mean()


@pytest.mark.parametrize("over", Over)
def test_what_else_reads_the_heads_sees_them_as_they_were(over: Over) -> None:
    model, x = ReadHeads(), torch.randn(3, 5, WIDTH)
    plain = Attention()
    plain.load_state_dict(model.state_dict())
    results = []
    for attention in (model, plain):
        captured = swcompile.capture_forward(attention, x)
        captured.run_passes([partial(insert_qk_layernorm, options=QKLayernormOptions(over=over))])
        results.append(captured(x))
    mean = model.q(x).mean()
    assert abs(mean) > 1e-3  # that of normalised queries is 0
    torch.testing.assert_close(results[0], results[1] + mean)


def test_patterns_leave_sites_out() -> None:
    captured = swcompile.capture_forward(Mlp(), torch.randn(4, WIDTH))
    options = LayerScaleOptions(exclude=("mlp.*",))
    decisions = captured.run_passes([partial(insert_layer_scale, options=options)])
    assert [d.rewritten for d in decisions] == [False, True]
    assert decisions[0].reason == "exclude pattern 'mlp.*' matches" and not decisions[0].violation
    assert "mlp_layer_scale" not in str(captured)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerScaleOptions().init = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="eps is 0; it takes a number above 0"):
        QKLayernormOptions(eps=0)
