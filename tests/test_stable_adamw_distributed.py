"""StableAdamW on sharded parameters in two processes, on the CPU or a GPU each, ends where one process does."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as checkpoints
from processes import leave, run_in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from swcompile import StableAdamW

STEPS = 12
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def build(device: str = "cpu") -> nn.Sequential:
    """The last layer has fewer rows than there are processes: a shard of it is empty."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 1, bias=False)
    return nn.Sequential(*layers).to(device)


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Of the whole parameters, on changing scales; in two steps one element is not finite."""
    generator = torch.Generator().manual_seed(step)
    grads = {}
    for name, param in build().named_parameters():
        scale = 10 ** (torch.rand((), generator=generator) * 3 - 2)
        grads[name] = torch.randn(param.shape, generator=generator) * scale
    if step == 4:
        grads["0.weight"][-1, -1] = math.nan  # in the last rank's shard alone
    if step == 7:
        grads["4.weight"][0, 0] = math.inf
    return grads


def train(model: nn.Module) -> dict[str, Any]:
    """With the optimizer's state through a distributed checkpoint halfway."""
    optimizer = StableAdamW(model.named_parameters(), lr=1e-2)
    rms, norms = [], []
    for step in range(STEPS):
        if step == STEPS // 2:
            state = copy.deepcopy(checkpoints.get_optimizer_state_dict(model, optimizer))
            optimizer = StableAdamW(model.named_parameters(), lr=1e-2)
            checkpoints.set_optimizer_state_dict(model, optimizer, state)
        grads = gradients(step)
        for name, param in model.named_parameters():
            grad = grads[name].to(param.device)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad
        optimizer.step()
        rms.append(optimizer.last_rms())
        norms.append(optimizer.last_update_norms())
    params = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {"params": params, "rms": torch.stack(rms), "norms": torch.stack(norms), "skipped": optimizer.skipped_steps()}


def train_sharded(rank: int, world: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKENDS[device], store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mesh = init_device_mesh(device, (world,))
    fsdp = build(device)
    for layer in (*fsdp, fsdp):
        fully_shard(layer, mesh=mesh)
    mixed = build(device)  # sharded by columns, replicated, and not a DTensor at all
    mixed[0].weight = nn.Parameter(distribute_tensor(mixed[0].weight.data, mesh, [Shard(1)]))
    mixed[2].weight = nn.Parameter(distribute_tensor(mixed[2].weight.data, mesh, [Replicate()]))
    torch.save({"fsdp": train(fsdp), "mixed": train(mixed)}, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_in_processes(train_sharded, (2, str(folder), device), 2)
    return [torch.load(folder / f"{rank}.pt", map_location=device) for rank in range(2)]


@pytest.mark.parametrize("how", ["fsdp", "mixed"])
def test_sharded_equals_one_process(how: str, device: str, results: list[dict[str, Any]]) -> None:
    one = train(build(device))
    for result in (results[0][how], results[1][how]):
        for name, expected in one["params"].items():
            torch.testing.assert_close(result["params"][name], expected, rtol=1e-6, atol=1e-7)
        for what in ("rms", "norms"):
            torch.testing.assert_close(result[what], one[what], rtol=1e-5, atol=0, equal_nan=True)
        assert result["skipped"].tolist() == one["skipped"].tolist() == [1, 0, 0, 0, 1]
    assert (one["rms"] > 1).any()
