"""The architecture: a module imports only what stands above it, and the package imports nothing but torch."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "bilevel"

# From the bottom of the library to its face. A new module takes its place here, above everything that uses it; a new
# method has its place already.
LAYERS = [
    "without_numpy",
    "errors",
    "compiler",
    "settings",
    "wrappers",
    "vectors",
    "levels",
    "evaluation.buffers",
    "evaluation.hold",
    "evaluation.replay",
    "evaluation.losses",
    "evaluation.precision",
    "evaluation.verification",
    "evaluation.inspection",
    "evaluation.substitution",
    "evaluation.evaluations",
    "evaluation.oracle",
    "hypergradient.modes",
    "hypergradient.mode_choice",
    "hypergradient.products",
    "barrier",
    "lower_steps",
    "hypergradient",  # its files may use each other
    "directions",
    "optimizer.method_state",
    "optimizer.apply",
    "optimizer.hooks",
    "optimizer.undo",
    "checks.constants",
    "checks.differences",
    "checks.plain",
    "checks.report",
    "checks.claims",
    "checks.check_directions",
    "optimizer.base",
    "methods.barrier_terms",
    "methods.dynamic_barrier",
    "methods.formulas",
    "methods.sequential",
    "methods",  # every other file in it: a method, which uses no other method
    "problems",
]

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
INITS = [path for path in FILES if path.name == "__init__.py"]


def dotted(path: Path) -> str:
    """``bilevel/methods/bome.py`` is ``methods.bome``; ``bilevel/__init__.py`` is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer(module: str) -> int:
    """Place of a module in the list: its own, or else that of its folder."""
    candidates = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    assert candidates, f"bilevel/{module.replace('.', '/')} has no place in LAYERS"
    return LAYERS.index(max(candidates, key=len))


def imports(source: str, *, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, target) for each import, wherever it stands: in a function or under TYPE_CHECKING it counts too.

    A target inside the package starts with a dot (``.methods.bome``), one outside does not.
    ``package`` is the folder of the file, from which relative imports count.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            base = parents[: len(parents) - (node.level - 1)]
            if node.module:
                yield node.lineno, "." + ".".join([*base, node.module])
            else:  # from . import vectors: each name is a module, or else comes from the package's own __init__
                yield from ((node.lineno, "." + ".".join([*base, alias.name])) for alias in node.names)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the rule, one sentence each."""
    found = []
    for line, target in imports(source, package=module.rpartition(".")[0]):
        if not target.startswith("."):
            continue
        name = target[1:]
        if not is_module(name):
            found.append(f"line {line}: {name or 'the package'} is no module; import from the module that defines it")
        elif layer(name) >= layer(module) and not (layer(name) == layer(module) == LAYERS.index("hypergradient")):
            found.append(f"line {line}: {name} does not stand above {module}")
    return found


def test_every_layer_exists_and_every_module_has_a_place() -> None:
    for path in MODULES:
        layer(dotted(path))
    missing = [name for name in LAYERS if not is_module(name)]
    assert missing == []


def test_contributing_shows_the_layers_in_their_order() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text, re.MULTILINE)
    assert shown == [name for name in LAYERS if "." not in name]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_above(path: Path) -> None:
    assert violations(dotted(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: dotted(path) or "__init__")
def test_imports_outside_the_package_are_torch_or_the_standard_library(path: Path) -> None:
    package = ".".join(path.parent.relative_to(PACKAGE).parts)
    # "bilevel" is not allowed either: the package does not import itself by name.
    allowed = {*sys.stdlib_module_names, "torch"}
    assert outside(path.read_text(encoding="utf-8"), package) <= allowed | {"typing_extensions"}
    assert outside(at_run_time(path.read_text(encoding="utf-8")), package) <= allowed


def outside(source: str, package: str) -> set[str]:
    """What is imported from other packages."""
    return {target.split(".")[0] for _, target in imports(source, package=package) if target[0] != "."}


def at_run_time(source: str) -> str:
    """Leave out what only a type checker reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("path", INITS, ids=lambda path: dotted(path) or "bilevel")
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
        ("vectors", "from .evaluation.oracle import Evaluator", "does not stand above"),
        ("vectors", "def f():\n    from . import directions", "does not stand above"),
        ("methods.bome", "from .ebomlc import EBOMLC", "does not stand above"),
        ("methods.bome", "from .. import problems", "does not stand above"),
        ("methods.bome", "from .. import BOME", "is no module"),
        ("optimizer", "from . import *", "is no module"),
    ],
)
def test_the_rule_notices_a_violation(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert complaint in found
