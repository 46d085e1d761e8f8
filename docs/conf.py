"""Sphinx configuration: ``make docs``. Pages are Markdown (MyST), docstrings are Google style."""

import os
import sys
from pathlib import Path

import bilevel

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "bilevel"
author = "The bilevel authors"
copyright = "The bilevel authors"
release = version = bilevel.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["formulas", "signatures", "backlinks"]  # in _extensions/
html_math_renderer = "katex"
html_static_path = ["_static"]
html_css_files = ["bilevel.css"]
exclude_patterns = ["_build", "_static", "jupyter_execute"]  # the last: notebooks as the build before has run them

# $x$ and $$x$$ are formulas; a heading can be linked as page.md#its-title.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The notebooks of the gallery are kept without outputs and executed here, on the package of this checkout.
nb_execution_timeout = 300
nb_execution_raise_on_error = True
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80  # longer ones get a line for each argument
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A reference to a name of ours that does not exist is an error. Other projects' names are left as text: looking them up
# (intersphinx) would make the build need a network.
nitpicky = True
# Names of other packages, and type variables, which have no entry of their own.
nitpick_ignore_regex = [("py:.*", r"(?!bilevel\b).*"), ("py:.*", r"bilevel\..*\.[A-Z]")]

html_theme = "furo"
html_title = f"bilevel {release}"
html_show_copyright = False
html_show_sphinx = False
