"""Every linear layer of real models is rewritten, and trains like full precision."""

import model_zoo
import pytest
import torch
from torch import nn

import swcompile
from swcompile import Role
from swcompile.graph import matmuls

MIN_COSINE = 0.99
"""Of a parameter's gradient to full precision; int8 noise of 1 % a matmul leaves it well above."""

GRADIENT_IS_ZERO = ("k_proj.bias", "key.bias")
"""A key bias adds the same to all scores of a query, which softmax takes away: its gradient is rounding alone."""


def make(name: str, device: str, num_layers: int) -> model_zoo.Case:
    torch.manual_seed(0)
    case = model_zoo.CASES[name](num_layers)
    case.model.to(device)
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.kwargs.items()}
    return model_zoo.dataclasses.replace(case, kwargs=kwargs)


COMPILED_ON_CPU = ("vit", "llama", "torch_encoder", "einsum")
"""Compiling C++ takes most of a test's time; of the other models the same graphs run node by node on a CPU."""


class LossOf(nn.Module):
    """A case's loss as the one output of a module."""

    def __init__(self, case: model_zoo.Case):
        super().__init__()
        self.model = case.model
        self.case = case

    def forward(self) -> torch.Tensor:
        return self.case.loss(self.model)


@pytest.mark.parametrize("name", model_zoo.CASES)
def test_every_linear_layer_is_rewritten(name: str) -> None:
    """Of the models that are compiled below, no gradient is computed here."""
    case, compiles = make(name, "cpu", num_layers=2), name in COMPILED_ON_CPU
    module = case.model if compiles else LossOf(case)
    joint = swcompile.capture(module, kwargs=case.kwargs if compiles else {})
    before = matmuls(joint.graph)
    # Rotary embedding's outer product (K = 1) is a matmul in some versions of transformers.
    num_outer = sum(m.role is Role.OTHER and m.shape[2] == 1 for m in before)
    assert sum(m.role is Role.OTHER for m in before) - num_outer == case.num_other
    decisions = joint.run_passes(swcompile.joint_passes(swcompile.make_recipe({"skip_slower": False})))

    after = matmuls(joint.graph)
    num_grad_inputs = case.num_linears - case.num_without_grad_input
    expected = {Role.OUTPUT: case.num_linears, Role.GRAD_INPUT: num_grad_inputs, Role.GRAD_WEIGHT: 0, Role.OTHER: 0}
    assert {role: sum(m.role is role and m.number_format is not None for m in after) for role in Role} == expected
    plain = {role: sum(m.role is role and not m.number_format for m in after) for role in Role}
    assert plain[Role.OUTPUT] == plain[Role.GRAD_INPUT] == case.num_heads
    assert plain[Role.GRAD_WEIGHT] == case.num_linears + case.num_heads
    assert plain[Role.OTHER] == case.num_other + num_outer
    parameters = dict(module.named_parameters(remove_duplicate=False))
    assert all(d.parameter in parameters for d in decisions if d.role is not Role.OTHER)

    if not compiles:
        exact_loss = case.loss()
        exact = gradients(case, exact_loss)
        (loss,), found = joint()
        for parameter_name, gradient in found.items():
            parameters[parameter_name].grad = gradient
        assert_close_and_different(case, loss, exact_loss, exact)


def gradients(case: model_zoo.Case, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss, by parameter; none is left behind."""
    loss.backward()
    found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    return found


def assert_close_and_different(
    case: model_zoo.Case, loss: torch.Tensor, exact_loss: torch.Tensor, exact: dict[str, torch.Tensor]
) -> None:
    """The loss and the gradients that it has left are those of full precision within the noise of int8, and have some."""
    torch.testing.assert_close(loss, exact_loss, rtol=0.02, atol=0)
    assert loss != exact_loss
    for name, parameter in case.model.named_parameters():
        if name not in exact:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None and not torch.equal(parameter.grad, exact[name])
        if not name.endswith(GRADIENT_IS_ZERO):
            assert torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0) > MIN_COSINE, name


COMPILED = [("cpu", name) for name in COMPILED_ON_CPU]
COMPILED_ON_GPU = [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in model_zoo.CASES]


@pytest.mark.parametrize(("device", "name"), [*COMPILED, *COMPILED_ON_GPU])
def test_gradients_are_close_to_full_precision_and_not_equal(name: str, device: str) -> None:
    case = make(name, device, num_layers=1)
    exact_loss = case.loss()
    exact = gradients(case, exact_loss)
    compiled = torch.compile(case.model, backend="switchback", fullgraph=True, options={"skip_slower": False})
    loss = case.loss(compiled)
    loss.backward()
    assert_close_and_different(case, loss, exact_loss, exact)
