"""Every linear layer of real models is rewritten, and trains like full precision."""

import model_zoo
import pytest
import torch
from torch import nn

import swcompile
from swcompile import Role
from swcompile.graph import matmuls

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


@pytest.mark.parametrize("name", model_zoo.CASES)
def test_every_linear_layer_is_rewritten(name: str) -> None:
    case = make(name, "cpu", num_layers=2)
    joint = swcompile.capture(case.model, kwargs=case.kwargs)
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
    assert all(d.parameter in dict(case.model.named_parameters(remove_duplicate=False)) for d in decisions if d.role is not Role.OTHER)


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


def run_node_by_node(case: model_zoo.Case) -> torch.Tensor:
    """The loss of the rewritten joint graph; leaves gradients as a backward does."""
    joint = swcompile.capture(LossOf(case))
    joint.run_passes(swcompile.joint_passes(swcompile.make_recipe({"skip_slower": False})))
    (loss,), gradients = joint()
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    for name, gradient in gradients.items():
        parameters[name.removeprefix("model.")].grad = gradient
    return loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", model_zoo.CASES)
def test_gradients_are_close_to_full_precision_and_not_equal(name: str, device: str) -> None:
    case = make(name, device, num_layers=1)
    expected_loss = case.loss()
    expected_loss.backward()
    expected = {k: p.grad.clone() for k, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()

    if device == "cpu" and name not in COMPILED_ON_CPU:
        loss = run_node_by_node(case)
    else:
        compiled = torch.compile(case.model, backend="switchback", fullgraph=True, options={"skip_slower": False})
        loss = case.loss(compiled)
        loss.backward()

    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0)
    assert loss != expected_loss
    for parameter_name, parameter in case.model.named_parameters():
        if parameter_name not in expected:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None and not torch.equal(parameter.grad, expected[parameter_name])
        if not parameter_name.endswith(GRADIENT_IS_ZERO):
            similarity = torch.cosine_similarity(parameter.grad.flatten(), expected[parameter_name].flatten(), dim=0)
            assert similarity > MIN_COSINE, parameter_name
