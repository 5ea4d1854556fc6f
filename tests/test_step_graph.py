"""The emitted step: what it shows, and what it is lowered to."""

import pytest
import torch
from torch import nn

import swcompile
from swcompile import StableAdamW
from swcompile.kernels.stable_adamw import (
    SECOND_MOMENT_RATIOS,
    SECOND_MOMENT_RATIOS_OF_TABLE,
    STABLE_ADAMW_UPDATE,
    STABLE_ADAMW_UPDATE_OF_TABLE,
)
from swcompile.optim.step_graph import Bucket, emit_step, lower_to_tables

FLOAT = Bucket(
    name="float32",
    num_tensors=3,
    param_dtype=torch.float32,
    grad_dtype=torch.float32,
    is_aligned=True,
    has_remainders=False,
)
SHARDED = Bucket(
    name="bfloat16",
    num_tensors=2,
    param_dtype=torch.bfloat16,
    grad_dtype=torch.bfloat16,
    is_aligned=False,
    has_remainders=True,
    process_groups=("data", "model"),
)
ALSO_SHARDED = Bucket(
    name="float32_2",
    num_tensors=4,
    param_dtype=torch.float32,
    grad_dtype=torch.float32,
    is_aligned=True,
    has_remainders=False,
    process_groups=("data", "model"),
)


def targets(graph: torch.fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def test_a_pair_of_ops_a_bucket_however_many_tensors() -> None:
    sizes = []
    for num_tensors in (2, 40):
        params = [nn.Parameter(torch.randn(3, 2)) for _ in range(num_tensors)]
        graph = StableAdamW(params).graph()
        assert targets(graph) == [SECOND_MOMENT_RATIOS, STABLE_ADAMW_UPDATE]
        sizes.append(len(graph.nodes))
        text = swcompile.format_graph(graph)
        assert f": {num_tensors} x float32 = input float32_params\n" in text
        assert f"f64[{num_tensors}] = swcompile.second_moment_ratios(" in text
        assert "?" not in text
    assert sizes[0] == sizes[1] < 80


def test_without_clipping_and_skipping_there_is_one_pass() -> None:
    graph = StableAdamW([nn.Parameter(torch.ones(2))], clip_threshold=None, skip_nonfinite=False).graph()
    assert targets(graph) == [STABLE_ADAMW_UPDATE]


def test_graph_and_step_are_of_the_same_buckets() -> None:
    params = [nn.Parameter(torch.randn(2, 2).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    optimizer = StableAdamW(params)
    text = swcompile.format_graph(optimizer.graph())
    assert "2 x float32 = input float32_params" in text and "1 x int16 = input bfloat16_remainders" in text
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert swcompile.format_graph(optimizer.graph()) == text


def test_one_collective_for_all_that_is_sharded_alike() -> None:
    graph = emit_step([FLOAT, SHARDED, ALSO_SHARDED], num_groups=1, with_ratios=True)
    reductions = [node for node in graph.nodes if node.target is torch.ops._c10d_functional.all_reduce.default]
    assert [node.args[2] for node in reductions] == ["data", "model"]
    assert all(node.meta["val"].shape == (6,) for node in reductions)
    (split,) = (node for node in graph.nodes if node.target == "split")
    assert split.args[1] == [2, 4]


@pytest.mark.parametrize("with_ratios", [True, False])
def test_lowering(with_ratios: bool) -> None:
    graph = emit_step([FLOAT, SHARDED], num_groups=2, with_ratios=with_ratios)
    before = str(graph)
    lowered = lower_to_tables(graph)
    assert str(graph) == before
    expected = [STABLE_ADAMW_UPDATE_OF_TABLE] * 2
    if with_ratios:
        expected = [SECOND_MOMENT_RATIOS_OF_TABLE] * 2 + expected
    assert [target for target in targets(lowered) if "c10d" not in str(target)] == expected
    names = {node.name for node in lowered.find_nodes(op="placeholder")}
    assert {"float32_addresses", "float32_first_chunks", "bfloat16_chunks", "bfloat16_num_elements"} <= names
    assert not any(name.endswith(("params", "grads", "exp_avgs", "exp_avg_sqs", "remainders")) for name in names)
    update = next(node for node in lowered.nodes if node.name == "bfloat16_update")
    assert update.args[-4:] == (torch.bfloat16, torch.bfloat16, False, True)
