"""fuse_quantization: the graphs that it makes, what it leaves alone, and that the numbers stay what they were."""

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import model_zoo
import pytest
import torch
from model_zoo import CASES, Case
from partition import run_partitioned
from torch import fx, nn
from torch._inductor import custom_graph_pass
from torch.nn.functional import gelu, silu
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import format_graph, make_recipe, row_regions, run_passes
from swcompile.joint import copy_graph
from swcompile.kernels.map_rows import MAP_ROWS
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.row_program import Action, RowProgram, Shape, parse
from swcompile.passes import joint_passes
from swcompile.passes.fuse_quantization import fuse_quantization
from swcompile.row_steps import Frame

RECIPE = make_recipe({"include": "*", "skip_slower": False})


class Split:
    """Takes a model through the passes and the partitioner, and runs forward and backward node by node.

    They run with what is fused as long as `fuse` is set, and without once it is not.
    """

    def __init__(self, *, fuse: bool, recipe: swcompile.Recipe = RECIPE):
        self.fuse, self.recipe = fuse, recipe
        self.graphs: list[fx.Graph] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return run_partitioned(gm, inputs, joint_passes(self.recipe), self._part)

    def _part(self, part: fx.GraphModule) -> Callable[..., Any]:
        fused = fx.GraphModule(part, copy_graph(part.graph))
        if self.fuse:
            run_passes(fused.graph, [partial(fuse_quantization, devices=("cpu",))])
            fused.recompile()
        self.graphs.append(fused.graph)
        return lambda *args: (fused if self.fuse else part)(*args)

    def programs(self, graph: int) -> list[RowProgram]:
        """The programs of one of the graphs."""
        return [parse(node.args[1]) for node in self.graphs[graph].find_nodes(op="call_function", target=MAP_ROWS)]

    def num_left(self, graph: int) -> int:
        """How many quantisations of rows are kernels of their own."""
        return len(self.graphs[graph].find_nodes(op="call_function", target=QUANTIZE_ROWWISE))


def gradients(model: Callable[..., Any], loss: Callable[..., torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(0)
    value = loss(model)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]


def both(
    model: nn.Module, loss: Callable[..., torch.Tensor], recipe: swcompile.Recipe = RECIPE
) -> tuple[Split, list[torch.Tensor], list[torch.Tensor]]:
    """(what fusing made, gradients with it, gradients without)."""
    torch._dynamo.reset()
    split = Split(fuse=True, recipe=recipe)
    compiled = torch.compile(model, backend=split, fullgraph=True)
    fused = gradients(compiled, loss, list(model.parameters()))
    split.fuse = False
    plain = gradients(compiled, loss, list(model.parameters()))
    return split, fused, plain


def assert_equal_but_for_order(fused: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """Only the order of sums differs: that moves a value by an ulp, and here and there an int8 by a step of 1/127."""
    assert len(fused) == len(plain)
    for a, b in zip(fused, plain, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm() + 1e-7


class GeluLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gelu(self.up(x)))


FORWARD = """\
%0: bf16[64, 32] = parameter up.weight
%1: bf16[64] = parameter up.bias
%2: bf16[2, 4, 32] = input
%3: bf16[32, 64] = parameter down.weight
%4: bf16[8, 32] = aten.view(%2, [8, 32])
%5: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%4)
%6: i8[8, 32] = getitem(%5, 0)
%7: f32[8, 1] = getitem(%5, 1)
%8: (i8[64, 32], f32[1, 1]) = swcompile.quantize_tensorwise(%0)
%9: i8[64, 32] = getitem(%8, 0)
%10: f32[1, 1] = getitem(%8, 1)
%11: bf16[8, 64] = swcompile.scaled_mm(%6, %9, %7, %10, %1, bf16)
%12: (bf16[8, 64], i8[8, 64], f32[8, 1]) = swcompile.map_rows([%11],
    %0: bf16[M, K] = input
    %1: f32[M, K] = cast(%0)
    %2: f32[M, K] = mul(%1, 0.5)
    %3: f32[M, K] = mul(%1, 0.7071067811865476)
    %4: f32[M, K] = erf(%3)
    %5: f32[M, K] = add(%4, 1.0)
    %6: f32[M, K] = mul(%2, %5)
    %7: bf16[M, K] = cast(%6)
    store %7
    quantize %7)
%13: bf16[8, 64] = getitem(%12, 0)
%14: i8[8, 64] = getitem(%12, 1)
%15: f32[8, 1] = getitem(%12, 2)
%16: (i8[32, 64], f32[1, 1]) = swcompile.quantize_tensorwise(%3)
%17: i8[32, 64] = getitem(%16, 0)
%18: f32[1, 1] = getitem(%16, 1)
%19: bf16[8, 32] = swcompile.scaled_mm(%14, %17, %15, %18, None, bf16)
%20: bf16[2, 4, 32] = aten.view(%19, [2, 4, 32])
return %20, %3, %4, %11, %13, %18"""


def test_forward_graph() -> None:
    model, x = GeluLayers().bfloat16(), torch.randn(2, 4, 32).bfloat16()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean())
    assert format_graph(split.graphs[0]) == FORWARD
    for a, b in zip(fused, plain, strict=True):
        assert torch.equal(a, b), "no sum over features: the bits are the same"


def test_backward_sums_beside() -> None:
    model, x = GeluLayers().bfloat16(), torch.randn(2, 4, 32).bfloat16().requires_grad_()
    split, *_ = both(model, lambda call: call(x).float().square().mean())
    (program,) = split.programs(1)
    assert [output.action.value for output in program.outputs] == ["store", "quantize", "sum_rows"]
    assert "bf16[64] = aten.sum" not in format_graph(split.graphs[1]), "the bias's gradient"


def test_an_int8_activation_is_all_that_is_written_where_nobody_reads_the_other() -> None:
    recipe = make_recipe({"recipe": "switchback_m", "include": "*", "skip_slower": False})
    model, x = GeluLayers().bfloat16(), torch.randn(8, 32).bfloat16()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean(), recipe)
    (program,) = split.programs(0)
    assert [output.action.value for output in program.outputs] == ["quantize"]
    assert_equal_but_for_order(fused, plain)


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((32, 64), (32, 64), (64, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def test_both_gradients_of_swiglu_come_from_one_kernel() -> None:
    model, x = Swiglu().bfloat16(), torch.randn(8, 32).bfloat16().requires_grad_()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean())
    assert_equal_but_for_order(fused, plain)
    actions = [[output.action.value for output in program.outputs] for program in split.programs(1)]
    assert actions.count(["store", "store", "quantize", "quantize"]) == 1
    assert len(split.programs(1)[0].inputs) == 3


def test_gradients_that_only_int8_matmuls_read_are_written_in_int8_alone() -> None:
    recipe = make_recipe({"recipe": "switchback_full", "include": "*", "skip_slower": False})
    model, x = Swiglu().bfloat16(), torch.randn(8, 32).bfloat16().requires_grad_()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean(), recipe)
    assert_equal_but_for_order(fused, plain)
    actions = [[output.action.value for output in program.outputs] for program in split.programs(1)]
    assert actions.count(["quantize", "quantize"]) == 1


class Scores(nn.Module):
    """An activation that the backward reads for another reason, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = gelu(self.up(x))
        return self.down(h) * h.square().mean()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_int8_activations_that_the_backward_makes_again(checkpointed: bool) -> None:
    recipe = make_recipe({"recipe": "switchback_full", "include": "*", "skip_slower": False})
    recipe = dataclasses.replace(recipe, save_int8_activations=True)
    model, x = Scores().bfloat16(), torch.randn(8, 32).bfloat16().requires_grad_()

    def loss(call: Callable[..., torch.Tensor]) -> torch.Tensor:
        out = checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        return out.float().square().mean()

    split, fused, plain = both(model, loss, recipe)
    assert_equal_but_for_order(fused, plain)
    blocks = split.graphs[1].find_nodes(op="call_function", target=QUANTIZE_BLOCKWISE_TRANSPOSE)
    assert {block.args[0].meta["val"].dtype for block in blocks} == {torch.int8} and len(blocks) == 2


class Residual(nn.Module):
    """Pre-norm blocks: what comes in is read again behind the matmuls."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def test_the_residual_stream_is_computed_once() -> None:
    model, x = Residual(3).bfloat16(), torch.randn(2, 8, 32).bfloat16()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean())
    assert_equal_but_for_order(fused, plain)
    adds = [sum(step.op == "add" and step.value.dtype is torch.bfloat16 for step in p.steps) for p in split.programs(0)]
    assert adds == [0, 1, 1], "each norm's kernel makes its own sum, and reads the one before"
    sums = [[output.action.value for output in p.outputs].count("sum_rows") for p in split.programs(1)]
    assert sums[-2:] == [3, 3], "gradients of the bias, the norm's weight and its bias"


def test_what_depends_on_the_kernel_is_not_its_input() -> None:
    """``y = f(x); z = y * g(mm(quantize(y)))``: the second quantisation reads what the first one's kernel must give."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.sigmoid()
            return self.b(y * self.a(y).tanh())

    model, x = Gated(), torch.randn(8, 32)
    split, fused, plain = both(model, lambda call: call(x).square().mean())
    assert_equal_but_for_order(fused, plain)
    first, second = split.programs(0)
    assert [step.op for step in first.steps] == ["sigmoid"]
    assert "sigmoid" not in [step.op for step in second.steps] and len(second.inputs) == 2


def num_fused(split: Split, graph: int) -> int:
    return sum(output.action.value == "quantize" for program in split.programs(graph) for output in program.outputs)


# (fused, of how many quantisations) in the forward and in the backward. Left are attention's outputs and gradients, where
# there is no bias to sum; tokens that nn.MultiheadAttention or einsum transposes or gives further dimensions.
EXPECTED = {
    "vit": ((6, 8), (12, 12)),
    "llama": ((6, 8), (8, 14)),
    "gpt2": ((6, 8), (8, 8)),
    "bert": ((7, 9), (13, 13)),
    "torch_encoder": ((4, 8), (7, 7)),
    "einsum": ((2, 8), (1, 12)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    case: Case = CASES[name](2)
    recipe = make_recipe({"skip_slower": False})
    split, fused, plain = both(case.model, case.loss, recipe)
    assert_equal_but_for_order(fused, plain)
    counts = tuple((num_fused(split, g), num_fused(split, g) + split.num_left(g)) for g in (0, 1))
    assert counts == EXPECTED[name]


def test_autocast_and_dropout() -> None:
    layer = nn.TransformerEncoderLayer(model_zoo.WIDTH, 4, 128, dropout=0.3, batch_first=True, norm_first=True)
    x = torch.randn(2, 16, model_zoo.WIDTH)

    def loss(call: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(x).float().square().mean()

    split, fused, plain = both(layer, loss)
    assert_equal_but_for_order(fused, plain)
    programs = split.programs(0)
    assert num_fused(split, 0) == 2 and all("rand" not in str(p) for p in programs)
    assert any(value.dtype is torch.bool for p in split.programs(1) for value in p.inputs), "a mask, not random numbers"


def test_checkpointing() -> None:
    class Checkpointed(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]

    model, x = Checkpointed().bfloat16(), torch.randn(2, 8, 32).bfloat16().requires_grad_()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean())
    assert_equal_but_for_order(fused, plain)
    assert len(split.programs(1)) > len(split.programs(0)), "norms are computed again, by the same kind of kernel"


def test_any_number_of_tokens() -> None:
    model = Residual().bfloat16()
    torch._dynamo.reset()
    split = Split(fuse=True)
    compiled = torch.compile(model, backend=split, dynamic=True)
    for batch, tokens in ((2, 8), (3, 5), (4, 12)):
        x = torch.randn(batch, tokens, 32).bfloat16()
        results = []
        for split.fuse in (True, False):
            results.append(gradients(compiled, lambda c, x=x: c(x).float().square().mean(), list(model.parameters())))
        assert_equal_but_for_order(*results)
    assert [num_fused(split, graph) for graph in (0, 1)] == [2, 2] and len(split.graphs) == 2


def test_what_is_not_a_row_program_is_left_alone() -> None:
    weight = nn.Parameter(torch.randn(32, 32))
    leaves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nothing to compute": lambda x: x,
        "a cumulative sum": lambda x: x.cumsum(-1),
        "another shape": lambda x: x.view(16, 16).sin().view(8, 32),
        "a norm over tokens": lambda x: x - x.mean(0, keepdim=True),
        "an op that is not known": lambda x: x.sin(),
    }
    for name, function in leaves.items():
        torch._dynamo.reset()
        split = Split(fuse=True)

        class Leaf(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = weight

            def forward(self, x: torch.Tensor, function: Any = function) -> torch.Tensor:
                return function(x) @ self.weight

        torch.compile(Leaf(), backend=split)(torch.randn(8, 32))
        inner = [node for node in split.graphs[0].find_nodes(op="call_function", target=MAP_ROWS)]
        assert not inner or name == "a norm over tokens", name


class Apply(nn.Module):
    """A function of x and of a linear layer."""

    def __init__(self, function: Callable[..., Any], width: int = 32) -> None:
        super().__init__()
        self.function, self.layer, self.norm = function, nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


ODD: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "norm over the batch": (lambda m, x: m.layer(m.norm(x)), (8, 32)),
    "as many tokens as features": (lambda m, x: m.layer(x - torch.var_mean(x, -1)[1]), (32, 32)),
    "one token": (lambda m, x: m.layer(x.relu()), (1, 32)),
    "a sum of everything": (lambda m, x: m.layer(x.relu()) + x.relu().sum(None, keepdim=True), (8, 32)),
    "sign": (lambda m, x: m.layer(x * ((x > 0).float() - (x < 0).float())), (8, 32)),
    "count": (lambda m, x: m.layer(x / ((x > 0).float().sum(-1, keepdim=True) + 1)), (8, 32)),
    "a whole number": (lambda m, x: m.layer(x * torch.full((), 2.7, dtype=torch.int64)), (8, 32)),
    "a number in bfloat16": (lambda m, x: m.layer(x * torch.full((), 0.1, dtype=torch.bfloat16)), (8, 32)),
    "a constant choice": (lambda m, x: m.layer(torch.where(torch.full((), True), x.sigmoid(), x)), (8, 32)),
    "scaled addition": (lambda m, x: m.layer(torch.add(x.sigmoid(), x, alpha=3)), (8, 32)),
    "read on the way": (lambda m, x: m.layer((y := x.sigmoid()) * y.cumsum(-1)), (8, 32)),
    "many results": (
        lambda m, x: m.layer(y := x.tanh()) + sum(m.layer(y := y.tanh()).relu() * y.cumsum(-1) for _ in range(9)),
        (8, 32),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str) -> None:
    function, shape = ODD[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = Apply(function)
    model.norm.track_running_stats = False
    _, fused, plain = both(model, lambda call: call(x).square().mean())
    assert_equal_but_for_order(fused, plain)


def test_a_copy_stays_a_copy() -> None:
    def function(m: Apply, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.sigmoid()
        copy, again = y.clone(), x.sigmoid()
        return m.layer(copy), y, copy, again

    with torch.no_grad():
        results = torch.compile(Apply(function), backend=Split(fuse=True), fullgraph=True)(torch.randn(8, 32))
    assert len({result.data_ptr() for result in results[1:]}) == len({id(result) for result in results[1:]})


def counting(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, which notes each call."""

    def call(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return call


def test_sums_that_no_registers_are_left_for_are_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Residual(2).bfloat16(), torch.randn(2, 8, 32).bfloat16()
    plain = gradients(torch.compile(model), lambda c: c(x).float().square().mean(), list(model.parameters()))
    counts = []
    for most in (16384, 32):
        monkeypatch.setattr(row_regions, "MAX_SUMMED", most)
        torch._dynamo.reset()
        split = Split(fuse=True)
        call = torch.compile(model, backend=split, fullgraph=True)
        fused = gradients(call, lambda c: c(x).float().square().mean(), list(model.parameters()))
        assert all((a - e).norm() <= 0.1 * e.norm() for a, e in zip(fused, plain, strict=True))
        programs = split.programs(1)
        counts.append(max(sum(o.action is Action.SUM_ROWS for o in p.outputs) for p in programs))
        stored = [p.value(o.ref) for p in programs for o in p.outputs if o.action is Action.STORE]
        assert all(value.dtype is not torch.float32 or value.shape is not Shape.MATRIX for value in stored)
    assert counts[0] > counts[1] == 1


def test_a_deep_model_takes_time_in_proportion() -> None:
    graphs = {}
    for blocks in (4, 16):
        torch._dynamo.reset()
        split = Split(fuse=False)
        model, x = Residual(blocks).bfloat16(), torch.randn(2, 8, 32).bfloat16()
        torch.compile(model, backend=split, fullgraph=True)(x).float().sum().backward()
        graphs[blocks] = split.graphs
    calls = {}
    for blocks, both_graphs in graphs.items():
        with pytest.MonkeyPatch.context() as patch:
            counted: list[int] = []
            patch.setattr(Frame, "computes", counting(Frame.computes, counted))
            for graph in both_graphs:
                assert fuse_quantization(graph, devices=("cpu",)).rewrites >= blocks - 1
            calls[blocks] = len(counted)
    assert calls[16] < 6 * calls[4], "four times the layers"


@pytest.mark.parametrize("kind", ["CustomGraphPass", "CustomInferenceAwareGraphPass"])
def test_passes_of_users_run_first(kind: str) -> None:
    if not hasattr(custom_graph_pass, kind):
        pytest.skip("this torch hands every pass the graph alone")
    seen = []

    class Users(getattr(custom_graph_pass, kind)):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph, *is_inference: bool) -> None:
            seen.append((*is_inference, len(graph.find_nodes(op="call_function", target=MAP_ROWS))))

        def uuid(self) -> None:
            return None

    model, x = GeluLayers().bfloat16(), torch.randn(8, 32).bfloat16()
    options: dict[str, Any] = {"include": "*", "skip_slower": False, "fuse": True}
    with torch._inductor.config.patch(post_grad_custom_post_pass=Users()), torch.no_grad():
        torch.compile(model, backend="switchback", options=options)(x)
    assert seen == [(0,) if kind == "CustomGraphPass" else (True, 0)]


def test_reads_rows_of_a_wider_matrix() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(silu(gate) * up)

    model, x = Packed().bfloat16(), torch.randn(8, 32).bfloat16()
    split, fused, plain = both(model, lambda call: call(x).float().square().mean())
    assert_equal_but_for_order(fused, plain)
    (program,) = split.programs(0)
    assert len(program.inputs) == 2
    (node,) = split.graphs[0].find_nodes(op="call_function", target=MAP_ROWS)
    assert [source.target for source in node.args[0]] == [operator.getitem] * 2


def test_only_on_the_devices_that_are_asked_for() -> None:
    model, x = GeluLayers().bfloat16(), torch.randn(8, 32).bfloat16()
    split = Split(fuse=False)
    torch.compile(model, backend=split)(x)
    assert fuse_quantization(split.graphs[0]).rewrites == 0
    assert fuse_quantization(split.graphs[0], devices=("cpu",)).rewrites == 1


@pytest.mark.parametrize("fuse", [True, False, None])
def test_option(fuse: bool | None) -> None:
    seen: list[str] = []
    model, x = GeluLayers().bfloat16(), torch.randn(8, 32).bfloat16()
    options: dict[str, Any] = {"include": "*", "skip_slower": False, "fuse": fuse}
    compiled = torch.compile(model, backend="switchback", options=options)
    with torch._inductor.utils.fresh_inductor_cache(), torch.no_grad():
        code = torch._inductor.utils.run_and_get_code(compiled, x)[1]
    seen += [name for name in ("map_rows", "quantize_rowwise") if any(f"swcompile.{name}" in text for text in code)]
    assert seen == (["map_rows", "quantize_rowwise"] if fuse else ["quantize_rowwise"])


def test_cache_key_knows_the_option() -> None:
    from swcompile.graph_pass import GraphPass
    from swcompile.passes import post_grad_passes

    keys = set()
    for fuse in (True, None):
        recipe = make_recipe({"fuse": fuse})
        keys.add(GraphPass(post_grad_passes(recipe), hook="post_grad_custom_post_pass").uuid())
    assert len(keys) == 2 and None not in keys
    assert post_grad_passes(make_recipe({"fuse": False})) == []
