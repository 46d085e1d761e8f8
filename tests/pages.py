"""The examples of README.md and of the pages in docs/: one test a block.

A block fenced as ``python`` is executed; one fenced as ``pycon`` (with ``>>>``) must also print what it says. Blocks of
a page share their names, from top to bottom. Blocks of any other kind are not run.
"""

from __future__ import annotations

import doctest
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def execute(block: Example) -> None:
    # Empty lines in front, so that a traceback shows the line of the page.
    exec(compile("\n" * block.line + block.parsed, block.path, "exec", dont_inherit=True), block.namespace)


def converse(block: Example) -> str:
    """Run a session as the interpreter would; what it printed against its text, or nothing if that is as it says."""
    session = doctest.DocTestParser().get_doctest(block.parsed, {}, Path(block.path).name, block.path, block.line)
    session.globs = block.namespace  # not a copy: the next block has the names of this one
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(session, out=report.append, clear_globs=False)
    return "".join(report)


class Page:
    """Each page starts as a program in an empty folder; what it leaves behind, no later test notices."""

    def begin(self, names: dict[str, Any]) -> None:
        names["__name__"] = "__main__"
        found = Path.cwd()
        dtype, threads, random = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # Windows keeps what is still open
        os.chdir(folder.name)

        def restore() -> None:
            os.chdir(found)
            folder.cleanup()
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_rng_state(random)

        self._restore: Callable[[], None] = restore

    def end(self, names: dict[str, Any]) -> None:
        self._restore()


_page = Page()
PAGES = Sybil(
    parsers=[CodeBlockParser("python", execute), CodeBlockParser("pycon", converse)],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    excludes=["docs/_build/**"],
    setup=_page.begin,
    teardown=_page.end,
)


def blocks(path: Path) -> list[Example]:
    """The examples of one page."""
    document: Document = PAGES.parse(path)
    return list(document.examples())
