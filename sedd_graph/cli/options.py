"""Arguments that several commands share, declared once, and the values that they stand for.

This module imports nothing heavy: ``sedd-graph --help`` reads it. A function that needs torch imports it when it is called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    from sedd_graph.runs.open import Run

__all__ = [
    "LARGEST",
    "Verbs",
    "add_debug",
    "add_device",
    "add_overrides",
    "add_runs",
    "add_verb",
    "add_weights",
    "integer",
    "open_run_folder",
    "picked_device",
    "position_pattern",
    "say",
]

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Type of the result of ``add_subparsers``, to which each command adds a parser."""

LARGEST = 2**20
"""Most tokens per row, as in ``data.length``."""


def say(text: str) -> None:
    """Print a line for the user on standard output, at once."""
    print(text, flush=True)


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Declare a command and return its argument parser. ``run`` takes the parsed arguments and returns an exit code."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run_verb=run)
    add_debug(parser, default=argparse.SUPPRESS)  # absent, it does not reset the --debug that stands before the command
    return parser


def add_debug(parser: argparse.ArgumentParser, *, default: object = False) -> None:
    """Declare ``--debug``."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return the argparse type of an integer from ``low`` to ``high``, both included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:,} to {high:,}, not {value:,}")
        return value

    return read


def position_pattern(text: str) -> tuple[int, str]:
    """Parse an argument ``POSITION=REGEX``, such as ``0=[A-Z]``."""
    position, found, pattern = text.partition("=")
    try:
        if found:
            return int(position), pattern
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not POSITION=REGEX, such as 0=[A-Z]")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Declare ``key=value ...``: overrides of the blueprint."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the blueprint, such as train.steps=100"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest one present)")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Declare ``--runs``."""
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder for new run folders (default: runs)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare ``--weights``."""
    parser.add_argument(
        "--weights",
        choices=("newest", "model", "fresh"),
        default="newest",
        help="newest: the newest checkpoint, averaged (EMA) if it has averages; model: its weights without averaging; "
        "fresh: untrained (default: newest)",
    )


def picked_device(arguments: argparse.Namespace) -> torch.device:
    """Return the device that ``--device`` names, or the fastest one present. Raises ``UserError`` for an unknown one."""
    from sedd_graph.engine.hardware import pick_device

    return pick_device(arguments.device)


def open_run_folder(arguments: argparse.Namespace) -> Run:
    """Open the run folder that the command line names, with its overrides of the blueprint.

    For the commands with the arguments of ``sample``: ``--weights``, ``--classifier`` and ``--compile`` among them.
    """
    from sedd_graph.runs.open import open_run

    run = open_run(
        Path(arguments.run),
        overrides=[] if arguments.classifier is None else [f"sample.classifier={arguments.classifier}"],
        device=picked_device(arguments),
        compile="off",
        weights=arguments.weights,
    )
    run.engine.compile(arguments.compile, everywhere=True)
    return run
