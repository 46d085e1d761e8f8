"""The links from a page of source code back to the documentation lead somewhere.

``viewcode`` writes them with the name of whichever module it met first for a file; here a name of a file is documented
under the module that users import it from, or under its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

BACK = re.compile(r'<a class="viewcode-back" href="([^"#]*)#([^"]*)">.*?</a>')


def names(written: str, module: str) -> Iterator[str]:
    """What an object may be documented as: as written, or under a module that its file's is, or is part of."""
    yield written
    words = written.split(".")
    for cut in range(1, len(words)):
        inside = words[cut:]
        parents = module.split(".")
        for depth in range(1, len(parents) + 1):
            yield ".".join([*parents[:depth], *inside])


def mend(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None) -> None:
    if not page.startswith("_modules/bilevel"):
        return
    objects = app.env.domains.python_domain.objects
    module = page.removeprefix("_modules/").replace("/", ".")

    def place(link: re.Match[str]) -> str:
        name = next((name for name in names(link[2], module) if name in objects), None)
        if name is None:
            return ""
        return link[0].replace(
            f'href="{link[1]}#{link[2]}"',
            f'href="{app.builder.get_relative_uri(page, objects[name].docname)}#{objects[name].node_id}"',
        )

    context["body"] = BACK.sub(place, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
