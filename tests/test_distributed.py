"""Data parallel on two CPU processes is one process with the joined batch, within the rounding of int8."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import compile_quickly, leave, run_in_processes
from test_backend import EVERY, Model
from torch.nn.parallel import DistributedDataParallel

import swcompile
from swcompile import Role

STEPS, LOCAL_TOKENS = 5, 24
WIDTH = 384  # more than one of DDP's smallest buckets: Dynamo splits the graph and compiles each piece on its own


def train(rank: int, world: int, folder: str, wrap: str) -> None:
    """Train on this rank's share of each batch and leave the parameters and the number of int8 matmuls in a file."""
    torch.set_num_threads(1)
    compile_quickly()
    torch.manual_seed(0)
    model: Any = Model(num_blocks=2, width=WIDTH)
    options = {"backend": "switchback", "options": EVERY}
    if world > 1:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if world == 1:
        call = torch.compile(model, **options)
    elif wrap == "compile(ddp)":
        call = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), **options)
    else:
        call = DistributedDataParallel(torch.compile(model, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(2 * LOCAL_TOKENS, WIDTH, generator=data)
        y = torch.randn(2 * LOCAL_TOKENS, 10, generator=data)
        share = slice(rank * LOCAL_TOKENS, (rank + 1) * LOCAL_TOKENS) if world > 1 else slice(None)
        optimizer.zero_grad()
        (call(x[share]) - y[share]).square().mean().backward()
        optimizer.step()
    names = {d.parameter for r in swcompile.reports() for d in r.decisions if d.role is Role.OUTPUT and d.rewritten}
    torch.save({"model": model.state_dict(), "names": names, "graphs": len(swcompile.reports())}, f"{folder}/{world}-{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single process ends with."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_in_processes(train, (1, str(folder), ""), 1)
    return torch.load(folder / "1-0.pt")


@pytest.mark.parametrize("wrap", ["compile(ddp)", "ddp(compile)"])
def test_two_processes_equal_one(
    wrap: str, one: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run_in_processes(train, (2, str(tmp_path), wrap), 2)
    start = {name: p.detach() for name, p in _fresh().named_parameters()}
    (left, right) = (torch.load(tmp_path / name) for name in ("2-0.pt", "2-1.pt"))
    expected = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("up", "down")}
    assert one["names"] == expected
    assert {str(name).removeprefix("module.") for name in left["names"]} == expected
    assert left["graphs"] > 1
    for name, value in one["model"].items():
        assert torch.equal(left["model"][name], right["model"][name])
        # Rows are quantised one by one, so a half batch rounds as the whole does; sums run in another order, which
        # moves a value across a rounding border now and then.
        moved = (value - start[name]).norm()
        assert (left["model"][name] - value).norm() < 0.01 * moved


def _fresh() -> Model:
    torch.manual_seed(0)
    return Model(num_blocks=2, width=WIDTH)
