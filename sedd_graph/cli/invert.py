"""``sedd-graph invert``: walk a text to noise, by the sampler or by the kernel, and write the tape that leads back."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import (
    Verbs,
    add_activations,
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
        verbs,
        "invert",
        run,
        "walk a text to noise, by the model's sampler or by its kernel; write the tape that leads back",
    )
    parser.add_argument("run", help="a run folder")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text")
    given.add_argument("--file", help="a file with one text per line")
    parser.add_argument(
        "--by",
        choices=("sampler", "kernel"),
        default="sampler",
        help="sampler: the noise with which the sampler writes the text; kernel: the text noised by the forward process, with "
        "a bitstream that makes the noise a bijection, without a network (default: sampler)",
    )
    parser.add_argument(
        "--time", type=_time, metavar="T", help="by kernel: time of the noise, above 0 up to 1 (default: 1)"
    )
    parser.add_argument(
        "--steps",
        type=integer(1, 1_000_000),
        help="sampler steps (default: sample.steps); by kernel, steps of noise (default: 1)",
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--batch", type=integer(1, 65_536), help="texts run together, at most (default: 64; by kernel 1,024)"
    )
    parser.add_argument(
        "-o", "--output", metavar="TAPE", help="path of the tape (default: tape.zarr in the run folder)"
    )
    add_activations(parser)
    add_weights(parser)
    add_memory(parser)
    add_outside(parser)
    add_device(parser)


def _time(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0 up to 1, such as 0.5")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Run the ``invert`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.errors import UserError
    from sedd_graph.inputs.files import read_text
    from sedd_graph.runs.invert import invert_run
    from sedd_graph.runs.noise import noise_run
    from sedd_graph.runs.open import open_run

    if arguments.file is None:
        texts = [arguments.text]
    else:
        texts = read_text(arguments.file, limit=2**28).split("\n")
    if arguments.time is not None and arguments.by != "kernel":
        raise UserError("invert: --time is that of forward noise: give --by kernel, or leave it out")
    if arguments.activations is not None and arguments.by == "kernel":
        raise UserError("invert: --by kernel evaluates no network: leave --activations out")
    opened = open_run(
        Path(arguments.run),
        device=picked_device(arguments),
        compile="off",
        weights=arguments.weights,
        save=arguments.activations or (),
    )
    output = None if arguments.output is None else Path(arguments.output)
    if arguments.by == "kernel":
        where = noise_run(
            opened,
            texts,
            until=arguments.time or 1.0,
            steps=arguments.steps or 1,
            seed=arguments.seed,
            batch=arguments.batch or 1024,
            where=output,
            say=say,
        )
        say(f"---\nverified by the way back; `sedd-graph restore {where}` returns to the text")
        return 0
    where = invert_run(
        opened,
        texts,
        steps=arguments.steps,
        seed=arguments.seed,
        batch=arguments.batch or 64,
        where=output,
        ignore_memory=arguments.ignore_memory,
        activations=arguments.activations is not None,
        say=say,
    )
    say(f"---\nweights {opened.weights}; verified by a replay; `sedd-graph restore {where}` returns to the text")
    return 0
