"""Sphinx configuration. ``scripts/docs`` builds the site; pages under ``docs/generated`` are written from the code."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import generate  # noqa: E402

import sedd_graph  # noqa: E402

project = "sedd_graph"
author = "the sedd_graph authors"
copyright = author
version = release = sedd_graph.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that is listed and declared is described once
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
suppress_warnings = ["autodoc.mocked_object"]

html_theme = "pydata_sphinx_theme"
html_title = f"sedd_graph {version}"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def escape(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape ``|x|`` and ``*`` in docstrings outside code: docstrings of sedd_graph use neither substitutions nor emphasis.

    The docstring of an attribute begins with an empty comment, so that napoleon takes no words before a colon for a type.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`+[^`]*`+)", line)
            lines[number] = "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in parts)


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for sources."""
    generate.write(HERE / "generated")
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
