"""``sedd-graph view``: write one page that plays samples from noise to text."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``view`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "view", run, "write one page, which loads nothing, that plays samples from noise to text")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN|ZARR",
        help="a run folder (its newest samples with a trajectory), or one or two zarr groups of samples, side by side",
    )
    parser.add_argument("-o", "--output", default="view.html", metavar="FILE", help="the page (default: view.html)")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``view`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.report.view import write_view

    if len(arguments.sources) > 2:
        raise UserError(f"view: a page plays one or two samples, not {len(arguments.sources)}")
    page = Path(arguments.output)
    write_view([Path(source) for source in arguments.sources], page)
    say(f"page        {page} ({page.stat().st_size / 1000:,.0f} kB)")
    return 0
