"""Every public name is in the API reference, with a docstring, and with an example where it is something users call."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bilevel
import bilevel.barrier
import bilevel.problems
import bilevel.solver
from bilevel.settings import Setting

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "bilevel"


def public(module: ModuleType) -> dict[str, Any]:
    """``__all__``, or else what the module itself defines under a name without underscore; submodules aside."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    values = {name: getattr(module, name) for name in names}
    return {name: value for name, value in values.items() if not inspect.ismodule(value) and not name.startswith("__")}


NAMES = [
    (f"{module.__name__}.{name}", value)
    for module in (bilevel, bilevel.barrier, bilevel.problems, bilevel.solver, bilevel.testing)
    for name, value in public(module).items()
]
# An abstract class is for authors of methods; its subclasses' examples show it at work.
CALLED = [(name, value) for name, value in NAMES if callable(value) and not inspect.isabstract(value)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names that the built API reference describes, read from the index that Sphinx writes for other projects."""
    out = tmp_path_factory.mktemp("docs")
    # Only the pages of the public interface, hence no -W: links to others lead nowhere. `make docs` builds all with it.
    command = [sys.executable, "-m", "sphinx", "-Q", "-D", "exclude_patterns=inside.md"]
    command += ["-c", str(DOCS), str(DOCS / "api"), str(out)]
    subprocess.run(command, check=True)
    entries = (out / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(entries).decode().splitlines() if " py:" in line}


@pytest.mark.environment
def test_every_public_name_is_in_the_reference(reference: set[str]) -> None:
    assert {name for name, _ in NAMES} - reference == set()


def test_every_module_is_in_the_reference() -> None:
    # Files in methods/ hold a public class each, which appears under its public name.
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    modules = {f"bilevel.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"} | {"bilevel"}
    folders = {f"bilevel.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")} - {"bilevel.methods"}
    assert modules | folders <= set(re.findall(r"automodule:: (\S+)", text))


@pytest.mark.parametrize(("name", "value"), NAMES, ids=[name for name, _ in NAMES])
def test_every_public_name_has_a_docstring_of_its_own(name: str, value: Any) -> None:
    # inspect.getdoc would find that of a base class, and a dataclass without one gets its signature.
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert text
    if dataclasses.is_dataclass(value):
        assert not text.startswith(f"{name.rpartition('.')[2]}(")


@pytest.mark.parametrize(("name", "value"), CALLED, ids=[name for name, _ in CALLED])
def test_what_users_call_has_an_example_that_runs(name: str, value: Any) -> None:
    section = inspect.getdoc(value).partition("\nExample:\n")[2]  # type: ignore[union-attr]
    assert ">>>" in section  # pytest runs it as a doctest


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_options_in_the_pages_have_values_that_are_accepted(page: Path) -> None:
    """``option="value"`` in a text, and the cells of a table of options that begin with a value."""
    text = page.read_text(encoding="utf-8")
    said = re.findall(r"\b(\w+)=\"(\w+)\"", text)
    for name, cells in re.findall(r"^\| `(\w+)` \|(.*)", text, re.MULTILINE):
        said += [(name, value) for cell in cells.split("|") for value in re.findall(r"^ `\"(\w+)\"`", cell)]
    for name, value in said:
        if name in ("inner_step", "step_from", "value_gradient", "product", "differentiate", "on_nonfinite", "verify"):
            assert any(accepted(kept, value) for kept in settings(name)), f"{name}={value!r}"


def settings(name: str) -> list[Setting[Any]]:
    """The settings of this name of all methods."""
    found = [value for _, value in NAMES if isinstance(value, type) and issubclass(value, bilevel.BilevelOptimizer)]
    return [kept for kind in found for base in kind.__mro__ if isinstance(kept := vars(base).get(name), Setting)]


def accepted(kept: Setting[Any], value: str) -> bool:
    try:
        kept.accept("docs", value)
    except (TypeError, ValueError):
        return False
    return True


def test_names_of_options_that_were_changed_are_gone() -> None:
    old = re.compile(r"\b(restore|mode)=|`restore`|upper products?\b")
    texts = {page: page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), *PACKAGE.rglob("*.py")]}
    assert [page.name for page, text in texts.items() if page.name != "changelog.md" and old.search(text)] == []
