"""The pages of documentation, and their fenced blocks."""

import re
from pathlib import Path

from tests.conftest import ROOT

_MADE = {"_build", "generated"}
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if _MADE.isdisjoint(p.parts))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language, in order."""
    return [body for name, body in FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def blueprints(path: Path) -> dict[str, str]:
    """Return the complete blueprints on a page, by file name."""
    whole = [body for body in blocks(path, "yaml") if body.startswith("blueprint: 1\n")]
    return {re.findall(r"^name: (\S+)", body, re.MULTILINE)[0] + ".yaml": body for body in whole}
