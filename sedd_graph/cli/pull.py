"""``sedd-graph pull``: download a repository of a model hub to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``pull`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "pull", run, "download a repository of a model hub to a folder")
    parser.add_argument("repo", help="the repository, owner/name")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``pull`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.check import LOCK
    from sedd_graph.runs.hub import pull

    out = pull(arguments.repo, Path(arguments.output), revision=arguments.revision)
    say(f"files       {len(list(out.iterdir()))} in {out}")
    if (out / LOCK).is_file():
        kind = "export" if (out / "config.json").is_file() else None
        say(f"next        sedd-graph {f'import {kind} {out}' if kind else f'sample {out}'}")
    else:
        say(f"next        sedd-graph import KIND {out}")
    return 0
