"""``sedd-graph runs``: list run folders with their results."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_graph.cli.options import Verbs, add_verb, say_json
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError, suggest

if TYPE_CHECKING:
    from sedd_graph.runs.summary import Summary

__all__ = ["declare", "print_runs", "run"]

_COLUMNS: dict[str, tuple[str, Callable[[Summary], str]]] = {
    # sort key: heading, text
    "bits": ("bits", lambda s: "" if s.bits is None else f"{s.bits:.4f}" + (f" ± {s.error:.4f}" if s.error else "")),
    "step": ("step", lambda s: "" if s.step is None else f"{s.step:,}"),
    "parameters": ("parameters", lambda s: "" if s.parameters is None else f"{s.parameters:,}"),
    "process": ("process", lambda s: s.process or ""),
    "objective": ("objective", lambda s: s.objective or ""),
    "name": ("blueprint", lambda s: s.name),
    "created": ("created (UTC)", lambda s: (s.created or "").replace("T", " ")[:16]),
    "path": ("run folder", lambda s: str(s.path)),
}


def declare(verbs: Verbs) -> None:
    """Add the ``runs`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "runs", run, "list run folders with their held-out bits per character")
    parser.add_argument("folder", nargs="?", default="runs", help="a folder with run folders (default: runs)")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs whose resolved blueprint has this value, such as process.op=absorb or train.batch=32; VALUE may have "
        "wildcards (may be repeated)",
    )
    parser.add_argument(
        "--sort", choices=tuple(_COLUMNS), default="created", help="column to sort by (default: created)"
    )
    parser.add_argument("--reverse", action="store_true", help="largest, or newest, first")
    parser.add_argument("--json", action="store_true", help="print the runs as JSON, with their resolved blueprints")


def run(arguments: argparse.Namespace) -> int:
    """Run the ``runs`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.summary import find_runs, summarise

    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = [summarise(path) for path in find_runs(folder)]
    for condition in arguments.where:
        found = _matching(found, condition)
    found = ordered(found, arguments.sort, reverse=arguments.reverse)
    if arguments.json:
        say_json([{**summary.record(), "settings": summary.settings} for summary in found])
    elif not found:
        say(f"no run folders in {folder}")
    else:
        print_runs(found)
    return 0


def _matching(found: Sequence[Summary], condition: str) -> list[Summary]:
    """Return the runs that fulfil ``KEY=VALUE``."""
    from sedd_graph.runs.summary import unversioned

    key, equals, pattern = condition.partition("=")
    if not equals or not key:
        raise UserError(f"--where {condition}: give KEY=VALUE, such as process.op=absorb")
    known = {name for summary in found for name in summary.settings}
    if found and key not in known:
        raise UserError(f"--where {condition}: no run has the key {key!r}{suggest(key, known)}")

    def fits(summary: Summary) -> bool:
        if key not in summary.settings:
            return False
        value = summary.settings[key]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return any(fnmatch.fnmatchcase(t, pattern) for t in (text, unversioned(text) or text))

    return [summary for summary in found if fits(summary)]


def ordered(found: Sequence[Summary], column: str, *, reverse: bool = False) -> list[Summary]:
    """Return runs sorted by a column; those without a value come last."""
    known = [s for s in found if getattr(s, column) is not None]
    others = [s for s in found if getattr(s, column) is None]

    def key(summary: Summary) -> Any:
        value = getattr(summary, column)
        return str(value) if isinstance(value, Path) else value

    return [*sorted(known, key=key, reverse=reverse), *others]


def print_runs(found: Sequence[Summary]) -> None:
    """Print runs as a table."""
    units = {summary.unit for summary in found if summary.bits is not None}
    heads = [head for head, _ in _COLUMNS.values()]
    heads[0] = f"bits/{units.pop()}" if len(units) == 1 else "bits"
    rows = [heads, *([text(summary) for _, text in _COLUMNS.values()] for summary in found)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(heads))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
