"""The README keeps its word: its snippets run and print what it shows, its tables are the code's."""

import re
from pathlib import Path

import pytest
from processes import check_document

from swcompile import RECIPES, GemmFormat, Scaling
from swcompile.recipe import OPTIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _table(header: str) -> list[list[str]]:
    """Cells of the rows below the line that starts with `header`."""
    lines = README[README.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_snippets_run_and_print_what_is_shown(tmp_path: Path) -> None:
    check_document("README.md", tmp_path)


def test_the_options_are_those_of_the_backend() -> None:
    assert [row[0].strip("`") for row in _table("| option ")] == [*OPTIONS, "mode", "inductor"]


@pytest.mark.parametrize("row", _table("| recipe "), ids=lambda row: row[0])
def test_a_recipe_is_described_as_it_is(row: list[str]) -> None:
    recipe = RECIPES[row[0].strip("`")]()
    formats = [recipe.output, recipe.grad_input, recipe.grad_weight]
    assert row[1:4] == [_describe(gemm) for gemm in formats]
    assert recipe.save_int8_activations == ("backward in int8" in row[4])


def test_every_recipe_is_described() -> None:
    assert [row[0].strip("`") for row in _table("| recipe ")] == list(RECIPES)


def test_commands_and_links_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert README.index("make demo") < README.index("make test") < README.index("## ")
    assert set(re.findall(r"make ([a-z]+)", README)) <= set(targets)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def _describe(gemm: GemmFormat | None) -> str:
    words = {Scaling.VECTOR: "row", Scaling.TENSOR: "tensor", Scaling.BLOCK: "block", Scaling.TOKEN: "token"}
    return "16 bit" if gemm is None else f"int8, {words[gemm.other]} × {words[gemm.weight]}"
