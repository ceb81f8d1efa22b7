"""``sedd-graph schema``: print the JSON Schema of blueprints."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``schema`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "schema", run, "print the JSON Schema of blueprints, for editors")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it to FILE instead")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``schema`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.check import schema_text

    text = schema_text()
    if arguments.output:
        from sedd_graph.store.files import write_text

        write_text(Path(arguments.output), text)
        say(f"written to {arguments.output}")
    else:
        say(text.rstrip("\n"))
    return 0
