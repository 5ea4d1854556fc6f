"""Stabilisers in live models: the sites, eager and compiled alike, what they do to training, and the way back."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import model_zoo
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils._pytree import tree_leaves

import swcompile
from swcompile import LayerScale, QKNorm, Role, Stabilizer
from swcompile.graph import matmuls

WIDTH, HEADS, LAYERS = model_zoo.WIDTH, 4, 1
Inputs = dict[str, Any]


def tokens(batch: int = 2, length: int = 12) -> Inputs:
    return {"input_ids": torch.randint(3, model_zoo.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))}


def floats(batch: int = 2, length: int = 12, name: str = "src") -> Inputs:
    return {name: torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))}


def images(batch: int = 2, length: int = 0) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def zoo(name: str) -> nn.Module:
    return model_zoo.CASES[name](LAYERS).model


def gpt_neox() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
    config = transformers.GPTNeoXConfig(vocab_size=model_zoo.VOCABULARY, num_hidden_layers=LAYERS, **sizes)
    return transformers.GPTNeoXForCausalLM(config)


def cohere() -> nn.Module:
    """Attention and MLP are added one after the other to what both were computed from."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "intermediate_size": 2 * WIDTH}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CohereConfig(vocab_size=model_zoo.VOCABULARY, num_hidden_layers=LAYERS, **sizes, **tokens)
    return transformers.CohereForCausalLM(config)


def opt() -> nn.Module:
    """Queries are scaled before they are split into heads."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before transformers 5.23 OPT draws a random number for each layer in training, and cannot be traced")
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "num_attention_heads": HEADS, "ffn_dim": 2 * WIDTH}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=model_zoo.VOCABULARY, num_hidden_layers=LAYERS, **sizes)
    )


def encoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first)


class Written(nn.Module):
    """A pre-norm block with attention written out, in linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(src)).chunk(3, -1))
        attended = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = src + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def clip_inputs(batch: int = 2, length: int = 12) -> Inputs:
    return tokens(batch, length) | images(batch)


def t5_inputs(batch: int = 2, length: int = 12) -> Inputs:
    ids = tokens(batch, length)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2], "use_cache": False}


def self_attention(batch: int = 2, length: int = 12) -> Inputs:
    (x,) = floats(batch, length).values()
    return {"query": x, "key": x, "value": x}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs], int, int]] = {
    "vit": (lambda: zoo("vit"), images, 2 * LAYERS, LAYERS),
    "clip": (lambda: zoo("clip"), clip_inputs, 4 * LAYERS, 2 * LAYERS),
    "llama": (lambda: zoo("llama"), tokens, 2 * LAYERS, LAYERS),
    "gpt2": (lambda: zoo("gpt2"), tokens, 2 * LAYERS, LAYERS),
    "bert": (lambda: zoo("bert"), tokens, 2 * LAYERS, LAYERS),
    "t5": (lambda: zoo("t5"), t5_inputs, 5 * LAYERS, 3 * LAYERS),
    "gpt_neox": (gpt_neox, tokens, 2 * LAYERS, LAYERS),
    "cohere": (cohere, tokens, 2 * LAYERS, LAYERS),
    "opt": (opt, tokens, 2 * LAYERS, LAYERS),
    "pre-norm encoder layer": (lambda: encoder_layer(True), floats, 2, 1),
    "post-norm encoder layer": (lambda: encoder_layer(False), floats, 2, 1),
    "nn.MultiheadAttention": (lambda: nn.MultiheadAttention(WIDTH, HEADS, 0.1, batch_first=True), self_attention, 0, 1),
    "einsum": (lambda: zoo("einsum"), lambda b=2, n=12: {"input": floats(b, n)["src"]}, 2 * LAYERS, LAYERS),
    "written out": (Written, floats, 2, 1),
}
"""Name -> (model, its inputs by batch and length, residual branches, attentions)."""


def make(name: str) -> tuple[nn.Module, Callable[..., Inputs]]:
    torch.manual_seed(0)
    model, inputs, _, _ = MODELS[name]
    return model(), inputs


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def run(call: Callable[..., Any], inputs: Inputs) -> list[torch.Tensor]:
    """The outputs; the same dropout every time."""
    torch.manual_seed(1)
    return tensors(call(**inputs))


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def prepare(model: nn.Module, inputs: Inputs, **options: Any) -> nn.Module:
    found = swcompile.prepare(model, kwargs=inputs, **options)
    assert found is model
    return model


def both(name: str, **options: Any) -> dict[str, Any]:
    scale: dict[str, Any] = {"layer_scale": options} if MODELS[name][2] else {}
    return scale | {"qk_layernorm": True}


@pytest.mark.parametrize("name", MODELS)
def test_sites_and_that_eager_and_compiled_agree(name: str) -> None:
    model, inputs = make(name)
    _, _, num_branches, num_attentions = MODELS[name]
    before, names = in_both_modes(model, inputs()), list(model.state_dict())
    prepare(model.eval(), inputs(), **both(name, init=0.5))

    report = swcompile.prepared(model)
    assert report.num_rewritten(Stabilizer.LAYER_SCALE) == len(report_of(report, Stabilizer.LAYER_SCALE)) == num_branches
    assert report.num_rewritten(Stabilizer.QK_LAYERNORM) == len(report_of(report, Stabilizer.QK_LAYERNORM)) == num_attentions
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(LayerScale), kinds.count(QKNorm)) == (num_branches, 2 * num_attentions)
    new = {key for key in model.state_dict() if key not in names}
    assert [key for key in model.state_dict() if key not in new] == names
    assert len(new) == num_branches + 2 * num_attentions

    # Dynamo decides whether hooks and replaced forwards are seen; what comes after it works on aten ops as ever.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for training, batch, length in ((False, 2, 12), (True, 3, 16)):
        model.train(training)
        actual = run(model, inputs(batch, length))
        assert_same(run(compiled, inputs(batch, length)), actual)
        sum(t.float().square().mean() for t in actual if t.requires_grad).backward()
        for key, parameter in model.named_parameters():
            if key in new:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        model.zero_grad()

    assert not torch.equal(run(model.eval(), inputs())[0], before[0])
    unchanged = copy.deepcopy(model)
    for module in unchanged.modules():
        if isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
    leave_out_norms(unchanged)
    assert_same(in_both_modes(unchanged, inputs()), before)
    old = swcompile.strip(model)
    assert list(old.state_dict()) == names and not any(m._forward_hooks or "forward" in m.__dict__ for m in old.modules())
    assert_same(in_both_modes(old, inputs()), before)


def report_of(report: swcompile.Report, kind: Stabilizer) -> list[swcompile.Decision]:
    return [decision for decision in report.decisions if decision.role is kind]


@pytest.mark.parametrize("name", ["llama", "nn.MultiheadAttention", "pre-norm encoder layer"])
def test_sizes_that_change_from_call_to_call(name: str) -> None:
    model, inputs = make(name)
    prepare(model, inputs(), **both(name, init=0.5))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch, length in ((2, 12), (3, 16), (5, 7)):
        assert_same(run(compiled, inputs(batch, length)), run(model, inputs(batch, length)))


@pytest.mark.parametrize("name", MODELS)
def test_gamma_one_and_an_identity_for_a_norm_change_no_bit(name: str) -> None:
    """Of a model that was prepared in training; `test_sites_and_that_eager_and_compiled_agree` prepares it in evaluation."""
    model, inputs = make(name)
    before = in_both_modes(model, inputs())
    prepare(model.train(), inputs(), **both(name, init=1.0))
    leave_out_norms(model)
    assert_same(in_both_modes(model, inputs()), before)


def in_both_modes(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs in evaluation and in training."""
    return [*run(model.eval(), inputs), *run(model.train(), inputs)]


def leave_out_norms(model: nn.Module) -> None:
    """An identity in the place of each norm of queries and keys."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QKNorm):
            model.set_submodule(path, nn.Identity())


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "pre-norm encoder layer", "gpt_neox", "einsum"])
def test_blocks_start_as_the_identity_and_weights_learn_from_the_second_step(name: str) -> None:
    model, inputs = make(name)
    model.train()
    prepare(model, inputs(), layer_scale=True)
    names = [key for key, _ in model.named_parameters()]
    gammas = {key for key in names if key.endswith("gamma")}
    is_block = name in ("einsum", "pre-norm encoder layer")
    inside = {key for key in names if is_block or ".layers." in key or ".h." in key} - gammas
    if name == "pre-norm encoder layer":
        x = inputs()["src"]
        assert torch.equal(model(x), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        sum(t.square().mean() for t in run(model, inputs()) if t.requires_grad).backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            has_gradient = bool(parameter.grad.abs().sum() > 0)
            if key in gammas:
                assert has_gradient
            elif key in inside:
                assert has_gradient == (step > 0) or key.endswith("bias"), (step, key)
        optimizer.step()


def logits(model: nn.Module, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False, output_attentions=True).attentions[0]


def test_norms_before_rotation_keep_attention_relative() -> None:
    model, inputs = make("llama")
    model.set_attn_implementation("eager")
    model.eval()
    ids = inputs()["input_ids"]
    prepare(model, inputs(), qk_layernorm=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_norm.weight" in key and "self_attn" in key:
                parameter.uniform_(0.5, 1.5)  # a scale that a rotation would see
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    expected = logits(model, positions, ids)
    torch.testing.assert_close(logits(model, positions + 7, ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model, positions * 2, ids), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "gpt2", "bert", "t5", "einsum", "pre-norm encoder layer"])
def test_merged_is_scaled(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    prepare(model, inputs(), layer_scale=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayerScale):
                module.gamma.uniform_(0.5, 1.5)
    expected = run(model, inputs())
    report = swcompile.merge_layer_scale(model)
    num_left = sum(isinstance(module, LayerScale) for module in model.modules())
    assert num_left == len(report.decisions) - report.num_rewritten()
    assert num_left == (2 * LAYERS if name == "einsum" else 0)
    for actual, wanted in zip(run(model, inputs()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert all("not in a linear layer" in d.reason or "folded into" in d.reason for d in report.decisions)


def test_a_weight_that_another_layer_has_too_is_not_scaled() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head.weight = self.layer.weight

        def forward(self, x: torch.Tensor, to_head: bool = False) -> torch.Tensor:
            x = x + self.layer(x)
            return self.head(x) if to_head else x

    x = torch.randn(2, WIDTH)
    model = swcompile.prepare(Tied(), x, layer_scale={"init": 0.5})
    expected = model(x, True)
    (decision,) = swcompile.merge_layer_scale(model).decisions
    assert decision.reason == "layer.weight and head.weight are one parameter" and torch.equal(model(x, True), expected)


def test_nothing_to_merge_is_an_error() -> None:
    model, inputs = make("pre-norm encoder layer")
    prepare(model, inputs(), layer_scale=True)
    swcompile.merge_layer_scale(model)
    with pytest.raises(ValueError, match="has no layer-scale to merge"):
        swcompile.merge_layer_scale(model)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_one_sample_and_one_token(fullgraph: bool) -> None:
    """Of a forward that is replaced by its graph, compiled for more of both."""
    model, inputs = make("nn.MultiheadAttention")
    prepare(model.eval(), inputs(), qk_layernorm=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for batch, length in ((2, 12), (1, 12), (3, 1), (1, 1)):
        expected = run(model, inputs(batch, length)) if fullgraph else None  # called before it is compiled
        actual = run(compiled, inputs(batch, length))
        assert_same(actual, expected or run(model, inputs(batch, length)))


class Asking(nn.Module):
    """Attention by a packed parameter of its own, that looks at the sizes of what it is given."""

    def __init__(self, factor: Callable[[int, int], int]):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(3 * WIDTH, WIDTH)), factor

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        x = x if position is None else x + position
        packed = nn.functional.linear(x, self.weight).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
        y = nn.functional.scaled_dot_product_attention(*packed.permute(2, 0, 3, 1, 4).unbind(0))
        return y.transpose(1, 2).reshape(batch, length, WIDTH) * self.factor(batch, length)


FACTORS: dict[str, Callable[[int, int], int]] = {
    "one": lambda batch, length: 2 if batch == 1 else 3,
    "other": lambda batch, length: 2 if length == 5 else 3,
    "multiple": lambda batch, length: 2 if length % 4 == 0 else 3,
    "larger": lambda batch, length: 2 if length > 8 else 3,
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_forward_that_looks_at_sizes(name: str) -> None:
    model = Asking(FACTORS[name])
    expected = {size: model(torch.ones(*size, WIDTH)) for size in ((2, 10), (1, 10), (2, 5), (2, 8), (3, 12))}
    swcompile.prepare(model, torch.ones(2, 10, WIDTH), qk_layernorm=True)
    model.q_norm, model.k_norm = nn.Identity(), nn.Identity()
    for size, wanted in expected.items():
        torch.testing.assert_close(model(torch.ones(*size, WIDTH)), wanted, rtol=0.0, atol=0.0)


def test_inputs_that_are_broadcast() -> None:
    model, x, position = Asking(lambda batch, length: 1), torch.randn(2, 6, WIDTH), torch.randn(1, 6, WIDTH)
    expected = model(x, position)
    swcompile.prepare(model, x, position, qk_layernorm=True)
    model.q_norm, model.k_norm = nn.Identity(), nn.Identity()
    assert torch.equal(model(x, position), expected)


def test_heads_that_are_picked_by_an_index() -> None:
    class MultiQuery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, WIDTH + WIDTH // 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.qkv(x).unflatten(-1, (HEADS + 2, -1))
            q, k, v = (part.transpose(1, 2) for part in (heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]))
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with pytest.raises(ValueError, match="keys: their heads are picked by an index"):
        swcompile.prepare(MultiQuery(), torch.randn(2, 6, WIDTH), qk_layernorm={"over": "model"})
    model, x = MultiQuery(), torch.randn(2, 6, WIDTH)
    expected = model(x)
    swcompile.prepare(model, x, qk_layernorm=True)
    model.q_norm, model.k_norm = nn.Identity(), nn.Identity()
    assert torch.equal(model(x), expected)


def test_padding_in_evaluation() -> None:
    """torch.nn makes nested tensors of padded batches where it is fused."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, WIDTH)
    padding = torch.arange(5).ge(3).expand(2, 5)
    original = model(x, src_key_padding_mask=padding)
    for options in ({"layer_scale": {"init": 1.0}}, {"qk_layernorm": True}):
        swcompile.prepare(model, x, **options)
        with torch.no_grad():
            assert_same([model(x, src_key_padding_mask=padding)], [model(x, src_key_padding_mask=padding)])
            if "layer_scale" in options:
                torch.testing.assert_close(model(x, src_key_padding_mask=padding)[:, :3], original[:, :3])
        swcompile.strip(model)
        assert model.use_nested_tensor


def test_a_part_of_a_prepared_model_is_prepared() -> None:
    model, _ = make("pre-norm encoder layer")
    whole = nn.Sequential(model)
    swcompile.prepare(whole, torch.randn(2, 5, WIDTH), layer_scale=True)
    names = list(whole.state_dict())
    with pytest.raises(ValueError, match="is prepared already, as a part of a larger model"):
        swcompile.prepare(model, torch.randn(2, 5, WIDTH), layer_scale=True)
    assert list(whole.state_dict()) == names


def test_a_graph_that_would_write_to_an_argument_is_an_error() -> None:
    class Cache:
        keys: Any = None

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
            y = x + self.attention(x, x, x)[0] * torch.sigmoid(x)  # no submodule makes what is scaled
            if cache is not None:
                cache.keys = y
            return y

    x = torch.randn(2, 5, WIDTH)
    model = swcompile.prepare(Caching(), x, layer_scale=True)
    assert torch.equal(model(x), x) and "starts at 0, in its own graph" in str(swcompile.prepared(model))
    with pytest.raises(ValueError, match="writes to a Cache that it is called with"):
        model(x, Cache())


def test_all_heads_together_and_rms() -> None:
    model, inputs = make("llama")
    model.eval()
    prepare(model, inputs(), qk_layernorm={"over": "model", "norm": "rms", "eps": 1e-5})
    attention = model.model.layers[0].self_attn
    assert attention.q_norm.weight.shape == (WIDTH,) and attention.k_norm.weight.shape == (WIDTH // 2,)
    x = torch.randn(2, 5, WIDTH)
    q = nn.functional.linear(x, attention.q_proj.weight)
    expected = q * (q.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(attention.q_proj(x), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends(backend: str) -> None:
    model, inputs = make("pre-norm encoder layer")
    prepare(model, inputs(), **both("pre-norm encoder layer", init=0.5))
    expected = run(model.eval(), inputs())
    torch.testing.assert_close(run(torch.compile(model, backend=backend, fullgraph=True), inputs()), expected)


@pytest.mark.parametrize("name", ["llama", "pre-norm encoder layer"])
def test_switchback_still_rewrites_every_linear_layer(name: str) -> None:
    model, inputs = make(name)
    counts = []
    for prepared in (False, True):
        if prepared:
            prepare(model, inputs(), **both(name, init=0.1))
        joint = swcompile.capture(model, kwargs=inputs())
        joint.run_passes(swcompile.joint_passes(swcompile.make_recipe({"skip_slower": False})))
        counts.append([sum(m.role is role and m.number_format is not None for m in matmuls(joint.graph)) for role in Role])
    assert counts[0] == counts[1] and counts[1][0] > 0
    if name == "pre-norm encoder layer":
        compiled = torch.compile(model.eval(), backend="switchback", fullgraph=True, options={"skip_slower": False})
        actual, expected = run(compiled, inputs())[0], run(model, inputs())[0]
        assert 0 < (actual - expected).norm() / expected.norm() < 0.05


def test_generation_with_a_cache() -> None:
    model, inputs = make("llama")
    model.eval()
    prepare(model, inputs(), layer_scale={"init": 0.5}, qk_layernorm=True)
    ids = inputs()["input_ids"]
    step = model(input_ids=ids[:, :-1], use_cache=True)
    last = model(input_ids=ids[:, -1:], past_key_values=step.past_key_values, use_cache=True)
    whole = model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "pre-norm encoder layer"])
def test_copies_and_checkpoints(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    old = copy.deepcopy(model.state_dict())
    prepare(model, inputs(), **both(name, init=0.5))
    expected = run(model, inputs())
    missing, unexpected = model.load_state_dict(old, strict=False)
    assert not unexpected and all("layer_scale" in key or "_norm" in key for key in missing)

    copied = copy.deepcopy(model)
    assert_same(run(copied, inputs()), expected)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, LayerScale | QKNorm):
                for parameter in module.parameters():
                    parameter.mul_(2)
    assert not torch.equal(run(copied, inputs())[0], expected[0])
    assert_same(run(model, inputs()), expected)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(run(torch.load(buffer, weights_only=False), inputs()), expected)


def test_patterns_and_strict() -> None:
    model, inputs = model_zoo.CASES["llama"](2).model, tokens
    prepare(model, inputs(), layer_scale={"include": "*.mlp*", "exclude": ["*.layers.1.*"]})
    assert [key for key in model.state_dict() if "layer_scale" in key] == ["model.layers.0.mlp_layer_scale.gamma"]
    reasons = {d.parameter: d.reason for d in swcompile.prepared(model).decisions}
    assert reasons["model.layers.0.self_attn.o_proj"] == "no include pattern matches"
    assert reasons["model.layers.1.mlp.down_proj"] == "exclude pattern '*.layers.1.*' matches"
    swcompile.strip(model)
    with pytest.warns(UserWarning, match="layer_scale: pattern 'nothing' matches no residual branch"):
        prepare(model, inputs(), layer_scale={"exclude": "nothing"})
    swcompile.strip(model)
    with pytest.raises(ValueError, match="matches no residual branch"):
        prepare(model, inputs(), layer_scale={"exclude": "nothing"}, strict=True)


def test_report_is_a_table() -> None:
    model, inputs = model_zoo.CASES["vit"](2).model, images
    text = str(swcompile.prepared(prepare(model, inputs(), layer_scale=True, qk_layernorm=True)))
    assert text.splitlines()[0] == "prepare: layer_scale in 4 of 4, qk_layernorm in 2 of 2"
    assert "vit.layers.{0-1}.mlp.fc2" in text and "mlp_layer_scale, starts at 0" in text
    assert "q_norm and k_norm, over the head" in text and "in its own graph" not in text


class NoSites(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to insert: pass layer_scale=True"),
    "unknown option": ({"layer_scale": {"initial": 0}}, "layer_scale: unknown option 'initial'; did you mean 'init'"),
    "unknown value": ({"qk_layernorm": {"over": "heads"}}, "qk_layernorm: over is 'heads'; did you mean 'head'"),
    "no number": ({"layer_scale": {"init": "zero"}}, "layer_scale: init is 'zero'; it takes a finite number"),
    "no options": ({"layer_scale": 3}, "layer_scale is 3; it takes True, or a dict of its options"),
    "not finite": ({"layer_scale": {"init": float("nan")}}, "it takes a finite number"),
    "no glob": ({"layer_scale": {"include": 3}}, "option 'include' is 3; it takes a glob"),
    "nowhere": ({"layer_scale": {"include": "*out_projj"}}, "layer_scale can be inserted nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_change_nothing(case: str) -> None:
    options, message = BAD[case]
    model = Written()
    state = list(model.state_dict())
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        swcompile.prepare(model, torch.randn(2, 5, WIDTH), **options)
    assert list(model.state_dict()) == state and not any(m._forward_hooks for m in model.modules())


def test_options_are_checked_when_they_are_made() -> None:
    assert swcompile.LayerScaleOptions(include="*linear2").include == ("*linear2",)
    assert swcompile.QKLayernormOptions(over="model", exclude=["a", "b"]) == swcompile.QKLayernormOptions(
        over=swcompile.stabilizers.Over.MODEL, exclude=("a", "b")
    )
    with pytest.raises(ValueError, match="init is '0'; it takes a finite number"):
        swcompile.LayerScaleOptions(init="0")
    with pytest.raises(ValueError, match="over is 'heads'; did you mean 'head'"):
        swcompile.QKLayernormOptions(over="heads")


def test_errors_name_the_place() -> None:
    with pytest.raises(ValueError, match="no residual branch was found in the forward of NoSites"):
        swcompile.prepare(NoSites(), torch.randn(3), layer_scale=True)
    with pytest.raises(ValueError, match="no attention was found in the forward of NoSites"):
        swcompile.prepare(NoSites(), torch.randn(3), qk_layernorm=True)
    model = Written()
    x = torch.randn(2, 5, WIDTH)
    swcompile.prepare(model, x, layer_scale=True)
    state = list(model.state_dict())
    for again in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="is prepared already; swcompile.strip"):
            swcompile.prepare(again, x, qk_layernorm=True)
    assert list(model.state_dict()) == state
    for function in (swcompile.strip, swcompile.prepared, swcompile.merge_layer_scale):
        with pytest.raises(ValueError, match="NoSites is not prepared"):
            function(NoSites())


def test_a_name_that_is_taken_is_an_error() -> None:
    model = Written()
    model.q_norm = nn.Identity()
    with pytest.raises(ValueError, match="q_norm is the name of something else already"):
        swcompile.prepare(model, torch.randn(2, 5, WIDTH), qk_layernorm=True)
    assert isinstance(model.q_norm, nn.Identity)


def test_a_layer_that_is_called_twice_has_one_layer_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Written()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x))

    model = swcompile.prepare(Shared(), torch.randn(2, 5, WIDTH), layer_scale={"init": 0.5}, qk_layernorm=True)
    assert len([key for key in model.state_dict() if "layer_scale" in key]) == 2
    assert swcompile.prepared(model).num_rewritten(Stabilizer.LAYER_SCALE) == 4


def test_inputs_of_another_kind_are_captured_when_they_come() -> None:
    model, _ = make("nn.MultiheadAttention")
    x = torch.randn(2, 5, WIDTH)
    model.eval()
    swcompile.prepare(model, x, x, x, qk_layernorm=True)
    mask = torch.ones(5, 5).triu(1).bool()
    expected = model(x, x, x, attn_mask=mask, need_weights=False)
    assert expected[1] is None
    torch.testing.assert_close(expected[0], model(x, x, x, attn_mask=mask)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], model(x, x, x, need_weights=False)[0])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x, attn_mask=mask, need_weights=False)[0], expected[0])
    with pytest.raises(Exception, match="called in a new way: call it like this once before it is compiled"):
        compiled(x, x, x, key_padding_mask=torch.zeros(2, 5).bool())
