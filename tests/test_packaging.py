"""What is installed is whole: wheel, sdist and editable install contain the kernels, under one name only."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from processes import run_program

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file
    for folder in ("swcompile", "kernels", "tests", "examples", "benchmarks", "docs")
    for file in (ROOT / folder).rglob("*.py")
)

GUIDE = (ROOT / "docs" / "architecture.md").read_text()
TABLE = GUIDE.split("A file imports only from rows above its own")[0]
LAYERS = [
    name
    for row in re.findall(r"^\| (`(?:kernels|swcompile)/.*?) \|", TABLE, re.MULTILINE)
    for name in re.findall(r"`(?:swcompile/)?(\w+)(?:/|\.py)`", row)
]
"""Files and folders in the order of the guide's table."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def _modules() -> set[str]:
    package = {f"swcompile/{file.relative_to(ROOT / 'swcompile')}" for file in (ROOT / "swcompile").rglob("*.py")}
    return package | {f"swcompile/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}


def test_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == _modules()
    assert "swcompile/py.typed" in names
    (points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "switchback = swcompile.backend:switchback" in zipfile.ZipFile(wheel).read(points).decode()


def test_sdist(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")} <= names
    assert {"swcompile/__init__.py", "swcompile/passes/__init__.py", "LICENSE", "README.md"} <= names


def test_wheel_works_without_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import swcompile.kernels.scaled_mm as m, torch; print(m.__file__, torch.ops.swcompile.scaled_mm.default)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert str(tmp_path) in done.stdout and "swcompile.scaled_mm.default" in done.stdout, done.stderr


def test_entry_point() -> None:
    (point,) = entry_points(group="torch_dynamo_backends", name="switchback")
    assert point.value == "swcompile.backend:switchback"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports(file: Path) -> None:
    """Nothing imports `kernels` by its bare name, networkx lives where graphs are read, and imports point up in the guide's table."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {name for name in imported if name.split(".")[0] == "kernels"}
    relative = file.relative_to(ROOT)
    if "networkx" in imported:
        assert relative.name in ("graph.py", "forward_ops.py", "attention.py", "residual.py")
    if relative.parts[0] not in ("swcompile", "kernels") or relative.name == "__init__.py":
        return
    own = "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")
    below = set(LAYERS[LAYERS.index(own) + 1 :])
    ours = {name.split(".")[1] for name in imported if name.startswith("swcompile.")}
    assert not ours & below, f"{relative} imports from rows below its own: {ours & below}"


def test_kernels_are_imported_under_one_name(tmp_path: Path) -> None:
    program = "import sys, swcompile; print('swcompile.kernels.scaled_mm' in sys.modules, 'kernels' in sys.modules)"
    assert run_program(program, folder=tmp_path, path=ROOT).split() == ["True", "False"]


def test_the_makefile_installs_a_torch_that_the_package_allows() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (allowed,) = (Requirement(pin).specifier for pin in pins if Requirement(pin).name == "torch")
    installed = dict(re.findall(r"^(\w+)_TORCH \?= torch(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert SpecifierSet(installed["GPU"]) == allowed
    assert installed["CPU"].removeprefix("==") in allowed
    assert "2.13.1" in allowed and "2.14.0" not in allowed and "2.10.0" not in allowed
