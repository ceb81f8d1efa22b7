"""``sedd-graph export``: write a run folder's newest weights, lock file and tokenizer to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_device, add_verb, picked_device
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``export`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "export", run, "write a run folder's newest weights, lock file and tokenizer to a folder")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``export`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.export import export_run

    out = Path(arguments.output)
    weights = export_run(Path(arguments.run), out, device=picked_device(arguments))
    say(f"weights ({weights}), lock file and tokenizer written to {out}; sedd_graph.build({str(out)!r}) opens it")
    return 0
