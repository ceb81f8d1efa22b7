"""``sedd-graph init``: copy a blueprint of the package and the block files it includes, or list these blueprints."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``init`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "init", run, "copy a shipped blueprint and the blocks it uses into the current folder, or list them"
    )
    parser.add_argument("name", nargs="?", help="a shipped blueprint, such as first (default: list them)")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``init`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.blueprint.shipped import shipped_blueprints, shipped_files
    from sedd_graph.store.files import write_text

    if arguments.name is None:
        shipped = shipped_blueprints()
        width = max(map(len, shipped))
        say("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in shipped.items()))
        say("\nnext        sedd-graph init NAME")
        return 0
    files = {Path(name): text for name, text in shipped_files(arguments.name).items()}
    blueprint = Path(f"{arguments.name}.yaml")
    # blocks that another blueprint brought may stay; a blueprint is where the user's changes are
    taken = [p for p, text in files.items() if p.exists() and (p == blueprint or not _holds(p, text))]
    if taken:
        raise UserError(f"{', '.join(map(str, taken))} exists already; move it away, or choose another folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    say(f"written     {', '.join(map(str, files))}\nnext        sedd-graph build {blueprint}")
    return 0


def _holds(path: Path, text: str) -> bool:
    """Return whether ``path`` is a file with just this text."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False
