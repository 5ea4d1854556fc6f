"""What the runs of `train_clip.py` gave: measured, then shown as a table, a plot and a JSON file."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What one training gave."""

    name: str
    final_loss: float
    """Mean over the last tenth of the steps."""
    top1: float
    """Zero-shot accuracy on the test glyphs, 0 to 1."""
    top5: float
    times_chance: float
    """Top-1 accuracy over that of guessing."""
    samples_per_second: float
    """Training speed without compilation."""
    compile_seconds: float
    """The first training step and the first two batches of the evaluation, which compile."""
    peak_memory_mib: float | None
    """Highest memory use in training after compilation: the allocator's on a GPU, the process's on a CPU."""
    losses: list[float]
    rms: list[float]
    """Of each step: how far the patch embedding's second moment lagged behind; about 1 where it did not."""


class Stopwatch:
    """Seconds since its creation, with the GPU's queue empty at both ends."""

    def __init__(self) -> None:
        self._start = self._now()

    def seconds(self) -> float:
        """Time passed."""
        return self._now() - self._start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class PeakMemory:
    """The highest memory use since its creation."""

    _STATUS = Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_linux = self._STATUS.exists()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self._on_linux:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set

    def mib(self) -> float | None:
        """In MiB; None where there is no way to know: on a CPU without Linux."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        if self._on_linux:
            lines = self._STATUS.read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
        return None


def results_table(results: Sequence[RunResult]) -> Table:
    """One line a run."""
    table = Table(
        title="Training, and zero-shot accuracy on fonts never trained on",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("run", "loss", "top-1", "top-5", "times\nchance", "samples/s", "compile", "peak\nmemory"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for result in results:
        memory = "-" if result.peak_memory_mib is None else f"{result.peak_memory_mib:,.0f} MiB"
        table.add_row(
            result.name,
            f"{result.final_loss:.3f}",
            f"{result.top1:.2%}",
            f"{result.top5:.2%}",
            f"{result.times_chance:,.0f}",
            f"{result.samples_per_second:,.0f}",
            f"{result.compile_seconds:.0f} s",
            memory,
        )
    return table


def save_results(results: Sequence[RunResult], path: Path, **context: object) -> None:
    """All results with their losses as JSON, below the facts of `context`."""
    document = {**context, "runs": [asdict(result) for result in results]}
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


def plot_losses(results: Sequence[RunResult], path: Path) -> None:
    """Loss of all runs above, pale as it is, strong as a running mean; below the RMS that goes up before a spike."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, height_ratios=(3, 1), figsize=(8, 6.5), dpi=120, layout="constrained"
    )
    for index, result in enumerate(results):
        steps = range(1, len(result.losses) + 1)
        label = f"{result.name}: top-1 {result.top1:.2%}, loss {result.final_loss:.3f}"
        above.plot(steps, result.losses, color=f"C{index}", linewidth=0.8, alpha=0.3)
        above.plot(steps, _running_mean(result.losses), f"C{index}" + ("-", "--")[index % 2], label=label)
        below.plot(steps, result.rms, color=f"C{index}", linewidth=0.8)
    above.set(ylabel="contrastive loss", title="CLIP on glyphs: training loss")
    above.grid(alpha=0.3)
    above.legend()
    below.axhline(1, color="black", linewidth=0.8, linestyle=":")
    below.set(xlabel="step", ylabel="RMS of the\npatch embedding", yscale="log")
    below.grid(alpha=0.3, which="both")
    figure.savefig(path)
    plt.close(figure)


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Mean of each loss and its neighbours: a twentieth of them all, fewer at both ends."""
    half = len(losses) // 40
    windows = (losses[max(0, index - half) : index + half + 1] for index in range(len(losses)))
    return [sum(window) / len(window) for window in windows]
