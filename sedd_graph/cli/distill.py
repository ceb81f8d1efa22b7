"""``sedd-graph distill``: train a student of a run that needs few sampler steps."""

from __future__ import annotations

import argparse
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
    write_path_to,
)
from sedd_graph.cli.terminal import say
from sedd_graph.cli.train import SIGNALS

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
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.distill import build_student
    from sedd_graph.runs.train import train_run

    corpus = moved_corpus(arguments)
    path = build_student(
        Path(arguments.run),
        arguments.overrides,
        runs=Path(arguments.runs),
        device=picked_device(arguments),
        ignore_memory=arguments.ignore_memory,
        corpus=corpus,
        say=say,
    )
    say(f"run folder  {path}")
    write_path_to(arguments, path)
    result, _ = train_run(path, resume=False, device=picked_device(arguments), say=say, corpus=corpus)
    write_report(path)
    if result.reason in SIGNALS:
        say(f"checkpoint written; resume with: sedd-graph train {path} --resume")
    return SIGNALS.get(result.reason, 0)
