"""``sedd-graph show``: print the graph of a blueprint or run folder, or the inverses of its invertible blocks."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_outside, add_overrides, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``show`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "show", run, "print a blueprint's or run folder's graph")
    parser.add_argument("blueprint", metavar="BLUEPRINT|RUN", help="a blueprint, a shipped one's name, or a run folder")
    add_overrides(parser)
    parser.add_argument("--format", choices=("tree", "mermaid", "svg", "json", "lock"), default="tree")
    parser.add_argument(
        "--inverse",
        action="store_true",
        help="print the inverse of each block that claims to be invertible, or why it has none",
    )
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``show`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.graph import draw
    from sedd_graph.runs.check import LOCK, check, lock_text
    from sedd_graph.store.changes import read_changes

    path = Path(arguments.blueprint)
    path = path / LOCK if path.is_dir() else path
    if arguments.inverse:
        return _show_inverse(path, arguments)
    report = check(path, arguments.overrides)
    if arguments.format == "lock":
        say(lock_text(report).rstrip("\n"))
    else:
        made = {"tree": draw.to_tree, "mermaid": draw.to_mermaid, "svg": draw.to_svg, "json": draw.to_json}
        say(made[arguments.format](report.graph).rstrip("\n"))
    if arguments.format == "tree" and Path(arguments.blueprint).is_dir():
        for change in read_changes(Path(arguments.blueprint)):
            say(f"training was changed {change}")
    return 0


def _show_inverse(path: Path, arguments: argparse.Namespace) -> int:
    """Print the inverse of each block that claims one, or why it has none; or a drawing of both directions."""
    from sedd_graph.graph import draw
    from sedd_graph.inverse.format import arrows, explain
    from sedd_graph.runs.check import inverses

    graph, derived = inverses(path, arguments.overrides)
    if not derived:
        raise UserError(f"{path}: no block claims to be invertible; say 'invertible: true' in one")
    if arguments.format in ("mermaid", "svg"):
        made = {"mermaid": draw.to_mermaid, "svg": draw.to_svg}[arguments.format]
        say(made(graph, {one.region: arrows(one.found) for one in derived}).rstrip("\n"))
    elif arguments.format == "tree":
        labels = Counter(one.region.label for one in derived)
        say("\n\n".join(explain(one.found, typed=labels[one.region.label] > 1) for one in derived))
    else:
        raise UserError("--inverse goes with --format tree, mermaid or svg")
    refused = [one for one in derived if one.problem is not None]
    return UserError.exit_code if refused else 0
