"""The origin of results: versions, arguments, and the git revision of the code."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance", "revision", "version_of"]

_PACKAGES = ("sedd_graph", "torch", "pydantic", "networkx", "einops", "zarr", "numpy", "safetensors")


def version_of(package: str) -> str | None:
    """Return the installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(distributions: Iterable[str]) -> dict[str, Any]:
    """Return versions, arguments and revision for run.json. ``distributions``: those that the graph's components come from."""
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version_of(name) or "unknown" for name in _PACKAGES},
        "components": sorted(set(distributions)),
        "revision": revision(),
    }


def revision() -> str:
    """Return the git revision of the running code, with ``-changed`` behind it where files differ; empty outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-changed" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
