"""Formulas drawn by the KaTeX that lies in ``_static/katex``: pages need no network, nor do builds, nor any program.

A formula stands in its page as TeX, in an element of class ``math``; ``formulas.js`` has KaTeX draw it, with MathML
beside it for those who listen. Where scripts are off, the TeX stays, which is what one would type.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

KATEX = "katex/katex.min.css"
SCRIPTS = ("katex/katex.min.js", "formulas.js")


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(translator.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    translator.body.append(translator.encode(node.astext()) + "</span>")
    raise nodes.SkipNode


def display(translator: HTML5Translator, node: nodes.math_block) -> None:
    tex = node.astext().strip()
    if r"\\" in tex and not tex.startswith(r"\begin"):  # lines without an environment, as in docstrings
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    translator.body.append(translator.starttag(node, "div", "", CLASS="math display notranslate nohighlight"))
    translator.body.append(translator.encode(tex) + "</div>\n")
    raise nodes.SkipNode


def only_where_needed(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None
) -> None:
    """A page without a formula loads nothing for them."""
    if tree is not None and (tree.next_node(nodes.math) or tree.next_node(nodes.math_block)):
        app.add_css_file(KATEX)
        for script in SCRIPTS:
            app.add_js_file(script, loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("katex", (inline, None), (display, None))
    app.connect("html-page-context", only_where_needed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
