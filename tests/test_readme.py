"""Every example in README.md and in the pages of docs/ runs, and the README's commands are the Makefile's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pages import examples, run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [path for path in [README, *sorted((ROOT / "docs").rglob("*.md"))] if examples(path)]


@pytest.fixture
def _torch_as_found() -> Iterator[None]:
    """A page may choose a seed, a default dtype or a number of threads: the tests after it must not notice."""
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_torch_as_found")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(path)


def test_the_snippet_is_the_first_thing_that_runs() -> None:
    first = examples(README)[0]
    assert first.language == "python"
    assert "bilevel.BOME(" in first.text


def test_a_failing_example_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)line 6.*Expected:\s+2\s+Got:\s+1"):
        run(page)
    page.write_text("text\n\n```python\nx = 1\nraise RuntimeError(x)\n```\n")
    with pytest.raises(RuntimeError) as caught:
        run(page)
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
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
