"""``sedd-graph restore``: return from the noise of a tape, and print the text that it leads to."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_activations, add_device, add_outside, add_verb, add_weights, picked_device
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``restore`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "restore", run, "walk back from noise: the text (or samples) of a tape, exactly")
    parser.add_argument("tape", help="a tape of `sedd-graph invert` or `sedd-graph sample --tape`")
    parser.add_argument("--run", help="the run folder (default: the folder that holds the tape)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the text to FILE, byte by byte")
    add_activations(parser)
    add_weights(parser)
    add_outside(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``restore`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.errors import UserError
    from sedd_graph.runs.activations import recording
    from sedd_graph.runs.open import open_run
    from sedd_graph.runs.restore import restored_texts
    from sedd_graph.runs.tape import run_of
    from sedd_graph.store.files import write_bytes
    from sedd_graph.store.tape import read_tape

    where = Path(arguments.tape)
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.exists():
        raise UserError(f"{output} exists already; choose another name")
    tape = read_tape(where)
    opened = open_run(
        run_of(where, arguments.run),
        device=picked_device(arguments),
        compile="off",
        weights=arguments.weights,
        save=arguments.activations or (),
    )
    with recording(opened, None if arguments.activations is None else where) as recorder:
        texts = restored_texts(opened, tape, where=where, recorder=recorder)
    text = "\n".join(texts)
    if output is None:
        say(text)
    else:
        write_bytes(output, text.encode("utf-8"))
        say(f"{len(texts):,} texts, every step as recorded; written to {output}")
    return 0
