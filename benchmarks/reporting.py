"""What every benchmark prints: where it ran, and its table."""

import argparse
import datetime
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from filelock import FileLock


def header(title: str) -> str:
    """Title, date, GPU, versions and the command, whatever file it writes."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    command = re.sub(r" --(output|plot)[ =]\S+", "", " ".join(["python", *sys.argv]))
    return f"# {title}\n\n{datetime.date.today()}, {gpu}, {versions}\n\n`{command}`"


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a markdown table, readable as plain text too.

    Args:
        rows: one mapping a row.
        columns: column -> format specification of its values, in order.
    """
    cells = [[format(row[column], spec) if column in row else "" for column, spec in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def add_workloads(parser: argparse.ArgumentParser, known: Collection[str], default: Sequence[str]) -> None:
    """Let the command line name the workloads to run."""

    def workload(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    names = "all" if set(default) == set(known) else " ".join(default)
    parser.add_argument(
        "workloads", nargs="*", type=workload, default=list(default), metavar="WORKLOAD",
        help=f"what to run: {', '.join(known)} (default: {names})",
    )  # fmt: skip


@contextmanager
def alone() -> Iterator[None]:
    """Benchmarks that run at once on a GPU may compile at once, but wait for each other to time."""
    with FileLock(Path(tempfile.gettempdir()) / f"swcompile-timing-{torch.cuda.get_device_properties().uuid}.lock"):
        yield


def write(parts: Sequence[str], output: str | None) -> None:
    """Write the parts to a file, where one is given."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text("\n\n".join(parts) + "\n")
