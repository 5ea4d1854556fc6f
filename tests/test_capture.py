"""What `explain` and `capture` see of a model or function: names, outputs, gradients; and that they change nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import swcompile
from swcompile import Role

WIDTH, TOKENS = 64, 40
EVERY: dict[str, Any] = {"skip_slower": False}


class Towers(nn.Module):
    """Two encoders, each with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return self.image(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode_image(x) @ self.text(x).T


def test_strict_patterns_are_matched_against_the_module_whose_method_is_compiled() -> None:
    model, x = Towers(), torch.randn(TOKENS, WIDTH)
    options = {"include": ["text.*", "image.*"], "strict": True, **EVERY}
    torch.compile(model.encode_image, backend="switchback", options=options)(x)
    report = swcompile.explain(model.encode_image, x, **options)
    assert report.as_dict() == swcompile.reports()[-1].as_dict() and report.num_rewritten(Role.OUTPUT) == 1
    torch._dynamo.reset()
    wrong = {"include": ["txt.*", "image.*"], "strict": True, **EVERY}
    with pytest.raises(Exception, match="pattern 'txt.*' matches no parameter.*closest is 'text.bias'"):
        torch.compile(model.encode_image, backend="switchback", options=wrong)(x)


class Choosing(nn.Module):
    """A layer on each side of a choice, whose branches are graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))


@pytest.mark.parametrize("grad", [True, False])
def test_the_graph_around_a_choice_is_seen(grad: bool) -> None:
    model, x = Choosing(), torch.randn(TOKENS, WIDTH)
    with torch.set_grad_enabled(grad):
        report = swcompile.explain(model, x, include="*", **EVERY)
        torch.compile(model, backend="switchback", options={"include": "*", **EVERY})(x)
    assert report.as_dict() == swcompile.reports()[-1].as_dict()
    assert report.num_rewritten(Role.OUTPUT) == 2 and report.num_rewritten(Role.GRAD_INPUT) == grad


BODY = nn.Linear(WIDTH, WIDTH)


class Listed(nn.Module):
    """Layers in a list, in a dict, and parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.named = {"key": nn.Linear(WIDTH, WIDTH)}
        self.raw = [nn.Parameter(torch.randn(WIDTH, WIDTH))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named["key"](self.layers[1](self.layers[0](x))) @ self.raw[0]


def names_of(model: Callable[..., Any]) -> set[str | None]:
    """Of the weights, as `explain` and as the backend call them."""
    x = torch.randn(TOKENS, WIDTH)
    explained = {d.parameter for d in swcompile.explain(model, x, include="*", **EVERY).decisions}
    torch.compile(model, backend="switchback", options={"include": "*", **EVERY})(x)
    assert {d.parameter for d in swcompile.reports()[-1].decisions} == explained
    return explained


def test_every_parameter_has_a_name_of_its_own() -> None:
    body, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
    first, second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), nn.Sequential(nn.Linear(WIDTH, WIDTH))
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]

    def calling(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: layer(x).relu()

    outer, inner = calling(body), calling(nn.Linear(WIDTH, WIDTH))
    assert names_of(lambda x: head(x)) == {"weight"}
    assert names_of(lambda x: head(body(x).relu())) == {"body.weight", "head.weight"}
    assert names_of(lambda x: head(BODY(x).relu())) == {"BODY.weight", "head.weight"}
    assert names_of(lambda x: second(first(x))) == {"first.0.weight", "second.0.weight"}
    assert names_of(lambda x: head(first(x))) == {"0.weight", "weight"}
    assert names_of(lambda x: layers[1](layers[0](x))) == {"0.weight", "1.weight"}
    assert names_of(lambda x: outer(inner(x))) == {"outer.layer.weight", "inner.layer.weight"}
    assert names_of(lambda x: body(body(x))) == {"weight"}
    assert names_of(Listed()) == {"layers.0.weight", "layers.1.weight", "named.key.weight", "raw.0"}
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tied[1].weight = tied[0].weight
    assert names_of(tied) == {"0.weight"}


def test_capture_gives_the_gradient_of_each_of_two_layers() -> None:
    body, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
    x = torch.randn(TOKENS, WIDTH)
    _, gradients = swcompile.capture(lambda x: head(body(x).relu()), x)()
    head(body(x).relu()).sum().backward()
    expected = {"body.weight": body.weight, "body.bias": body.bias, "head.weight": head.weight, "head.bias": head.bias}
    assert gradients.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_capture_gives_the_models_outputs_and_counts_tangents() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4))
    outputs, gradients = swcompile.capture(model, torch.randn(TOKENS, WIDTH))()
    assert [tuple(out.shape) for out in outputs] == [(TOKENS, 4)] and len(gradients) == 6

    joint = swcompile.capture(lambda x: (BODY(x), BODY(x).sin()), torch.randn(TOKENS, WIDTH))
    tangent = torch.ones(TOKENS, WIDTH)
    for tangents in ((tangent,), (tangent, tangent, tangent)):
        with pytest.raises(ValueError, match=f"{len(tangents)} tangents for a graph with 2 differentiable outputs"):
            joint(*tangents)
    (both, ones) = joint(tangent, tangent)[1], joint()[1]
    assert all(torch.equal(both[name], ones[name]) for name in ones)


def test_explain_of_a_function_keeps_the_buffers_of_the_modules_that_it_calls() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4))
    x = torch.randn(TOKENS, WIDTH)
    state = copy.deepcopy(model.state_dict())
    swcompile.explain(lambda x: model(x), x, **EVERY)
    swcompile.capture(lambda x: model(x), x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(x)
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])
