"""The pages of documentation, and their fenced blocks."""

import re
from pathlib import Path

from tests.conftest import ROOT

DOCS = ROOT / "docs"
NOTEBOOKS = tuple(sorted((DOCS / "notebooks").glob("*.ipynb")))
GENERATED = ("api", "cli", "components", "keys", *(f"notebook-{path.stem}" for path in NOTEBOOKS))
"""Pages that docs/generate.py writes when the site is built; they are not committed."""
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not {"generated", "_build"} & set(p.relative_to(DOCS).parts)),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def title(page: Path) -> str:
    """The name of a page in messages: its path from the root."""
    return str(page.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language, in order."""
    return [body for name, body in FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def blueprints(path: Path) -> dict[str, str]:
    """Return the complete blueprints on a page, by file name."""
    whole = [body for body in blocks(path, "yaml") if body.startswith("blueprint: 1\n")]
    return {re.findall(r"^name: (\S+)", body, re.MULTILINE)[0] + ".yaml": body for body in whole}
