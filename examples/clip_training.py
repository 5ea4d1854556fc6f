"""Trains a CLIP of `clip_model.py` on the glyphs of `glyphs.py`, compiled by one backend or another."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from clip_model import ClipSize, GlyphClip, encode_in_batches, zero_shot_accuracy
from glyphs import GlyphCorpus, NameTokenizer, unique_name_batches
from run_results import PeakMemory, RunResult, Stopwatch
from torch import Tensor, nn

import swcompile

OPTIMIZERS: dict[str, dict[str, Any]] = {"stable_adamw": {}, "adamw": {"clip_threshold": None}}
"""AdamW is StableAdamW without update clipping: the same code, and its RMS to compare."""
WATCHED = "clip.vision_model.embeddings.patch_embedding.weight"
"""The parameter whose RMS is kept: in CLIP models spikes begin at the patch embedding (arXiv 2304.13013, Section 3.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is trained, and how: the same for all runs of the program."""

    size: ClipSize
    recipes: tuple[str, ...] = ("switchback",)
    """Recipes of the switchback backend to train with, after the baseline."""
    skip_slower: bool = True
    """Whether matmuls that int8 would make slower stay as they are."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    eval_glyphs: int | None = None
    """Number of test glyphs to classify; None for all."""
    output: Path = Path("runs/train_clip")
    stabilizers: Mapping[str, Any] = field(default_factory=dict)
    """What `swcompile.prepare` inserts in the model of every run: ``layer_scale``, ``qk_layernorm``."""
    optimizers: tuple[str, ...] = ("stable_adamw",)
    """Of `OPTIMIZERS`: every run is done with each."""
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if self.size.num_steps < 2:
            raise ValueError(
                f"steps: got {self.size.num_steps}, wanted at least 2, as the first one compiles"
            )
        if self.size.batch_size < 2:
            raise ValueError(f"batch size: got {self.size.batch_size}, wanted at least 2, to have a contrast")
        if self.eval_glyphs is not None and self.eval_glyphs < 1:
            raise ValueError(f"eval glyphs: got {self.eval_glyphs}, wanted at least 1")
        unknown = [recipe for recipe in self.recipes if recipe not in swcompile.RECIPES]
        if unknown:
            raise ValueError(f"recipe: got {unknown[0]!r}, wanted some of {', '.join(swcompile.RECIPES)}")
        unknown = [optimizer for optimizer in self.optimizers if optimizer not in OPTIMIZERS]
        if unknown or not self.optimizers:
            raise ValueError(f"optimizer: got {', '.join(unknown)!r}, wanted some of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: its name, and how the model is compiled."""

    name: str
    backend: str = "inductor"
    options: dict[str, Any] | None = None
    optimizer: str = "stable_adamw"

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, compiled whole and for the shapes of its first call."""
        return torch.compile(
            function, backend=self.backend, options=self.options, fullgraph=True, dynamic=False
        )


def plan_runs(settings: Settings) -> list[Run]:
    """With each optimizer the baseline, then one run for each recipe."""
    plain = Run(name="bf16" if settings.device.type == "cuda" else "fp32")
    runs = [plain]
    for recipe in settings.recipes:
        options = {"recipe": recipe, "skip_slower": settings.skip_slower}
        runs.append(Run(name=recipe, backend="switchback", options=options))
    if len(settings.optimizers) == 1:
        return [replace(run, optimizer=settings.optimizers[0]) for run in runs]
    return [
        replace(run, name=f"{run.name}, {optimizer}", optimizer=optimizer)
        for run in runs
        for optimizer in settings.optimizers
    ]


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 on a GPU; on a CPU everything stays float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def build_optimizer(model: nn.Module, settings: Settings, optimizer: str) -> swcompile.StableAdamW:
    """Without weight decay for biases, norms, the class embedding, layer-scales and the logit scale."""
    groups = swcompile.split_decay_groups(model, settings.weight_decay)
    return swcompile.StableAdamW(
        groups, lr=settings.size.learning_rate, betas=settings.betas, **OPTIMIZERS[optimizer]
    )


def learning_rate(step: int, size: ClipSize) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine down to 0."""
    num_warmup = max(1, size.num_steps // 10)
    if step < num_warmup:
        return size.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / (size.num_steps - num_warmup)
    return size.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def train(run: Run, corpus: GlyphCorpus, settings: Settings) -> RunResult:
    """Train a new model as `run` says, and classify the test glyphs with it."""
    size, device = settings.size, settings.device
    torch.manual_seed(settings.seed)
    torch.compiler.reset()
    labels = corpus.train.labels
    tokenizer = NameTokenizer([corpus.names[label] for label in labels.unique().tolist()])
    token_ids = tokenizer.encode_all(corpus.names).to(device)
    images = corpus.train.images.to(device)
    model = GlyphClip(size, tokenizer, token_ids.shape[1]).to(device)
    if settings.stabilizers:
        swcompile.prepare(model, images[:2], token_ids[:2], **settings.stabilizers)
        print(f"{run.name}: {swcompile.prepared(model).summary()}")
    optimizer = build_optimizer(model, settings, run.optimizer)
    watched = optimizer.parameter_names().index(WATCHED)
    batches = unique_name_batches(labels, size.batch_size, seed=settings.seed)
    compiled_model = run.compile(model)

    def train_step(step: int) -> Tensor:
        glyphs = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size)
        with autocast(device):
            loss = compiled_model(images[glyphs.to(device)], token_ids[labels[glyphs].to(device)])
        loss.backward()
        optimizer.step()
        rms.append(optimizer.last_rms()[watched])
        optimizer.zero_grad()
        model.clamp_logit_scale()
        return loss.detach()

    rms: list[Tensor] = []
    compilation = Stopwatch()
    losses = [train_step(0)]
    compile_seconds = compilation.seconds()
    print(f"{run.name}: compiled in {compile_seconds:.0f} s, loss {losses[0].item():.3f}", flush=True)
    report_rewrites(run, settings)

    training, peak_memory = Stopwatch(), PeakMemory(device)
    interval = max(1, size.num_steps // 10)
    for step in range(1, size.num_steps):
        losses.append(train_step(step))
        if (step + 1) % interval == 0 or step + 1 == size.num_steps:
            seconds_per_step = training.seconds() / step
            print(
                f"{run.name}: step {step + 1:>5}/{size.num_steps}"
                f"  loss {torch.stack(losses[-interval:]).mean().item():.3f}"
                f"  lr {learning_rate(step, size):.1e}"
                f"  {size.batch_size / seconds_per_step:,.0f} samples/s"
                f"  {seconds_per_step * (size.num_steps - step - 1):.0f} s left",
                flush=True,
            )
    samples_per_second = size.batch_size * (size.num_steps - 1) / training.seconds()
    peak_memory_mib = peak_memory.mib()

    top1, top5, eval_compile_seconds = classify(run, model, token_ids, corpus, settings)
    losses_cpu = torch.stack(losses).cpu()
    return RunResult(
        name=run.name,
        final_loss=losses_cpu[-max(1, size.num_steps // 10) :].mean().item(),
        top1=top1,
        top5=top5,
        times_chance=top1 / corpus.chance,
        samples_per_second=samples_per_second,
        compile_seconds=compile_seconds + eval_compile_seconds,
        peak_memory_mib=peak_memory_mib,
        losses=losses_cpu.tolist(),
        rms=torch.stack(rms).tolist(),
    )


def classify(
    run: Run, model: GlyphClip, token_ids: Tensor, corpus: GlyphCorpus, settings: Settings
) -> tuple[float, float, float]:
    """Pick a name for each test glyph: top-1 and top-5 accuracy, and the seconds it took to compile both towers."""
    batch_size, device = settings.size.batch_size, settings.device
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(corpus.test), generator=generator)[: settings.eval_glyphs]
    images = corpus.test.images[chosen].to(device)
    encode_images, encode_names = run.compile(model.encode_images), run.compile(model.encode_names)
    with torch.no_grad(), autocast(device):
        compilation = Stopwatch()
        encode_in_batches(encode_images, images[:batch_size], batch_size)
        encode_in_batches(encode_names, token_ids[:batch_size], batch_size)
        compile_seconds = compilation.seconds()
        image_features = encode_in_batches(encode_images, images, batch_size)
        text_features = encode_in_batches(encode_names, token_ids, batch_size)
    top1, top5 = zero_shot_accuracy(image_features, text_features, corpus.test.labels[chosen].to(device))
    return top1, top5, compile_seconds


def report_rewrites(run: Run, settings: Settings) -> None:
    """Print what the backend rewrote in the training step, and write the table of all matmuls."""
    if run.backend == "switchback":
        report = swcompile.reports()[-1]
        path = settings.output / f"report_{run.name}.txt"
        path.write_text(f"{report}\n")
        print(f"{report.summary()} (see {path})")
