"""``sedd-graph compare``: write one page that compares runs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_verb, say_json
from sedd_graph.cli.runs import print_runs
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``compare`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "compare", run, "compare runs on one page: bounds with a paired test, curves, settings, samples"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two or more run folders")
    parser.add_argument(
        "-o", "--output", default="compare.html", metavar="FILE", help="the page (default: compare.html)"
    )
    parser.add_argument("--json", action="store_true", help="print results, differences and settings as JSON, too")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``compare`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.report.compare import changed_settings, pairs, write_comparison
    from sedd_graph.runs.summary import require_run, summarise

    page = Path(arguments.output)
    runs = [summarise(require_run(Path(path))) for path in dict.fromkeys(arguments.runs)]
    write_comparison(runs, page)
    found = pairs(runs)
    if arguments.json:
        record = {
            "runs": [summary.record() for summary in runs],
            "differences": [
                {**dataclasses.asdict(pair), "one": str(pair.one), "other": str(pair.other)} for pair in found
            ],
            "settings": dict(changed_settings(runs)),
            "page": str(page),
        }
        say_json(record)
        return 0
    print_runs(runs)
    for pair in found:
        say(
            f"{pair.one} - {pair.other}: {pair.bits:+.4f} ± {pair.error:.4f} bits per {runs[0].unit} on the same "
            f"{pair.rows:,} rows (p {'< 1e-6' if pair.p_value < 1e-6 else f'= {pair.p_value:.2g}'})"
        )
    say(f"page        {page}")
    return 0
