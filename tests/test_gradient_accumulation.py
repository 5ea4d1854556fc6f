"""Within `gradient_accumulation` a weight is quantised once: the same bits, and never from what it was before."""

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
import torch.distributed as dist
from partition import run_partitioned
from processes import leave, run_in_processes
from test_backend import EVERY, TOKENS, WIDTH, Block, Model
from test_cost import RATES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import Role, cost
from swcompile.cost import Candidate, predict_speedups
from swcompile.kernels import held_weights
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise
from swcompile.kernels.scaled_mm_held import WEIGHT_QUANTIZERS, scaled_mm_held

OPTIONS: dict[str, Any] = {**EVERY, "micro_batches": 3, "inductor": {"deterministic": True}}
"""Inductor else times several ways to sum on a GPU, and takes one or the other in two compilations."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_LAYERS = 4  # of `Model`, each with an output and a grad_input


def make(device: str = "cpu", **options: Any) -> tuple[nn.Module, Callable[..., torch.Tensor], torch.Tensor]:
    """(model, the same compiled, three micro-batches)."""
    torch.manual_seed(0)
    model = Model(num_blocks=2).to(device)
    compiled = torch.compile(model, backend="switchback", options=OPTIONS | options)
    return model, compiled, torch.randn(3, TOKENS, WIDTH, device=device)


def gradients(
    model: nn.Module, compiled: Callable[..., torch.Tensor], batches: torch.Tensor, between: Callable[[], object] = lambda: None
) -> list[torch.Tensor]:
    """Of all parameters, summed over the micro-batches."""
    model.zero_grad()
    for number, batch in enumerate(batches):
        if number:
            between()
        compiled(batch.requires_grad_()).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["switchback", "switchback_m", "switchback_q"])
def test_the_same_bits_from_weights_that_are_quantised_once(recipe: str, device: str) -> None:
    model, compiled, batches = make(device, recipe=recipe)
    num_matmuls = 2 * NUM_LAYERS
    expected = gradients(model, compiled, batches)
    with swcompile.gradient_accumulation() as counts:
        actual = gradients(model, compiled, batches)
        assert (counts.quantized, counts.reused) == (num_matmuls, 2 * num_matmuls)
    assert_same(actual, expected)
    with swcompile.gradient_accumulation() as counts, swcompile.gradient_accumulation() as inner:
        assert inner is counts
        gradients(model, compiled, batches[:1])
    assert counts.quantized == num_matmuls, "nothing is kept from one block to the next"
    torch._dynamo.reset()
    one = torch.compile(model, backend="switchback", options=OPTIONS | {"micro_batches": 1, "recipe": recipe})
    assert_same(gradients(model, one, batches), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_real_models(name: str) -> None:
    """GPT-2's graphs run node by node: compiling C++ takes most of a test's time."""
    torch.manual_seed(0)
    case, options = model_zoo.CASES[name](1), EVERY | {"micro_batches": 2}
    if name == "llama":
        compiled = torch.compile(case.model, backend="switchback", options=options)
    else:
        passes = swcompile.joint_passes(swcompile.make_recipe(options))
        compiled = torch.compile(case.model, backend=partial(run_partitioned, passes=passes, make_call=call_holding))
    tables = {p for module in case.model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}

    def accumulated() -> list[torch.Tensor]:
        case.model.zero_grad()
        for _ in range(2):
            case.loss(compiled).backward()
        # Gradients of embeddings are summed in no fixed order.
        return [parameter.grad.clone() for parameter in case.model.parameters() if parameter not in tables]

    expected = accumulated()
    with swcompile.gradient_accumulation() as counts:
        assert_same(accumulated(), expected)
    num_matmuls = 2 * case.num_linears - case.num_without_grad_input
    assert counts.quantized == counts.reused == num_matmuls


def call_holding(part: torch.fx.GraphModule) -> Callable[..., Any]:
    assert swcompile.hold_weights(part.graph).rewrites > 0
    part.recompile()
    return part.forward


def scale_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def swap_data(model: nn.Module) -> None:
    """Twice: what the weight was is freed, and its memory may be what comes next."""
    for parameter in model.parameters():
        for factor in (3.0, 0.5):
            parameter.data = parameter.data * factor


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def step(model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer(model.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "in-place": scale_in_place,
    "data": swap_data,
    "load_state_dict": load,
    "AdamW": partial(step, optimizer=torch.optim.AdamW),
    "fused AdamW": partial(step, optimizer=partial(torch.optim.AdamW, fused=True)),
    "StableAdamW": partial(step, optimizer=swcompile.StableAdamW),
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_that_changes_is_quantised_again(device: str) -> None:
    model, compiled, batches = make(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    stale = gradients(model, compiled, batches)
    for name, change in CHANGES.items():
        model.load_state_dict(start)
        expected = gradients(model, compiled, batches, partial(change, model))
        model.load_state_dict(start)
        with swcompile.gradient_accumulation() as counts:
            actual = gradients(model, compiled, batches, partial(change, model))
        assert all(map(torch.equal, actual, expected)), name
        assert counts.reused == 0 and not torch.equal(stale[0], expected[0]), name


def test_a_weight_that_did_not_change_is_still_there() -> None:
    model, compiled, batches = make()

    def change_one() -> None:
        with torch.no_grad():
            model.get_parameter("blocks.0.up.weight").add_(0.01)

    with swcompile.gradient_accumulation() as counts:
        gradients(model, compiled, batches, change_one)
    assert (counts.quantized, counts.reused) == (2 * NUM_LAYERS + 2 * 2, 2 * (2 * NUM_LAYERS - 2))


def test_what_is_held_is_let_go() -> None:
    weight = torch.randn(8, 16)
    op = WEIGHT_QUANTIZERS["quantize_tensorwise"]
    with pytest.raises(KeyError), swcompile.gradient_accumulation():
        first, _ = held_weights.quantized_weight(weight, op)
        again, _ = held_weights.quantized_weight(weight, op)
        assert again is first
        result = weakref.ref(first)
        del first, again
        for _ in range(3):
            held_weights.quantized_weight(torch.randn(8, 16), op)
        assert len(held_weights._held) == 2, "the copy of a weight that is gone goes when the next one comes"
        raise KeyError
    gc.collect()
    assert result() is None and held_weights._current is None and not held_weights._held
    first, again = (held_weights.quantized_weight(weight, op)[0] for _ in range(2))
    assert first is not again


def test_inference_tensors_are_not_held() -> None:
    with torch.inference_mode():
        weight = torch.randn(8, 16)
        with swcompile.gradient_accumulation() as counts:
            for factor in (1.0, 2.0):
                weight.mul_(factor)
                _, scale = held_weights.quantized_weight(weight, WEIGHT_QUANTIZERS["quantize_tensorwise"])
                assert torch.equal(scale, quantize_tensorwise(weight)[1])
    assert (counts.quantized, counts.reused) == (2, 0)


def test_an_empty_block_is_a_warning() -> None:
    model, _, batches = make()
    plain = torch.compile(model, backend="switchback", options=EVERY)
    with pytest.warns(UserWarning, match="no matmul asked for a weight to hold.*micro_batches"), swcompile.gradient_accumulation():
        gradients(model, plain, batches)


def test_the_pass_in_the_graph() -> None:
    torch.manual_seed(0)
    recipe = swcompile.make_recipe(EVERY | {"include": "*"})
    with torch.no_grad():
        joint = swcompile.capture(nn.Linear(64, 128), torch.randn(32, 64))
    x, parameters = torch.randn(32, 64), [torch.randn(128, 64), torch.randn(128)]
    joint.run_passes(swcompile.joint_passes(recipe))
    (expected,) = fx_call(joint, parameters, x)
    joint.run_passes([swcompile.hold_weights])
    text = swcompile.format_graph(joint.graph)
    assert "quantize_tensorwise(" not in text
    assert re.search(r"swcompile\.scaled_mm_held\(%\d, %\d, %0, quantize_tensorwise, %1, f32\)", text)
    assert torch.equal(fx_call(joint, parameters, x)[0], expected)


def fx_call(joint: swcompile.JointGraph, parameters: list[torch.Tensor], x: torch.Tensor) -> Any:
    module = torch.fx.GraphModule(nn.Module(), joint.graph)
    return module(*parameters, x)


class Twice(nn.Module):
    """One weight for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x).relu())


class Halves(nn.Module):
    """One weight of which two layers have a part each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.weight.chunk(2)
        return (x @ up.t()) * (x @ gate.t())


class OnTheLeft(nn.Module):
    """A weight that is the first operand where its rows have scales of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x.t()


@pytest.mark.parametrize(("kind", "recipe"), [(Twice, "switchback"), (Halves, "switchback"), (OnTheLeft, "switchback_q")])
def test_other_weights_are_quantised_in_every_pass(kind: type[nn.Module], recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cost rule counts the whole of it."""
    model, x, options = kind(), torch.randn(16, 32), {"include": "*", "recipe": recipe}
    with torch.no_grad():
        joint = swcompile.capture(model, x)
    joint.run_passes(swcompile.joint_passes(swcompile.make_recipe(options | EVERY)))
    assert swcompile.hold_weights(joint.graph).rewrites == 0
    monkeypatch.setattr(cost, "device_rates", lambda *of: RATES)
    speedups = [
        [d.speedup for d in swcompile.explain(model, x, **options, micro_batches=number).decisions if d.role is Role.OUTPUT]
        for number in (2, 100)
    ]
    assert speedups[0] == speedups[1] and None not in speedups[0]


def test_checkpointing_around_the_compiled_model() -> None:
    """Its backward gets an alias of each weight, a new one each time."""
    model, compiled, batches = make()
    call = partial(checkpoint, compiled, use_reentrant=False)
    expected = gradients(model, call, batches)
    with swcompile.gradient_accumulation() as counts:
        assert_same(gradients(model, call, batches), expected)
    assert counts.quantized == 2 * NUM_LAYERS, "the second forward finds what the first one left"


def test_a_weight_whose_data_is_swapped_is_not_kept() -> None:
    weight = nn.Parameter(torch.randn(8, 16))
    with swcompile.gradient_accumulation():
        held_weights.quantized_weight(weight, WEIGHT_QUANTIZERS["quantize_tensorwise"])
        storage = StorageWeakRef(weight.untyped_storage())
        weight.data = torch.empty(0, 16)
        gc.collect()
        assert storage.expired()


def test_what_is_held_belongs_to_no_graph() -> None:
    x_q, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4, 1)
    weight = nn.Parameter(torch.randn(8, 16))
    with swcompile.gradient_accumulation() as counts:
        for _ in range(2):
            scaled_mm_held(x_q, scale, weight, "quantize_tensorwise", None, torch.float32)
        (held,) = held_weights._held.values()
        assert not any(tensor.requires_grad for tensor in held.results)
    assert (counts.quantized, counts.reused) == (1, 1)


def test_sums_over_activations_hold_nothing() -> None:
    """llm_int8's grad_weight reads a quantised activation where others read a weight."""
    model, compiled, batches = make(recipe="llm_int8")
    with swcompile.gradient_accumulation() as counts:
        gradients(model, compiled, batches)
    assert (counts.quantized, counts.reused) == (2 * NUM_LAYERS, 4 * NUM_LAYERS)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_wrong_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"micro_batches is {value!r}, but must be an integer of 1 or more")):
        swcompile.make_recipe({"micro_batches": value})


def test_cuda_graphs_cannot_hold() -> None:
    model, _, batches = make()
    for how in ({"mode": "reduce-overhead"}, {"inductor": {"triton.cudagraphs": True}}):
        compiled = torch.compile(model, backend="switchback", options=OPTIONS | how)
        with pytest.raises(Exception, match="'micro_batches' keeps quantised weights from one call to the next"):
            compiled(batches[0])


def test_an_unknown_quantiser() -> None:
    x_q, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="'round' is none of quantize_tensorwise, "):
        scaled_mm_held(x_q, scale, torch.randn(3, 8), "round", None, torch.float32)


def test_the_cost_rule_counts_a_share_of_the_weight() -> None:
    joint = swcompile.capture(nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(16, 64, requires_grad=True))
    recipe = swcompile.make_recipe(EVERY)
    matmuls = {matmul.role: matmul for matmul in swcompile.graph.matmuls(joint.graph)}

    def speedups(role: Role, passes: int) -> float:
        gemm = recipe.format_of(Role.OUTPUT)
        assert gemm is not None
        return predict_speedups([Candidate(matmuls[role], gemm, weight_passes=passes)], rates=RATES)[0].speedup

    for role in (Role.OUTPUT, Role.GRAD_INPUT):
        one, two, many = (speedups(role, passes) for passes in (1, 2, 10**9))
        assert one < two < many
        assert 1 / two - 1 / many == pytest.approx((1 / one - 1 / many) / 2, rel=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_quantises_in_every_replay() -> None:
    weight = torch.randn(64, 64, device="cuda")
    x_q, scale = torch.ones(32, 64, dtype=torch.int8, device="cuda"), torch.ones(32, 1, device="cuda")

    def multiply() -> torch.Tensor:
        return scaled_mm_held(x_q, scale, weight, "quantize_tensorwise", None, torch.float32)

    with swcompile.gradient_accumulation() as counts:
        multiply()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = multiply()
    assert (counts.quantized, counts.reused) == (2, 0)
    weight.mul_(2)
    graph.replay()
    assert torch.equal(out, multiply())


def train_sharded(rank: int, world: int, folder: str) -> None:
    """Gradients of a model that FSDP2 has sharded by layer, whose weights come and go, with and without the block."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    for block in model:
        block.compile(backend="switchback", options=OPTIONS | {"include": "*"})
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    batches = torch.randn(3, 16, WIDTH)

    def whole() -> list[torch.Tensor]:
        return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients(model, model, batches)]

    expected = whole()
    with swcompile.gradient_accumulation() as counts:
        actual = whole()
    torch.save({"expected": expected, "actual": actual, "counts": [counts.quantized, counts.reused]}, f"{folder}/{rank}.pt")
    leave()


def test_weights_that_share_memory_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run_in_processes(train_sharded, (2, str(tmp_path)), 2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert_same(result["actual"], result["expected"])
        assert result["counts"] == [12, 24]
