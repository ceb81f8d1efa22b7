"""``sedd-graph invert``: write the noise with which a model's sampler returns to a given text."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import (
    Verbs,
    add_device,
    add_memory,
    add_outside,
    add_verb,
    add_weights,
    integer,
    picked_device,
)
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``invert`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "invert", run, "walk a text to noise: write the noise tape that leads the sampler back to it"
    )
    parser.add_argument("run", help="a run folder")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text")
    given.add_argument("--file", help="a file with one text per line")
    parser.add_argument("--steps", type=integer(1, 1_000_000), help="sampler steps (default: sample.steps)")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--batch", type=integer(1, 65_536), default=64, help="texts run together, at most (default: 64)"
    )
    parser.add_argument(
        "-o", "--output", metavar="TAPE", help="path of the tape (default: tape.zarr in the run folder)"
    )
    add_weights(parser)
    add_memory(parser)
    add_outside(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``invert`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.inputs.files import read_text
    from sedd_graph.runs.invert import invert_run
    from sedd_graph.runs.open import open_run

    if arguments.file is None:
        texts = [arguments.text]
    else:
        texts = read_text(arguments.file, limit=2**28).split("\n")
    opened = open_run(Path(arguments.run), device=picked_device(arguments), compile="off", weights=arguments.weights)
    where = invert_run(
        opened,
        texts,
        steps=arguments.steps,
        seed=arguments.seed,
        batch=arguments.batch,
        where=None if arguments.output is None else Path(arguments.output),
        ignore_memory=arguments.ignore_memory,
        say=say,
    )
    say(f"---\nweights {opened.weights}; verified by a replay; `sedd-graph restore {where}` returns to the text")
    return 0
