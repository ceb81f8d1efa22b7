"""``sedd-graph edit``: change words of a text on a noise tape, and keep the rest by its noise."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_device, add_outside, add_verb, add_weights, integer, picked_device
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``edit`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "edit", run, "change words of a text on a tape, and walk to the new text with its noise")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("tape", help="a tape of `sedd-graph invert`")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--replace", metavar="OLD=NEW", type=_replacement, help="replace OLD by NEW everywhere")
    change.add_argument(
        "--span",
        metavar=("A:B", "TEXT"),
        nargs=2,
        help="replace the characters from A up to B by TEXT (of the text that --line names, if there are several)",
    )
    parser.add_argument("--line", type=integer(1, 65_536), help="edit only the text of this number, from 1")
    parser.add_argument(
        "--strength",
        type=float,
        default=0.3,
        metavar="S",
        help="share of fresh noise at the other tokens, from 0 (nothing changes) to 1 (they are drawn anew) (default: 0.3)",
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="seed of the fresh noise (default: 0)")
    add_weights(parser)
    add_outside(parser)
    add_device(parser)


def _replacement(text: str) -> tuple[str, str]:
    old, found, new = text.partition("=")
    if not found or not old:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW, such as cat=dog")
    return old, new


def _span(text: str) -> tuple[int, int]:
    from sedd_graph.errors import UserError

    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and len(text) < 24):
        raise UserError(f"--span {text} is not A:B, the first character and the one after the last, such as 4:7")
    return int(start), int(stop)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``edit`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.errors import UserError
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.edit import edit_run, replace_in, span_in
    from sedd_graph.runs.open import open_run
    from sedd_graph.store.tape import read_tape

    where = Path(arguments.tape)
    tape = read_tape(where)
    edits = None
    if arguments.replace is not None:
        edits = replace_in(*arguments.replace)
    elif arguments.span is not None:
        edits = span_in(*_span(arguments.span[0]), arguments.span[1])
        if arguments.line is None and tape.rows > 1:
            raise UserError(f"--span needs --line, which text to change: there are {tape.rows:,} on the tape")
    opened = open_run(Path(arguments.run), device=picked_device(arguments), compile="off", weights=arguments.weights)
    found = edit_run(
        opened,
        tape,
        edits,
        where=where,
        row=None if arguments.line is None else arguments.line - 1,
        strength=arguments.strength,
        seed=arguments.seed,
        say=say,
    )
    say(f"---\nweights {opened.weights}; stored in {found}")
    write_report(opened.path)
    return 0
