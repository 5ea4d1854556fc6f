"""Inductor's caches stay on, hit in a second process, and never serve the wrong rewrite."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run_program, share_headers
from torch._inductor.runtime.cache_dir_utils import cache_dir

import swcompile

PROGRAM = """
import json, sys, torch, swcompile
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64), torch.nn.ReLU(),
                            torch.nn.Linear(64, 8))
x = torch.randn(32, 64)
out = torch.compile(model, backend="switchback", options=json.loads(sys.argv[1]))(x)
out.square().sum().backward()
print(json.dumps({
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    "report": swcompile.reports()[-1].as_dict(),
    "text": str(swcompile.reports()[-1]),
    "grads": [p.grad.tolist() for p in model.parameters()],
    "file": swcompile.__file__,
}))
"""


DYNAMIC = """
import json, sys, torch, swcompile
from pathlib import Path
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir
from swcompile import rates

arguments = json.loads(sys.argv[1])
# int8 takes 1 ms more to launch and is 1000 times as fast: it pays for many tokens.
values = dict(matmul=1e9, output=0.0, quantized_matmul=1e12, quantized_output=0.0, quantize=1e12, quantize_columns=1e12, transpose=0.0)
values |= dict(kernel=1e-3, matmul_call=0.0, quantize_call=0.0, spread=1.0, identity="made up")
file = Path(cache_dir()) / "swcompile" / "device_rates.json"
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps({rates._device_key(torch.device("cpu"), torch.float32): values}))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
x = torch.randn(arguments["tokens"], 64)
with torch.no_grad():
    out = torch.compile(model, backend="switchback", dynamic=True)(x)
    expected = model(x)
report = swcompile.reports()[-1]
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
    "is_recorded": report.is_recorded,
    "decisions": [[d.rewritten, d.reason, d.speedup] for d in report.decisions],
    "shape": report.decisions[0].shape,
    "difference": ((out - expected).norm() / expected.norm()).item(),
}))
"""


def run(
    cache: Path, options: dict[str, Any], path: Path | None = None, program: str = PROGRAM
) -> dict[str, Any]:
    """Compile and train a step in a process of its own."""
    share_headers(cache_dir(), str(cache))
    arguments = json.dumps({"skip_slower": False} | options)
    printed = run_program(program, arguments, folder=cache.parent, path=path, TORCHINDUCTOR_CACHE_DIR=str(cache))
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    cache = tmp_path_factory.mktemp("inductor")
    return cache, run(cache, {})


def test_a_second_process_hits_and_its_report_is_right(cold: tuple[Path, dict[str, Any]]) -> None:
    cache, first = cold
    assert (first["hits"], first["misses"], first["bypasses"]) == (0, 1, 0)
    second = run(cache, {})
    assert (second["hits"], second["misses"], second["bypasses"]) == (1, 0, 0)
    assert second["grads"] == first["grads"]
    assert second["report"] == first["report"] and second["text"] == first["text"]
    assert first["report"]["summary"] == "switchback: int8 in 2 of 3 output, 1 of 2 grad_input, 0 of 3 grad_weight"


@pytest.mark.parametrize(
    "options", [{"recipe": "switchback_q"}, {"include": ["2.*"]}, {"exclude": ["2.*"]}, {"recipe": "switchback_m"}]
)
def test_other_options_miss(cold: tuple[Path, dict[str, Any]], options: dict[str, Any]) -> None:
    cache, first = cold
    other = run(cache, options)
    assert (other["hits"], other["misses"]) == (0, 1)
    assert other["grads"] != first["grads"] and other["report"] != first["report"]


def test_an_edited_pass_misses(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    cache, first = cold
    package = Path(swcompile.__file__).parent
    kernels = Path(sys.modules["swcompile.kernels"].__file__ or "").parent
    shutil.copytree(package, tmp_path / "swcompile")
    shutil.copytree(kernels, tmp_path / "swcompile" / "kernels")
    same = run(cache, {}, tmp_path)
    assert Path(same["file"]).is_relative_to(tmp_path)
    assert (same["hits"], same["misses"]) == (1, 0)
    with (tmp_path / "swcompile" / "passes" / "quantize_matmuls.py").open("a") as file:
        file.write("# an edit\n")
    edited = run(cache, {}, tmp_path)
    assert (edited["hits"], edited["misses"]) == (0, 1)
    assert edited["grads"] == first["grads"]


def test_the_cost_rule_decides_by_the_number_of_tokens_that_the_cache_key_holds(tmp_path: Path) -> None:
    def step(tokens: int) -> dict[str, Any]:
        return run(tmp_path / "cache", {"tokens": tokens}, program=DYNAMIC)

    few, many = step(8), step(4096)
    assert few["is_recorded"] and many["is_recorded"] and (few["hits"], many["hits"]) == (0, 0)
    assert few["difference"] == 0 and not few["decisions"][0][0]
    assert 0 < many["difference"] < 0.05 and many["decisions"][0][0]
    for tokens, first in ((8, few), (4000, many)):  # the same bucket: the same graph, and a report that fits it
        again = step(tokens)
        assert again["hits"] > 0 and not again["is_recorded"] and again["shape"][0] == tokens
        assert again["decisions"] == first["decisions"] and (again["difference"] > 0) == (first["difference"] > 0)
