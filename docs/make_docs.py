"""Runs the Python blocks of the documents and puts what they print into the text blocks below them.

    python docs/make_docs.py                     # rewrite README.md and docs/architecture.md
    python docs/make_docs.py --check README.md   # change nothing; show differences and fail if there are any

The Python blocks of a document run from top to bottom in one namespace, as a reader would type them in. A ``text``
block holds the output of the Python block before it; a Python block without one must print nothing. Everything runs
on the CPU, so the documents come out the same on every machine.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/architecture.md")
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def render(document: Path) -> str:
    """The document with every text block replaced by what the Python block before it prints."""
    source = document.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts: list[str] = []
    end = 0
    printed, line = "", 0
    for block in _BLOCK.finditer(source):
        language, content = block.groups()
        parts.append(source[end : block.start(2)])
        end = block.end(2)
        if language == "python":
            _check_shown(printed, document, line)
            line = source.count("\n", 0, block.start(2)) + 1
            printed = _run(content, namespace, document, line)
            parts.append(content)
        else:
            parts.append(printed)
            printed = ""
    _check_shown(printed, document, line)
    return "".join([*parts, source[end:]])


def _run(code: str, namespace: dict[str, Any], document: Path, line: int) -> str:
    """What the code prints. It is compiled at its place in the document, so that tracebacks and Triton find it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), namespace)  # noqa: S102 (it is ours)
    return "".join(f"{text.rstrip()}\n" for text in output.getvalue().splitlines())


def _check_shown(printed: str, document: Path, line: int) -> None:
    if printed:
        raise ValueError(f"{document}:{line}: the block prints, and no text block follows to show it:\n{printed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the documents; the exit status."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a document is out of date")
    parser.add_argument("documents", nargs="*", default=DOCUMENTS, help="default: all")
    args = parser.parse_args(arguments)
    status = 0
    for name in args.documents:
        document = ROOT / name
        before, after = document.read_text(), render(document)
        if args.check and before != after:
            status = 1
            lines = difflib.unified_diff(
                before.splitlines(), after.splitlines(), f"{name} as it is", f"{name} as `make docs` writes it", lineterm=""
            )
            print("\n".join(lines))
        elif before != after:
            document.write_text(after)
            print(f"updated {name}")
    return status


if __name__ == "__main__":
    # Before torch and Triton are imported: no GPU, and Triton's interpreter for the kernel that the guide defines.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    sys.exit(main())
