"""``sedd-graph train``: train a run folder, or build a blueprint and train it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sedd_graph.cli.options import (
    Verbs,
    add_corpus,
    add_device,
    add_from,
    add_memory,
    add_outside,
    add_overrides,
    add_path_to,
    add_runs,
    add_verb,
    moved_corpus,
    picked_device,
    weights_from,
    write_path_to,
)
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["SIGNALS", "declare", "run", "train_folder"]

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138}
"""Exit code by the signal that stopped training."""


def declare(verbs: Verbs) -> None:
    """Add the ``train`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "train", run, "train a run folder (or build a blueprint and train it)")
    parser.add_argument("run", metavar="RUN|BLUEPRINT", help="a run folder, a blueprint, or a shipped one's name")
    add_overrides(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint that is whole; --resume auto: start if there is no checkpoint",
    )
    add_from(parser)
    add_runs(parser)
    add_path_to(parser)
    add_corpus(parser)
    add_memory(parser)
    add_device(parser)
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``train`` subcommand with the parsed ``arguments`` and return its exit code.

    Returns:
        0, or the exit code of the signal that stopped training: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 138
        for SIGUSR1.
    """
    from sedd_graph.blueprint.shipped import find_blueprint
    from sedd_graph.runs.build import build_run

    resume = _resume(arguments)
    path = find_blueprint(arguments.run)
    if path.is_file():
        if arguments.corpus is not None:
            raise UserError(f"{path} is a blueprint: --corpus takes a run folder")
        if resume is not False:
            raise UserError(f"{path} is a blueprint: --resume takes a run folder")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("under torchrun, give train a run folder: make one with `sedd-graph build` first")
        path = build_run(
            path,
            arguments.overrides,
            runs=Path(arguments.runs),
            device=picked_device(arguments),
            compile="off",
            ignore_memory=arguments.ignore_memory,
            weights=weights_from(arguments),
            table=arguments.map,
            say=say,
        )
        say(f"run folder  {path}")
        arguments.overrides = []
    elif weights_from(arguments) is not None:
        raise UserError(
            f"{path} is a run folder, whose weights are known: --from takes a blueprint (a run goes on with --resume)"
        )
    elif arguments.overrides and resume is False:
        raise UserError(
            "the blueprint of a run folder is locked: give overrides to `sedd-graph build`, or extend a run with --resume"
        )
    return train_folder(path, arguments, resume=resume)


def train_folder(path: Path, arguments: argparse.Namespace, *, resume: bool | None) -> int:
    """Train a run folder, write its report, and return the exit code as :func:`run` does.

    Args:
        path: The run folder.
        arguments: The parsed arguments of ``train``, or of another command that trains.
        resume: Whether to resume; None: where there is a checkpoint.
    """
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.train import train_run

    write_path_to(arguments, path)
    result, _ = train_run(
        path,
        resume=resume,
        device=picked_device(arguments),
        say=say,
        corpus=moved_corpus(arguments),
        overrides=arguments.overrides,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        write_report(path)
        if result.reason in SIGNALS:
            say(f"checkpoint written; resume with: sedd-graph train {path} --resume")
    return SIGNALS.get(result.reason, 0)


def _resume(arguments: argparse.Namespace) -> bool | None:
    """Return whether to resume, None for ``auto``, which argparse takes for another argument and which is removed."""
    if not arguments.resume:
        return False
    words = [arguments.run, *arguments.overrides]
    if "auto" not in words[1:] and not (words[0] == "auto" and len(words) > 1 and "=" not in words[1]):
        return True
    words.remove("auto")
    arguments.run, arguments.overrides = words[0], words[1:]
    return None
