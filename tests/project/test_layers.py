"""The architecture: a module imports only what stands below it, and the package imports nothing but torch.

The order is declared once, in the contracts of ``pyproject.toml``, which ``lint-imports`` checks.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bilevel"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
# From the bottom of the library to its face, as in CONTRIBUTING.md. Members of one layer may use each other.
LAYERS = [layer.split(" : ") for layer in reversed(CONTRACTS[0]["layers"])]

GRAPH = grimp.build_graph("bilevel", include_external_packages=True, cache_dir=None)
AT_RUN_TIME = grimp.build_graph(
    "bilevel", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
)
EVERYTHING = sorted(name for name in GRAPH.modules if not GRAPH.is_module_squashed(name))
MODULES = [name for name in EVERYTHING if not GRAPH.find_children(name)]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """``lint-imports`` on the package of a folder."""
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_the_contracts_are_kept() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_one_place(module: str) -> None:
    name = module.removeprefix("bilevel.")
    places = [layer for layer in LAYERS for member in layer if f"{name}.".startswith(f"{member}.")]
    assert len(places) == 1, "enter it in the contracts of pyproject.toml and in the table of CONTRIBUTING.md"


def test_contributing_shows_the_layers_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", text, re.MULTILINE)
    assert shown == [row(layer) for layer in LAYERS]


def row(layer: list[str]) -> str:
    """A layer as the table names it: by its file, or by the folder of all its members."""
    (folder,) = {member.rpartition(".")[0] for member in layer}
    if len(layer) > 1:
        return f"{folder}/"
    path = layer[0].replace(".", "/")
    return f"{path}/" if (PACKAGE / path).is_dir() else f"{path}.py"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_package_itself(module: str) -> None:
    """A name comes from where it is defined, or from the folder of that: what ``bilevel`` re-exports is for users."""
    assert "bilevel" not in GRAPH.find_modules_directly_imported_by(module)


@pytest.mark.parametrize("module", EVERYTHING)
def test_imports_outside_the_package_are_torch_or_the_standard_library(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    assert outside(GRAPH, module) <= allowed | {"typing_extensions"}
    assert outside(AT_RUN_TIME, module) <= allowed


def outside(graph: grimp.ImportGraph, module: str) -> set[str]:
    """What is imported from other packages."""
    return {name for name in graph.find_modules_directly_imported_by(module) if name not in EVERYTHING}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_only_re_export(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        re_export = isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module == "__future__")
        constant = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and target.id in {"__all__", "__version__"} for target in node.targets
        )
        assert docstring or re_export or constant, f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("vectors", "from .evaluation.oracle import Oracle", "bilevel.vectors is not allowed to import"),
        ("vectors", "def f():\n    from . import directions", "bilevel.vectors is not allowed to import"),
        ("methods/bome", "from .ebomlc import EBOMLC", "No method imports another BROKEN"),
        ("methods/formulas", "from .emlc import EMLC", "No method imports another BROKEN"),
        ("methods/formulas", "from .hypergradient_method import name", "What methods share imports no method BROKEN"),
        ("methods/bome", "from .. import problems", "bilevel.methods is not allowed to import"),
        ("methods/bome", "from .. import BOME", "bilevel.methods is not allowed to import"),
        ("errors", "if TYPE_CHECKING:\n    from .vectors import Tensors", "bilevel.errors is not allowed to import"),
    ],
)
def test_the_contracts_notice_a_violation(module: str, source: str, complaint: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "bilevel", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "bilevel" / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{source}\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert complaint in " ".join(result.stdout.split())
