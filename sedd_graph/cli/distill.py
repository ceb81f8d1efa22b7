"""``sedd-graph distill``: train a student of a run that needs few sampler steps."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sedd_graph.cli.options import (
    Verbs,
    add_corpus,
    add_device,
    add_memory,
    add_outside,
    add_overrides,
    add_path_to,
    add_runs,
    add_verb,
    moved_corpus,
    picked_device,
)
from sedd_graph.cli.terminal import say
from sedd_graph.cli.train import train_folder
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``distill`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "distill", run, "train a student of a run that needs few sampler steps")
    parser.add_argument("run", metavar="RUN", help="the run folder of the teacher")
    add_overrides(parser)
    add_runs(parser)
    add_path_to(parser)
    add_corpus(parser)
    add_memory(parser)
    add_device(parser)
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``distill`` subcommand with the parsed ``arguments`` and return its exit code, as ``train`` does."""
    from sedd_graph.runs.distill import build_student

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "distill makes a run folder: start it without torchrun, then `sedd-graph train STUDENT --resume`"
        )
    path = build_student(
        Path(arguments.run),
        arguments.overrides,
        runs=Path(arguments.runs),
        device=picked_device(arguments),
        ignore_memory=arguments.ignore_memory,
        corpus=moved_corpus(arguments),
        say=say,
    )
    say(f"run folder  {path}")
    arguments.overrides = []
    return train_folder(path, arguments, resume=False)
