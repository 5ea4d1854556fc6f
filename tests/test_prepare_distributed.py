"""A prepared model in two CPU processes, by DDP and by FSDP2 on each block, trains as in one."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import compile_quickly, leave, run_in_processes
from test_prepare import WIDTH, Written, encoder_layer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import swcompile

STEPS, BATCH, LENGTH = 4, 4, 8


class Block(nn.Module):
    """PyTorch's layer in a module of the user's: Dynamo compiles no frame of `torch.nn` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder_layer(norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def build(dtype: torch.dtype) -> nn.Module:
    """The same model each time."""
    return copy.deepcopy(_prepared(dtype))


@cache
def _prepared(dtype: torch.dtype) -> nn.Module:
    """Prepared: a block that gets hooks, and one whose forward is replaced by its graph, in another dtype by another graph."""
    if dtype == torch.float64:
        model = copy.deepcopy(_prepared(torch.float32)).double()
        model(torch.randn(2, LENGTH, WIDTH, dtype=dtype))  # is captured once, not in every copy
        return model
    torch.manual_seed(0)
    model = nn.Sequential(Written(), Block()).eval()  # no dropout
    return swcompile.prepare(model, torch.randn(2, LENGTH, WIDTH), layer_scale={"init": 0.1}, qk_layernorm=True)


def train(rank: int, world: int, wrap: str, is_compiled: bool) -> dict[str, torch.Tensor]:
    """Train on this rank's share of each batch, or one after the other on both; in float64 where it is not int8.

    Gives the whole parameters.
    """
    dtype = torch.float32 if is_compiled else torch.float64
    model: Any = build(dtype)
    if is_compiled:
        for block in model:
            block.compile(backend="switchback", options={"skip_slower": False}, fullgraph=True)
    call = model
    if wrap == "ddp":
        call = DistributedDataParallel(model)
    elif wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        shares = torch.randn(2, BATCH, LENGTH, WIDTH, generator=data, dtype=dtype)
        optimizer.zero_grad()
        for share in shares[rank : rank + 1] if world > 1 else shares:
            (call(share).square().mean() * world / 2).backward()
        optimizer.step()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def train_all(rank: int, world: int, folder: str) -> None:
    """Leave each way's parameters in a file of this rank; the first one also what one process gets from all data."""
    torch.set_num_threads(1)
    compile_quickly()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    states = {}
    if rank == 0:  # the other one waits, and finds compiled what this one has compiled
        states |= {"start": build(torch.float32).state_dict(), "one": train(0, 1, "", False), "one, compiled": train(0, 1, "", True)}
    states |= {
        "ddp": train(rank, world, "ddp", False),
        "fsdp2": train(rank, world, "fsdp2", False),
        "fsdp2, compiled": train(rank, world, "fsdp2", True),
    }
    summaries = [report.summary() for report in swcompile.reports()]
    assert len(summaries) == (2 if rank else 4) and all("int8 in 4 of 4 output" in summary for summary in summaries), summaries
    torch.save(states, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_in_processes(train_all, (2, str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("two", "one", "rtol"), [("ddp", "one", 1e-9), ("fsdp2", "one", 1e-9), ("fsdp2, compiled", "one, compiled", 0.01)]
)
def test_two_processes_equal_one(states: list[dict[str, Any]], two: str, one: str, rtol: float) -> None:
    for name, start in states[0]["start"].items():
        expected, actual = states[0][one][name], states[0][two][name]
        assert torch.equal(actual, states[1][two][name])
        moved = (expected - start).norm()
        assert moved > 0
        assert (actual - expected).norm() < rtol * moved, name
