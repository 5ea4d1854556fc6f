"""``torch.compile(model, backend="switchback")`` as users use it."""

import copy
import io
import logging
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
from processes import run_program
from test_cost import RATES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import compile_fx
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import Role, backend, cost
from swcompile.measuring import DeviceRates

WIDTH, TOKENS = 64, 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY: dict[str, Any] = {"skip_slower": False}


class Block(nn.Module):
    """A residual MLP block, with dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Blocks and a head, with checkpointing on demand."""

    def __init__(self, *, num_blocks: int = 1, width: int = WIDTH, checkpointed: bool = False, dropout: float = 0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def make(device: str = "cpu", seed: int = 0, **options: Any) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(seed)
    return Model(**options).to(device), torch.randn(TOKENS, WIDTH, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_processes_that_compile_for_a_gpu_start_first(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def compile_nothing(gm: torch.fx.GraphModule, inputs: Any, **options: Any) -> torch.fx.GraphModule:
        seen.append("compiled")
        return gm

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(backend, "_start_compilers", lambda device: seen.append("started"))
    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing)
    model, x = make(device)
    torch.compile(model, backend="switchback", options=EVERY)(x)
    assert seen == ["started"] * (device == "cuda") + ["compiled"]
    assert ("TRITON_CACHE_DIR" in os.environ) == (device == "cuda"), "all of a process's kernels are in one place"


def run(call: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = call(x)
    out.square().mean().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close_and_different(actual: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 0.1) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert 0 < (a - e).norm() <= rtol * e.norm()


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"exclude": ["*"]}, {"include": []}], ids=["exclude all", "include none"])
def test_with_everything_excluded_it_is_inductor_to_the_bit(device: str, options: dict[str, Any]) -> None:
    model, x = make(device)
    # Else a GPU chooses the tiles of each reduction by its time, and the order of sums with it.
    inductor = {"deterministic": True} if device == "cuda" else {}
    plain = run(torch.compile(model, fullgraph=True, options=inductor), model, x)
    options = options | {"inductor": inductor}
    excluded = run(torch.compile(model, backend="switchback", options=options, fullgraph=True), model, x)
    assert_equal(excluded, plain)
    assert swcompile.reports()[-1].num_rewritten() == 0


def test_a_real_model_with_everything_excluded_is_inductor_to_the_bit() -> None:
    torch.manual_seed(0)
    case = model_zoo.CASES["vit"](1)  # not one with an embedding: its backward adds in any order
    gradients = []
    for options in ({}, {"backend": "switchback", "options": {"exclude": "*"}}):
        case.model.zero_grad()
        loss = case.loss(torch.compile(case.model, fullgraph=True, **options))
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in case.model.parameters())])
    assert_equal(gradients[1], gradients[0])


def test_a_program_that_never_imports_swcompile(tmp_path: Path) -> None:
    program = """
import sys, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
x = torch.randn(8, 64)
assert "swcompile" not in sys.modules
out = torch.compile(model, backend="switchback", options={"skip_slower": False})(x)
print((out - model(x)).norm().item() / model(x).norm().item())
"""
    assert 0 < float(run_program(program, folder=tmp_path)) < 0.05


def test_report_and_log(caplog: pytest.LogCaptureFixture) -> None:
    model, x = make(num_blocks=2)
    never_before = {"inductor": {"aot_inductor.metadata": {"run": str(uuid.uuid4())}}}
    with caplog.at_level(logging.INFO, "swcompile"):
        for _ in range(2):
            torch._dynamo.reset()
            run(torch.compile(model, backend="switchback", options=EVERY | never_before), model, x)
    report = swcompile.reports()[-1]
    assert report.summary() == "switchback: int8 in 4 of 5 output, 4 of 5 grad_input, 0 of 5 grad_weight"
    assert [record.message for record in caplog.records if record.name == "swcompile"] == [
        report.summary(),
        "switchback: from the cache; see swcompile.reports()",
    ]
    assert "blocks.{0-1}.up.weight" in str(report) and "include='*' asks for it" in str(report)
    rows = report.as_dict()["matmuls"]
    assert [row["shape"] for row in rows if row["parameter"] == "head.weight"] == [
        (TOKENS, 10, WIDTH), (TOKENS, WIDTH, 10), (10, WIDTH, TOKENS),
    ]  # fmt: skip


def test_explain_says_what_compile_does_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), Block())
    x = torch.randn(TOKENS, WIDTH)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = swcompile.explain(model, x, **EVERY)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    torch.compile(model, backend="switchback", options=EVERY)(x).sum().backward()
    assert report.as_dict() == swcompile.reports()[-1].as_dict()


def test_include_and_exclude() -> None:
    model, x = make(num_blocks=2)

    def rewritten(**options: Any) -> set[str | None]:
        report = swcompile.explain(model, x, **EVERY, **options)
        return {d.parameter for d in report.decisions if d.rewritten}

    blocks = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}
    assert rewritten() == blocks
    assert rewritten(include="*") == blocks | {"head.weight"}
    assert rewritten(include=["head.*", "blocks.0.*"]) == {n for n in blocks if ".0." in n} | {"head.weight"}
    assert rewritten(exclude="*.up.weight") == {n for n in blocks if ".down." in n}
    assert rewritten(include="*", exclude=["blocks.*"]) == {"head.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "switchback"}, "unknown option 'recpie'; did you mean 'recipe'"),
        ({"recipe": "switchbak"}, "unknown recipe 'switchbak'; did you mean 'switchback'"),
        ({"skip_slower": "yes"}, "option 'skip_slower' is 'yes'; it takes True or False"),
        ({"include": [1]}, "it takes a glob or a list of globs"),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun'; did you mean 'max-autotune'"),
        ({"mode": ["default"]}, r"unknown mode \['default'\]; did you mean 'default'"),
        ({"inductor": "x"}, "option 'inductor' is 'x'; it takes a dict of Inductor's own options"),
        ({"inductor": {"epilog_fusion": 1}}, "unknown option 'epilog_fusion' of Inductor; did you mean 'epilogue_fusion'"),
        ({"recipe": ["switchback"]}, r"unknown recipe \['switchback'\]; did you mean 'switchback'"),
        ({"include": 5}, "option 'include' is 5; it takes a glob or a list of globs"),
        ({"exclude": {"a": 1}}, "option 'exclude' is {'a': 1}; it takes a glob or a list of globs"),
        ({"layer_scale": True}, r"before the optimizer is built: call swcompile.prepare\(model, \*inputs, layer_scale=True"),
        ({"qk_layernorm": True}, r"before the optimizer is built: call swcompile.prepare\(model, \*inputs, qk_lay"),
        ({"include": ["bloks.*"], "strict": True}, "pattern 'bloks.*' matches no parameter.*closest is 'blocks"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model, x = make()
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="switchback", options=options)(x)
    if "strict" not in options:
        with pytest.raises(ValueError, match=message):
            swcompile.explain(model, x, **options)


def test_explain_takes_the_options_that_concern_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(num_blocks=2)
    graphs = []

    def slow_host(candidate: Any, rates: Any) -> cost._Times:
        """int8 is faster on the device, and slower where the host launches."""
        original = cost._Original(seconds=2e-6, between=1e-6, launch=1e-3, call=cost._original(candidate.matmul, RATES).call)
        return cost._Times(original, (cost._Part(seconds=1e-6, num_launches=1),), launch=1.0, gap=0.0)

    monkeypatch.setattr(cost, "_times", slow_host)
    for mode, in_int8 in ((None, 0), ("default", 0), ("reduce-overhead", 4)):
        report = swcompile.explain(model, x, mode=mode, inductor={"joint_custom_pre_pass": graphs.append})
        assert report.num_rewritten(Role.OUTPUT) == in_int8
        reasons = [d.reason for d in report.decisions if d.role is Role.OUTPUT and d.speedup is not None and not d.rewritten]
        assert len(reasons) == 4 - in_int8 and all("time to launch" in reason for reason in reasons)
    assert len(graphs) == 3


def test_a_pattern_that_matches_nothing_is_a_warning() -> None:
    model, x = make()
    with pytest.warns(UserWarning, match="pattern 'haed.weight' matches no parameter.*closest is 'head.weight'"):
        torch.compile(model, backend="switchback", options={"exclude": "haed.weight"})(x)
    report = swcompile.explain(model, x, exclude="haed.weight", **EVERY)
    assert report.unmatched == {"haed.weight": "head.weight"} and "haed.weight" in str(report)
    with pytest.raises(ValueError, match="haed.weight"):
        swcompile.explain(model, x, exclude="haed.weight", strict=True)


def test_float64_is_left_alone_and_strict_says_so() -> None:
    model, x = make()
    model, x = model.double(), x.double()
    compiled = torch.compile(model, backend="switchback", options=EVERY)
    for actual, expected in zip(run(compiled, model, x), run(model, model, x), strict=True):
        torch.testing.assert_close(actual, expected)
    reasons = {d.reason for d in swcompile.reports()[-1].decisions if d.role is Role.OUTPUT}
    assert "torch.float64 has no int8 form; bfloat16, float16 and float32 have" in reasons
    with pytest.raises(swcompile.StrictError, match=r"blocks.0.up.weight \(output .*float64"):
        swcompile.explain(model, x, strict=True, **EVERY)


def test_a_model_without_a_matmul() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(model, backend="switchback")(x), model(x))
    assert str(swcompile.reports()[-1]) == "switchback: no matmul in this graph"


@pytest.mark.parametrize("device", DEVICES)
def test_inference_is_int8_and_train_and_eval_switch(device: str) -> None:
    model, x = make(device, dropout=0.5)
    compiled = torch.compile(model, backend="switchback", options=EVERY, fullgraph=True)
    model.eval()
    with torch.no_grad():
        out = compiled(x)
    assert_close_and_different([out], [model(x)])
    report = swcompile.reports()[-1]
    assert report.num_rewritten() == 2 and {d.role for d in report.decisions} == {Role.OUTPUT}
    in_eval = run(compiled, model, x)
    assert_close_and_different(in_eval, run(model, model, x))
    torch.testing.assert_close(in_eval[0], out)
    model.train()
    in_train = run(compiled, model, x)
    assert not torch.allclose(in_train[0], in_eval[0], rtol=0.1)
    model.eval()
    assert_equal(run(compiled, model, x), in_eval)


def test_a_weight_that_grows_unnoticed_before_the_backward_flips_no_sign() -> None:
    """Its scale is the forward's. Autograd does not see what fused optimizers write, nor writes through ``.data``."""
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(32, WIDTH, requires_grad=True)
    out = torch.compile(layer, backend="switchback", options=EVERY | {"include": "*"})(x)
    layer.weight.data.mul_(1.1)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    expected = tangent @ layer.weight
    assert x.grad is not None and 0 < (x.grad - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("recipe", swcompile.RECIPES)
def test_activation_checkpointing_gives_the_same_bits(recipe: str) -> None:
    options = {"recipe": recipe, **EVERY}
    results = []
    for checkpointed in (False, True):
        model, x = make(checkpointed=checkpointed)
        results.append(run(torch.compile(model, backend="switchback", options=options, fullgraph=True), model, x))
        assert swcompile.reports()[-1].num_rewritten(Role.OUTPUT) == 2
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_graph_breaks_keep_every_block_in_int8() -> None:
    torch.manual_seed(0)
    model, x = Broken(), torch.randn(TOKENS, WIDTH)
    actual = run(torch.compile(model, backend="switchback", options=EVERY), model, x)
    # `up` ends a graph, but not the model: it is no head.
    assert [
        [d.parameter for d in report.decisions if d.role is Role.OUTPUT and d.rewritten]
        for report in swcompile.reports()
    ] == [["up.weight"], ["down.weight"]]
    assert_close_and_different(actual, run(model, model, x))


def test_a_block_compiled_alone_has_no_head() -> None:
    report = swcompile.explain(Block(), torch.randn(TOKENS, WIDTH), **EVERY)
    assert report.num_rewritten(Role.OUTPUT) == 2


@pytest.mark.parametrize(("dynamic", "skip_slower"), [(None, False), (True, False), ("mark", True)])
def test_seven_batch_sizes_compile_at_most_twice(
    dynamic: Any, skip_slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if skip_slower:  # decides in favour of int8 here, whatever this machine is
        rates = DeviceRates(
            matmul=1e9, output=0.0, quantized_matmul=1e12, quantized_output=0.0, quantize=1e12, quantize_columns=1e12, transpose=0.0,
            kernel=1e-9, matmul_call=0.0, quantize_call=0.0,
        )  # fmt: skip
        monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model, _ = make()
    compiled = torch.compile(
        model,
        backend="switchback",
        options={"skip_slower": skip_slower},
        fullgraph=True,
        dynamic=True if dynamic is True else None,
    )
    for size in (8, 24, 40, 56, 72, 88, 104):
        x = torch.randn(size, WIDTH)
        if dynamic == "mark":
            torch._dynamo.mark_dynamic(x, 0)
        out = compiled(x)
        out.sum().backward()
        assert_close_and_different([out], [model(x)])
    assert len(swcompile.reports()) <= 2
    assert swcompile.reports()[-1].num_rewritten(Role.OUTPUT) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
@torch._inductor.config.patch(max_autotune_gemm_backends="ATEN")  # the search through templates takes minutes
def test_modes(mode: str, device: str) -> None:
    model, x = make(device)
    plain = run(torch.compile(model, backend="switchback", options=EVERY), model, x)
    for how in ({"options": {"mode": mode, **EVERY}}, {"mode": mode}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="switchback", **how)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            result = [value.clone() for value in run(compiled, model, x)]
        if "options" in how:
            for actual, expected in zip(result, plain, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_inductor_options_pass_through() -> None:
    model, x = make()
    seen = {}

    def spy(graph: torch.fx.Graph) -> None:
        seen["epilogue_fusion"] = torch._inductor.config.epilogue_fusion

    inductor = {"epilogue_fusion": False, "post_grad_custom_post_pass": spy}
    inductor |= {"triton.cudagraphs": False, "force_disable_caches": True}  # one of a group, and one with two names
    torch.compile(model, backend="switchback", options={"inductor": inductor, **EVERY})(x)
    assert seen == {"epilogue_fusion": False}


def test_a_hook_of_the_user_still_runs() -> None:
    model, x = make()
    seen = []
    torch.compile(
        model, backend="switchback", options={"inductor": {"joint_custom_pre_pass": lambda graph: seen.append(len(graph.nodes))}}
    )(x)
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: seen.append(-1)):
        torch._dynamo.reset()
        torch.compile(model, backend="switchback", options=EVERY)(x)
    assert len(seen) == 2 and seen[0] > 0 and seen[1] == -1


class Broken(Block):
    """A block in two graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.norm(x))
        torch._dynamo.graph_break()
        return x + self.down(nn.functional.gelu(hidden))


def test_strict_patterns_may_match_in_another_graph_of_a_broken_model() -> None:
    x = torch.randn(TOKENS, WIDTH)
    options = {"include": ["up.*", "down.*"], "strict": True, **EVERY}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.compile(Broken(), backend="switchback", options=options)(x)
    assert not [w for w in seen if "matches no parameter" in str(w.message)]  # the module of both graphs has both
    assert [r.num_rewritten(Role.OUTPUT) for r in swcompile.reports()] == [1, 1]

    up, down = {"up": nn.Linear(WIDTH, WIDTH)}, {"down": nn.Linear(WIDTH, WIDTH)}

    def call(x: torch.Tensor) -> torch.Tensor:
        hidden = up["up"](x)
        torch._dynamo.graph_break()
        return down["down"](hidden)

    with pytest.warns(UserWarning, match="matches no parameter of this graph"):
        torch.compile(call, backend="switchback", options=options)(x)
    assert [r.num_rewritten(Role.OUTPUT) for r in swcompile.reports()] == [1, 1, 1, 1]


def test_deepcopy_saving_and_loading() -> None:
    model, x = make()
    compiled = torch.compile(model, backend="switchback", options=EVERY)
    expected = run(compiled, model, x)
    assert list(model.state_dict()) == list(Model().state_dict())
    twin = copy.deepcopy(compiled)
    assert_equal(run(twin, twin, x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = make(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(run(torch.compile(other, backend="switchback", options=EVERY), other, x), expected)
    with torch.no_grad():
        model.head.weight.zero_()
        model.blocks[0].down.weight.mul_(2)  # no stale int8 copy: the graph quantises the weight that is there
    assert not torch.equal(run(compiled, model, x)[1], expected[1])


def test_cost_rule_leaves_a_small_mlp_alone() -> None:
    model, x = make()
    report = swcompile.explain(model, x)
    outputs = [d for d in report.decisions if d.role is Role.OUTPUT and d.speedup is not None]
    assert outputs and all(d.rewritten == (d.speedup >= 1) for d in outputs)
    tiny = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(swcompile.StrictError, match="int8 would be slower"):
        swcompile.explain(tiny, torch.randn(2, 4), include="*", strict=True)


def test_no_warnings_of_ours() -> None:
    model, x = make()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.compile(model, backend="switchback", options=EVERY)(x)
    assert not [w for w in seen if "swcompile" in str(w.filename)]


def test_frames_without_parameters_compile() -> None:
    counter = CompileCounterWithBackend("switchback")
    torch.testing.assert_close(torch.compile(lambda x: x.sin() @ x, backend=counter)(torch.eye(4)), torch.eye(4).sin())
    assert counter.frame_count == 1
