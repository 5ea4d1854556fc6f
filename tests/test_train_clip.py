"""The training example: its schedule, its optimiser, its classification, and three steps from end to end."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import sweep_learning_rates
import train_clip
from clip_model import SIZES, ClipSize, GlyphClip, Tower, encode_in_batches, zero_shot_accuracy
from clip_training import Run, Settings, build_optimizer, learning_rate, plan_runs
from glyphs import GlyphCorpus, Glyphs, NameTokenizer, render_corpus
from PIL import Image
from run_results import RunResult

import swcompile

SMALLEST = ClipSize(
    vision=Tower(width=32, num_layers=1, num_heads=2),
    text=Tower(width=32, num_layers=1, num_heads=2),
    embed_dim=16,
    image_size=16,
    patch_size=8,
    batch_size=8,
    num_steps=3,
    learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def corpus() -> GlyphCorpus:
    """The first 200 characters: 3,000 glyphs, quickly classified."""
    whole = render_corpus(16)

    def first_characters(glyphs: Glyphs) -> Glyphs:
        kept = glyphs.labels < 200
        return replace(glyphs, images=glyphs.images[kept], labels=glyphs.labels[kept])

    return GlyphCorpus(
        train=first_characters(whole.train), test=first_characters(whole.test), names=whole.names[:200]
    )


def _model(size: ClipSize = SMALLEST) -> tuple[GlyphClip, NameTokenizer]:
    torch.manual_seed(0)
    tokenizer = NameTokenizer(["LATIN SMALL LETTER A", "DIGIT ONE", "FULL STOP"])
    return GlyphClip(size, tokenizer, context_length=8).eval(), tokenizer


def test_three_steps_leave_results_table_and_plot(
    corpus: GlyphCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(size=SMALLEST, recipes=(), eval_glyphs=20, output=tmp_path / "run")
    (result,) = train_clip.train_all(corpus, settings)

    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert document["settings"]["size"]["batch_size"] == 8
    assert document["chance"] == 1 / 200
    (saved,) = document["runs"]
    assert saved["name"] == "fp32"
    assert saved["losses"] == result.losses
    assert len(saved["losses"]) == 3
    assert saved["rms"][0] == pytest.approx(1.0, rel=1e-3) and len(set(saved["rms"])) == 3
    # Before it has learnt anything, the loss is that of guessing among the batch.
    assert saved["losses"][0] == pytest.approx(math.log(8), rel=0.2)
    assert saved["final_loss"] == saved["losses"][-1]
    assert 0 <= saved["top1"] <= saved["top5"] <= 1
    assert saved["times_chance"] == pytest.approx(200 * saved["top1"])
    assert saved["samples_per_second"] > 0
    assert saved["compile_seconds"] > 0
    assert saved["peak_memory_mib"] is None or saved["peak_memory_mib"] > 1

    printed = capsys.readouterr().out
    assert "step     3/3" in printed
    for heading in ("run", "loss", "top-1", "top-5", "chance", "samples/s", "compile", "memory", "fp32"):
        assert heading in printed
    with Image.open(tmp_path / "run" / "losses.png") as plot:
        assert plot.width >= 600
        assert len(plot.convert("RGB").getcolors(maxcolors=2**24) or ()) > 10


def test_the_sweep_has_a_run_for_each_rate_and_variant(
    corpus: GlyphCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(run: Run, corpus: GlyphCorpus, settings: Settings) -> RunResult:
        seen.append((run.name, run.backend, settings.size.learning_rate, dict(settings.stabilizers)))
        diverged = settings.size.learning_rate > 0.1 and not settings.stabilizers
        loss = float("nan") if diverged else 1.0 + len(seen) / 8
        numbers = {"top1": 0.25, "top5": 0.5, "times_chance": 50.0, "samples_per_second": 1.0}
        histories = {"losses": [loss], "rms": [1.0]}
        return RunResult(name=run.name, final_loss=loss, compile_seconds=0, peak_memory_mib=None, **histories, **numbers)

    monkeypatch.setattr(sweep_learning_rates, "train", train)
    results = sweep_learning_rates.sweep(corpus, Settings(size=SMALLEST), (0.01, 1.0), "switchback")
    both = {"qk_layernorm": True, "layer_scale": True}
    assert seen[0] == ("0.01, plain", "switchback", 0.01, {}) and seen[-1] == ("1, both", "switchback", 1.0, both)
    table = sweep_learning_rates.table(results, (0.01, 1.0), batch_size=8)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["0.01", "1"] and cells[1] == ["1.12 (25.0%)", "diverged (nan)"]
    assert cells[4] == ["1.88 (25.0%)", "diverged (2.00)"]  # no better than guessing among 8


def test_every_run_is_done_with_each_optimizer() -> None:
    settings = train_clip.parse_settings(["--recipe", "none", "--optimizer", "adamw,stable_adamw", "--beta2", "0.999", "--device", "cpu"])
    assert [run.name for run in plan_runs(settings)] == ["fp32, adamw", "fp32, stable_adamw"]
    model, _ = _model()
    thresholds = []
    for run in plan_runs(settings):
        optimizer = build_optimizer(model, settings, run.optimizer)
        assert optimizer.defaults["betas"] == (0.9, 0.999)
        thresholds.append(optimizer.defaults["clip_threshold"])
    assert thresholds == [None, 1.0]
    assert [run.name for run in plan_runs(train_clip.parse_settings(["--device", "cpu"]))] == ["fp32", "switchback"]


def test_an_unknown_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_clip.parse_settings(["--optimizer", "adam"])
    assert "optimizer: got 'adam', wanted some of stable_adamw, adamw" in capsys.readouterr().err


def test_the_options_that_stabilise() -> None:
    settings = train_clip.parse_settings(["--layer-scale", "--qk-layernorm"])
    assert settings.stabilizers == {"layer_scale": True, "qk_layernorm": True}
    model, tokenizer = _model()
    images = torch.zeros(2, 16, 16, dtype=torch.uint8)
    swcompile.prepare(model, images, tokenizer.encode_all(["A", "B"]), **settings.stabilizers)
    assert swcompile.prepared(model).summary() == "prepare: layer_scale in 4 of 4, qk_layernorm in 2 of 2"


def test_the_loss_falls_on_a_batch_that_repeats() -> None:
    model, tokenizer = _model()
    optimizer = build_optimizer(model, Settings(size=SMALLEST), "stable_adamw")
    images = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    token_ids = tokenizer.encode_all(["LATIN SMALL LETTER A", "DIGIT ONE", "FULL STOP"])
    losses = []
    for _ in range(60):
        loss = model(images, token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3), rel=0.5)
    assert losses[-1] < 0.1


def test_text_is_pooled_at_its_end_so_padding_does_not_matter() -> None:
    model, tokenizer = _model()
    ids = torch.tensor([tokenizer.encode("FULL STOP")])
    padded = torch.cat([ids, torch.full((1, 3), tokenizer.pad_id)], dim=1)
    with torch.no_grad():
        # The same sums in another order: a few units in the last place of a number below 1.
        torch.testing.assert_close(model.encode_names(ids), model.encode_names(padded), rtol=0, atol=1e-5)
        assert not torch.allclose(
            model.encode_names(ids),
            model.encode_names(torch.tensor([tokenizer.encode("DIGIT ONE")])),
            atol=1e-2,
        )


def test_features_are_unit_vectors_and_the_logit_scale_is_clamped() -> None:
    model, _ = _model()
    with torch.no_grad():
        features = model.encode_images(torch.zeros(2, 16, 16, dtype=torch.uint8))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
        for value, clamped in ((7.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
            model.clip.logit_scale.fill_(value)
            model.clamp_logit_scale()
            assert model.clip.logit_scale.item() == pytest.approx(clamped)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    size = replace(SMALLEST, num_steps=100, learning_rate=1.0)
    rates = [learning_rate(step, size) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_only_matrices_decay() -> None:
    model, _ = _model()
    decaying, others = build_optimizer(model, Settings(size=SMALLEST), "stable_adamw").param_groups
    assert decaying["weight_decay"] == 0.2 and others["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    undecayed = {names[id(parameter)] for parameter in others["params"]}
    assert len(decaying["params"]) + len(undecayed) == len(names)
    vectors = {
        name for name in names.values() if name.endswith(".bias") or "norm" in name or "layrnorm" in name
    }
    assert undecayed == vectors | {"clip.logit_scale", "clip.vision_model.embeddings.class_embedding"}


def test_encoding_in_batches_pads_the_last() -> None:
    sizes = []

    def double(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return 2 * batch

    inputs = torch.arange(14.0).reshape(7, 2)
    assert torch.equal(encode_in_batches(double, inputs, 3), 2 * inputs)
    assert sizes == [3, 3, 3]


def test_zero_shot_accuracy_counts_the_right_names() -> None:
    names = torch.eye(8)
    images = torch.stack([names[0], names[1] + 0.5 * names[2], 0.1 * torch.arange(8.0)])
    assert zero_shot_accuracy(images, names, torch.tensor([0, 2, 3])) == pytest.approx((1 / 3, 1.0))
    assert zero_shot_accuracy(images, names, torch.tensor([0, 2, 2])) == pytest.approx((1 / 3, 2 / 3))


def test_plan_has_the_baseline_first() -> None:
    runs = plan_runs(Settings(size=SMALLEST, recipes=("switchback", "llm_int8"), skip_slower=False))
    assert [(run.name, run.backend) for run in runs] == [
        ("fp32", "inductor"),
        ("switchback", "switchback"),
        ("llm_int8", "switchback"),
    ]
    assert runs[0].options is None
    assert runs[2].options == {"recipe": "llm_int8", "skip_slower": False}


def test_flags_override_the_size() -> None:
    flags = "--device cpu --size small --steps 7 --batch-size 16 --lr 0.5 --patch-size 16 --image-size 64"
    settings = train_clip.parse_settings([*flags.split(), "--recipe", "switchback_m,llm_int8"])
    assert settings.size == replace(
        SIZES["small"], num_steps=7, batch_size=16, learning_rate=0.5, patch_size=16, image_size=64
    )
    assert settings.recipes == ("switchback_m", "llm_int8")
    assert settings.skip_slower is False
    assert train_clip.parse_settings(["--device", "cpu"]).size == SIZES["tiny"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size gigantic", "invalid choice: 'gigantic'"),
        ("--steps 1", "steps: got 1, wanted at least 2"),
        ("--batch-size 1", "batch size: got 1"),
        ("--patch-size 5", "patch_size: got 5, wanted a divisor of the image size, 32"),
        ("--recipe switchbok", "recipe: got 'switchbok', wanted some of switchback"),
        ("--eval-glyphs 0", "eval glyphs: got 0"),
        ("--device abacus", "abacus"),
    ],
)
def test_nonsense_is_refused_with_a_message(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_clip.parse_settings(["--device", "cpu", *flags.split()])
    assert message in capsys.readouterr().err


def test_every_size_builds_on_the_meta_device() -> None:
    """Dimensions fit together, and the largest is a ViT-H/14."""
    tokenizer = NameTokenizer(["FULL STOP"])
    with torch.device("meta"):
        models = {name: GlyphClip(size, tokenizer, 8) for name, size in SIZES.items()}
    counts = {name: sum(p.numel() for p in m.clip.vision_model.parameters()) for name, m in models.items()}
    assert list(counts.values()) == sorted(counts.values())
    assert counts["huge"] == pytest.approx(632e6, rel=0.01)
