"""Pages of the documentation from Jupyter notebooks: text, code, and the outputs that a notebook holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["pages"]


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield a name and the text, in MyST Markdown, of the page of each notebook in ``folder``."""
    for path in sorted(folder.glob("*.ipynb")):
        yield f"notebook-{path.stem}", _page(json.loads(path.read_text(encoding="utf-8")), path.name)


def _page(notebook: Mapping[str, Any], name: str) -> str:
    title, *rest = _text(notebook["cells"][0]["source"]).split("\n", 1)
    run = f"Run it: {{download}}`{name} <../notebooks/{name}>`."
    parts = [title, run, *(text.strip() for text in rest)]
    for cell in notebook["cells"][1:]:
        if cell["cell_type"] == "markdown":
            parts.append(_text(cell["source"]))
        elif cell["cell_type"] == "code":
            parts += [_fenced("python", _text(cell["source"])), *_outputs(cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def _outputs(outputs: list[Mapping[str, Any]]) -> Iterator[str]:
    for output in outputs:
        if output["output_type"] == "stream":
            yield _fenced("text", _text(output["text"]))
        elif "text/html" in output.get("data", {}):
            yield _fenced("{raw} html", _text(output["data"]["text/html"]))
        elif "text/plain" in output.get("data", {}):
            yield _fenced("text", _text(output["data"]["text/plain"]))


def _fenced(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _text(lines: str | list[str]) -> str:
    """Return a text of a notebook, which is stored as one string or a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)
