"""The notebooks of the gallery, and the picture of the front page. ``make docs`` executes the notebooks."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
NOTEBOOKS = sorted(GALLERY.glob("*.ipynb"))
INDEX = (GALLERY / "index.md").read_text(encoding="utf-8")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_the_gallery_shows_every_notebook() -> None:
    assert len(NOTEBOOKS) >= 8
    for path in NOTEBOOKS:
        assert f"({path.name})" in INDEX
        assert f":target: {path.stem}.html" in INDEX
        assert (GALLERY / "pictures" / f"{path.stem}.png").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_came_out(path: Path) -> None:
    """Outputs would be of another version than the text, and no diff could be read."""
    code = cells(path, "code")
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    ids = [cell["id"] for kind in ("code", "markdown") for cell in cells(path, kind)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_its_levels_are_and_needs_what_the_extra_brings(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert text.startswith("# ")
    assert re.search(r"\*Upper variables\*.*\*Lower variables\*.*\*Method\*:\s*\{class\}", text, re.DOTALL)
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells(path, "code")))
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    taken = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in plain + taken} <= {"bilevel", "copy", "matplotlib", "sklearn", "torch"}
    assert "plt.subplots" in ast.unparse(tree)


def test_the_picture_of_the_front_page_shows_what_its_program_does() -> None:
    spec = importlib.util.spec_from_file_location("front", ROOT / "docs" / "front.py")
    assert spec is not None
    assert spec.loader is not None
    front = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front)
    found = front.run(ROOT / "docs" / "index.md")
    plain, learned = (
        ((found[name](found["x"])[:, 0] > 0) == found["truth"].bool()).float().mean() for name in ("plain", "model")
    )
    assert plain < 0.85
    assert learned > 0.9
