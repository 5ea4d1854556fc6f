"""Train a CLIP on glyphs of real fonts twice, in ordinary precision and in int8, and compare.

    python examples/train_clip.py                                            # on a CPU: the demo, a few minutes
    python examples/train_clip.py --size huge --recipe switchback,llm_int8   # ViT-H/14, on a large GPU

The same model is trained from the same seed on the same batches: first with plain `torch.compile`, in bfloat16 (on
a CPU in float32), then with `torch.compile(..., backend="switchback")` for each recipe. The test images come from
fonts that are never trained on (see glyphs.py); for each, the model picks a name among those of all characters.
Nothing is downloaded. The output folder gets results.json, losses.png and, for each recipe, a report of what was
rewritten.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

# Read when PyTorch is imported. On a CPU that is shared, threads that spin while they wait for each other take the
# time that the others need: 3 to 5 times slower on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from clip_model import SIZES
from clip_training import Settings, plan_runs, train
from glyphs import GlyphCorpus, render_corpus
from rich.console import Console
from run_results import RunResult, Stopwatch, plot_losses, results_table, save_results


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line; exits with a message where they make no sense."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model and schedule")
    model.add_argument(
        "--size", choices=SIZES, help="default: tiny on a CPU, base on a GPU; it sets what follows"
    )
    model.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the rendered glyphs")
    model.add_argument("--patch-size", type=int, metavar="PIXELS", help="side of the vision tower's patches")
    model.add_argument("--steps", type=int, metavar="N", help="training steps of each run")
    model.add_argument("--batch-size", type=int, metavar="N", help="image-text pairs in a step")
    model.add_argument("--lr", type=float, metavar="RATE", help="highest learning rate")
    model.add_argument(
        "--beta2", type=float, metavar="BETA", default=0.98, help="decay of the second moment; default: %(default)s"
    )
    model.add_argument(
        "--layer-scale", action="store_true", help="zero-init layer-scale on every residual branch, in all runs"
    )
    model.add_argument(
        "--qk-layernorm", action="store_true", help="layer norm on attention's queries and keys, in all runs"
    )
    run = parser.add_argument_group("runs")
    run.add_argument(
        "--recipe",
        default="switchback",
        metavar="NAME[,NAME...]",
        help="recipes to train with after the baseline, or none; default: %(default)s",
    )
    run.add_argument(
        "--optimizer",
        default="stable_adamw",
        metavar="NAME[,NAME...]",
        help="stable_adamw, adamw, or both to do every run with each; default: %(default)s",
    )
    run.add_argument(
        "--skip-slower",
        action=argparse.BooleanOptionalAction,
        help="leave matmuls alone that int8 would make slower; default: on a GPU only",
    )
    run.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    run.add_argument("--seed", type=int, default=0, help="of the weights and the batches; default: 0")
    run.add_argument("--eval-glyphs", type=int, metavar="N", help="test glyphs to classify; default: all")
    run.add_argument(
        "--output", type=Path, default=Path("runs/train_clip"), help="folder; default: %(default)s"
    )
    args = parser.parse_args(arguments)

    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
        if device.type == "cuda" and not has_gpu:
            raise ValueError(f"device: got {args.device}, but PyTorch sees no CUDA device")
        on_gpu = device.type != "cpu"
        overrides = {
            "image_size": args.image_size,
            "patch_size": args.patch_size,
            "num_steps": args.steps,
            "batch_size": args.batch_size,
            "learning_rate": args.lr,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        stabilizers = {"layer_scale": args.layer_scale, "qk_layernorm": args.qk_layernorm}
        return Settings(
            size=replace(SIZES[args.size or ("base" if on_gpu else "tiny")], **given),
            recipes=() if args.recipe == "none" else tuple(filter(None, args.recipe.split(","))),
            optimizers=tuple(filter(None, args.optimizer.split(","))),
            betas=(0.9, args.beta2),
            skip_slower=on_gpu if args.skip_slower is None else args.skip_slower,
            device=device,
            seed=args.seed,
            eval_glyphs=args.eval_glyphs,
            output=args.output,
            stabilizers={name: True for name, wanted in stabilizers.items() if wanted},
        )
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))


def train_all(corpus: GlyphCorpus, settings: Settings) -> list[RunResult]:
    """Do all runs, then print and save what they gave."""
    settings.output.mkdir(parents=True, exist_ok=True)
    results = [train(run, corpus, settings) for run in plan_runs(settings)]
    save_results(
        results,
        settings.output / "results.json",
        settings=asdict(settings),
        num_train_glyphs=len(corpus.train),
        num_test_glyphs=len(corpus.test),
        num_names=len(corpus.names),
        chance=corpus.chance,
    )
    plot_losses(results, settings.output / "losses.png")
    Console().print(results_table(results))
    return results


def main() -> None:
    """Render the glyphs and train on them as the command line says."""
    settings = parse_settings()
    rendering = Stopwatch()
    corpus = render_corpus(settings.size.image_size)
    print(
        f"{len(corpus.train):,} glyphs of {len(corpus.train.fonts)} fonts to train on, {len(corpus.test):,} of "
        f"{', '.join(corpus.test.fonts)} to test on, {len(corpus.names):,} names: chance is {corpus.chance:.4%} "
        f"(rendered in {rendering.seconds():.0f} s)",
        flush=True,
    )
    train_all(corpus, settings)
    print(f"wrote {settings.output / 'results.json'} and {settings.output / 'losses.png'}")


if __name__ == "__main__":
    main()
