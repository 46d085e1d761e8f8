"""The examples of a Markdown page: its blocks of Python, found and run.

A block fenced as ``python`` is executed; one fenced as ``pycon`` (with ``>>>``) must also print what it says. Blocks of
a page share their names, from top to bottom. Blocks of any other kind are not run.
"""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S+)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # where the text begins, counted from 1


def examples(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            language=match["language"],
            text=re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
            line=text[: match.start("text")].count("\n") + 1,
        )
        for match in FENCE.finditer(text)
        if match["language"] in {"python", "pycon"}
    ]


def run(path: Path) -> dict[str, Any]:
    """Run the examples of one page and return the names they leave behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in examples(path):
        if block.language == "python":
            # Empty lines in front, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), names)
        else:
            session = doctest.DocTestParser().get_doctest(block.text, names, path.name, str(path), block.line - 1)
            report: list[str] = []
            result = doctest.DocTestRunner(optionflags=OPTIONS).run(session, out=report.append, clear_globs=False)
            assert result.failed == 0, "".join(report)
            names.update(session.globs)
    return names
