"""Provenance of results: package versions, command-line arguments, and the git revision of the code."""

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
    """Return the version of an installed package; None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(distributions: Iterable[str]) -> dict[str, Any]:
    """Return the provenance of a run for ``run.json``: versions, command-line arguments, time and git revision.

    Args:
        distributions: Names with versions of the Python distributions of the network's components.
    """
    return {
        # bytes that are not UTF-8 stand in arguments as surrogates, which no file could hold
        "argv": [word.encode("utf-8", "backslashreplace").decode() for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version_of(name) or "unknown" for name in _PACKAGES},
        "components": sorted(set(distributions)),
        "revision": revision(),
    }


def revision() -> str:
    """Return the git commit hash of the running code; empty outside a git repository.

    The suffix ``-changed`` marks a work tree with uncommitted changes.
    """
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
