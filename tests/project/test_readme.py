"""Every example in README.md and in the pages of docs/ runs, and the README's commands are the Makefile's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from sybil.example import SybilFailure

from pages import blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
REPOSITORY = "https://github.com/bilevel/bilevel"
DOCUMENTATION = "https://bilevel.readthedocs.io"
PAGES = [README, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_is_a_test(path: Path) -> None:
    fences = re.findall(r"^ *```(?:python|pycon)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(blocks(path)) == len(fences)


def test_the_snippet_is_the_first_thing_that_runs() -> None:
    line = README.read_text(encoding="utf-8").splitlines()[blocks(README)[0].line - 1]
    assert line == "```python"
    assert "bilevel.BOME(" in blocks(README)[0].parsed


def test_a_failing_example_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n")
    first, second = blocks(page)
    first.evaluate()
    with pytest.raises(SybilFailure, match=r"(?s)line 6.*Expected:\s+2\s+Got:\s+1"):
        second.evaluate()
    page.write_text("text\n\n```python\nx = 1\nraise RuntimeError(x)\n```\n")
    (only,) = blocks(page)
    with pytest.raises(RuntimeError) as caught:
        only.evaluate()
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_session_hands_its_names_on(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> x = 3\n>>> x\n3\n```\n\n```python\nassert x == 3\ny = x\n```\n")
    for block in blocks(page):
        block.evaluate()
    assert block.namespace["y"] == 3


def targets(text: str) -> list[str]:
    """Where the links and pictures of a Markdown text lead, whichever way they are written; code has none."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)|^\[[^\]]+\]: (\S+)|\b(?:href|src)=\"([^\"]+)", prose, re.MULTILINE)
    return ["".join(groups) for groups in found]


def named(link: str) -> Path | None:
    """The file here that a link into the repository or the documentation names, or None for a link elsewhere."""
    if into := re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/([^#]*)(?:#.*)?", link):
        return ROOT / into[1]
    if run := re.fullmatch(rf"{REPOSITORY}/actions/workflows/([^/]+)(?:/badge\.svg)?", link):
        return ROOT / ".github" / "workflows" / run[1]
    if page := re.fullmatch(rf"{DOCUMENTATION}/(?:en/latest/)?([^#]*)(?:#.*)?", link):
        return ROOT / "docs" / ((page[1] or "index.html").removesuffix(".html") + ".md")
    return None


def test_every_link_of_the_readme_lives_on_a_package_index_too() -> None:
    """The page of a package index shows this text and none of the files beside it."""
    found = targets(README.read_text(encoding="utf-8"))
    assert [link for link in found if not link.startswith("https://")] == []
    here = [path for link in found if (path := named(link)) is not None]
    assert len(here) > 10
    assert [str(path) for path in here if not path.exists()] == []
    # What is neither would be a page of the repository or the documentation that this test does not know.
    assert [link for link in found if named(link) is None and link.startswith((REPOSITORY, DOCUMENTATION))] == []


def test_every_reference_of_the_readme_is_defined() -> None:
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    defined = {name.lower() for name in re.findall(r"^\[([^\]]+)\]: ", prose, re.MULTILINE)}
    used = {name.lower() or text.lower() for text, name in re.findall(r"\[([^\]]+)\](?:\[([^\]]*)\])?(?![:(])", prose)}
    assert used == defined


@pytest.mark.parametrize(
    ("link", "path"),
    [
        (f"{REPOSITORY}/blob/main/LICENSE", "LICENSE"),
        (f"{REPOSITORY}/tree/main/docs/nowhere#there", "docs/nowhere"),
        (f"{DOCUMENTATION}/en/latest/methods/index.html#choose", "docs/methods/index.md"),
        (DOCUMENTATION + "/", "docs/index.md"),
    ],
)
def test_a_link_names_its_file(link: str, path: str) -> None:
    assert targets(f"[a]({link}) and\n\n[b]: {link}\n") == [link, link]
    assert named(link) == ROOT / path


def test_the_citation_and_the_package_name_the_same_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert (project["Repository"], project["Documentation"]) == (REPOSITORY, DOCUMENTATION)
    assert all(url.startswith((REPOSITORY, DOCUMENTATION)) for url in project.values())
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nrepository-code: {REPOSITORY}\n" in citation
    assert f"\nurl: {DOCUMENTATION}\n" in citation


@pytest.mark.environment
@pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="needs make and a POSIX shell")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_plain_equivalents_are_what_make_does(target: str) -> None:
    # -n prints the commands without running them, -B pretends that nothing is there yet.
    make = ["make", "-nB", target, "PYTHON=python3", "VENV=.venv"]
    # Without what an outer make, which may be running this test, hands down.
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    printed = subprocess.run(make, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    commands = [line for line in printed.splitlines() if not line.startswith("touch ")]
    text = README.read_text(encoding="utf-8")
    said = re.search(rf"`make {target}`.*?```console\n(.*?)```", text, re.DOTALL)
    assert said is not None
    assert said[1].splitlines() == commands


def test_files_that_the_docs_name_are_there() -> None:
    pages = [README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "methods").glob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"`((?:bilevel|examples|benchmarks)/[\w/]+\.py)`", page.read_text("utf-8"))
    }
    assert len(named) >= 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
