"""``sedd-graph components``: list the installed components, describe one, or verify which of them work together.

The last (``--matrix``) verifies numerically each kernel with each schedule, objective and sampler.
"""

from __future__ import annotations

import argparse

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``components`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "components", run, "list installed components, or describe one")
    parser.add_argument("name", nargs="?", help="such as attention or attention.v1")
    parser.add_argument(
        "--matrix", action="store_true", help="prove every kernel with every schedule, objective and sampler (minutes)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the ``components`` subcommand with the parsed ``arguments`` and return its exit code."""
    if arguments.matrix:
        from sedd_graph.component.progress import track
        from sedd_graph.component.registry import discover
        from sedd_graph.runs.matrix import cells, matrix

        if arguments.name:
            raise UserError("--matrix covers all components: leave the name out")
        say(matrix(track(cells(discover()), "proving", unit="combination")).rstrip("\n"))
    else:
        from sedd_graph.component.describe import describe, list_components

        say(describe(arguments.name) if arguments.name else list_components())
    return 0
