"""The captured forward computes what the module does, and knows which module made each value."""

import model_zoo
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import swcompile
from swcompile.forward import called_in


@pytest.mark.parametrize("name", model_zoo.CASES)
def test_it_computes_what_the_model_does_with_the_models_own_parameters(name: str) -> None:
    case = model_zoo.CASES[name](1)
    captured = swcompile.capture_forward(case.model, kwargs=case.kwargs)
    expected = case.model(**case.kwargs)
    actual = captured(**case.kwargs)
    assert type(actual) is type(expected)
    for ours, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs)
    own = dict(case.model.named_parameters(remove_duplicate=False))
    assert all(parameter is own[key] for key, parameter in captured.module.named_parameters())


class Twice(nn.Module):
    """One layer called twice, one that returns two values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.gru = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        x = self.layer(self.layer(x).relu())
        return {"out": self.gru(x, x, x)[0], "name": "twice"}


def test_calls_and_what_they_return() -> None:
    model, x = Twice(), torch.randn(4, 8)
    captured = swcompile.capture_forward(model, x)
    linears = [called_in(node) for node in captured.graph.nodes if node.target == torch.ops.aten.linear.default]
    assert linears[:2] == ["layer", "layer@1"] and set(linears[2:]) == {"gru"}
    assert captured.tensor_modules == {"layer"}
    result = captured(x)
    assert result["name"] == "twice" and torch.equal(result["out"], model(x)["out"])


def test_dynamic_sizes_stay_free() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(1))
    captured = swcompile.capture_forward(model, torch.randn(4, 3, 8), dynamic=True)
    x = torch.randn(7, 5, 8)
    assert torch.equal(captured(x), model(x))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_forward_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branching()))
    with pytest.raises(ValueError, match=r"forward of Sequential\.1\.1 cannot be traced: GuardOnDataDependent"):
        swcompile.capture_forward(model, torch.randn(2, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
