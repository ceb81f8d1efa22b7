"""The pages of documentation, and what stands in their fenced blocks."""

import re
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for name, body in FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def blueprints(path: Path) -> dict[str, str]:
    """The whole blueprints on a page, by the name of the file that the page calls them."""
    whole = [body for body in blocks(path, "yaml") if body.startswith("blueprint: 1\n")]
    return {re.findall(r"^name: (\S+)", body, re.MULTILINE)[0] + ".yaml": body for body in whole}
