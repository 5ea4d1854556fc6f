"""Train a CLIP on glyphs at several learning rates, plain and stabilised, and show which runs survive.

    python examples/sweep_learning_rates.py
    python examples/sweep_learning_rates.py --size small --steps 1000 --lr 1e-3,2e-3,5e-3,1e-2 --jobs 4

Every run starts from the same seed and sees the same batches, in int8 (`--recipe`), in small layers too, which that makes
no faster, or in ordinary precision (`--recipe none`). The table has one line a learning rate and one column for each of: the plain model, qk-layernorm,
layer-scale, and both. A run that is no better than guessing at its end, or has left the numbers, has diverged.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from clip_model import SIZES
from clip_training import OPTIMIZERS, Run, Settings, train
from glyphs import GlyphCorpus, render_corpus
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from run_results import RunResult, save_results

VARIANTS = {
    "plain": {},
    "qk-layernorm": {"qk_layernorm": True},
    "layer-scale": {"layer_scale": True},
    "both": {"qk_layernorm": True, "layer_scale": True},
}


def sweep(
    corpus: GlyphCorpus, settings: Settings, rates: Sequence[float], recipe: str, jobs: int = 1
) -> list[RunResult]:
    """One run for each variant and learning rate, named after both; variants in up to `jobs` processes at a time."""
    train_variant = partial(sweep_rates, corpus, settings, rates, recipe)
    if jobs == 1:
        results = [train_variant(name) for name in VARIANTS]
    else:
        with torch.multiprocessing.get_context("spawn").Pool(jobs) as pool:
            results = pool.map(train_variant, VARIANTS, chunksize=1)
            pool.close()
            pool.join()  # or the processes end before what they started
    return [result for variant in results for result in variant]


def sweep_rates(
    corpus: GlyphCorpus, settings: Settings, rates: Sequence[float], recipe: str, variant: str
) -> list[RunResult]:
    """The runs of one variant: the first one compiles, the others find its kernels in the cache."""
    results = []
    for rate in rates:
        size = replace(settings.size, learning_rate=rate)
        backend = "inductor" if recipe == "none" else "switchback"
        options = None if recipe == "none" else {"recipe": recipe, "skip_slower": settings.skip_slower}
        run = Run(name=f"{rate:g}, {variant}", backend=backend, options=options, optimizer=settings.optimizers[0])
        results.append(train(run, corpus, replace(settings, size=size, stabilizers=VARIANTS[variant])))
    return results


def table(results: Sequence[RunResult], rates: Sequence[float], batch_size: int) -> Table:
    """Final loss and top-1 accuracy by learning rate and variant."""
    shown = Table(title="Final loss and top-1 accuracy, by learning rate", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("rate", *VARIANTS):
        shown.add_column(heading, justify="right", no_wrap=True)
    by_name = {result.name: result for result in results}
    for rate in rates:
        cells = [_cell(by_name[f"{rate:g}, {name}"], batch_size) for name in VARIANTS]
        shown.add_row(f"{rate:g}", *cells)
    return shown


def _cell(result: RunResult, batch_size: int) -> str:
    guessing = math.log(batch_size)
    if not result.final_loss <= 0.95 * guessing:  # also where it is no number
        return f"diverged ({result.final_loss:.2f})"
    return f"{result.final_loss:.2f} ({result.top1:.1%})"


def main() -> None:
    """Render the glyphs, train on them as the command line says, and write and print the table."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each run")
    parser.add_argument("--batch-size", type=int, metavar="N", help="image-text pairs in a step")
    parser.add_argument("--lr", default="2e-3,5e-3,1e-2,2e-2", metavar="RATE[,RATE...]", help="default: %(default)s")
    parser.add_argument("--recipe", default="switchback", metavar="NAME", help="or none; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time; default: %(default)s")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="stable_adamw survives more by itself; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--eval-glyphs", type=int, metavar="N", help="test glyphs to classify; default: all")
    parser.add_argument("--output", type=Path, default=Path("runs/learning_rates"), help="folder; default: %(default)s")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"num_steps": args.steps, "batch_size": args.batch_size}
    try:
        rates = [float(rate) for rate in args.lr.split(",")]
        if args.jobs < 1:
            raise ValueError(f"jobs: got {args.jobs}, wanted at least 1")
        settings = Settings(
            size=replace(SIZES[args.size], **{name: value for name, value in given.items() if value is not None}),
            recipes=() if args.recipe == "none" else (args.recipe,),
            optimizers=(args.optimizer,),
            skip_slower=False,
            device=device,
            seed=args.seed,
            eval_glyphs=args.eval_glyphs,
            output=args.output,
        )
    except ValueError as error:
        parser.error(str(error))
    settings.output.mkdir(parents=True, exist_ok=True)
    corpus = render_corpus(settings.size.image_size)
    results = sweep(corpus, settings, rates, args.recipe, args.jobs)
    save_results(results, settings.output / "results.json", settings=asdict(settings), chance=corpus.chance)
    Console().print(table(results, rates, settings.size.batch_size))


if __name__ == "__main__":
    main()
