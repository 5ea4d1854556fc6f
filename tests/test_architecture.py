"""The guide is up to date: its blocks print what it shows (the example pass, kernel and recipe run), its names exist."""

import re
from pathlib import Path

import pytest
from processes import check_document

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "architecture.md").read_text()
EXAMPLES = {
    "swcompile/passes/round_grad_weight.py",
    "tests/test_round_grad_weight.py",
    "kernels/row_sums.py",
    "tests/test_row_sums.py",
}
"""Files that a reader of the guide would write."""


def test_the_guide_is_what_make_docs_writes(tmp_path: Path) -> None:
    check_document("docs/architecture.md", tmp_path)


def test_files_exist() -> None:
    named = set(re.findall(r"`((?:swcompile|kernels|tests|benchmarks)/[\w/]*(?:\.py)?)`", GUIDE))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists()} == EXAMPLES


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_links_to_sections_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for file, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        target = (ROOT / document).parent / file if file else ROOT / document
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
