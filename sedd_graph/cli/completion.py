"""``sedd-graph completion``: print the script with which a shell completes the command line."""

from __future__ import annotations

import argparse

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import MissingExtraError

__all__ = ["declare", "run"]

SHELLS = ("bash", "zsh", "tcsh")


def declare(verbs: Verbs) -> None:
    """Add the ``completion`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "completion", run, "print the script with which a shell completes this command (extra 'completion')"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(verbs=verbs)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``completion`` subcommand with the parsed ``arguments`` and return its exit code.

    Raises:
        MissingExtraError: The package shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("shtab", extra="completion", purpose="shell completion") from error
    parser = argparse.ArgumentParser(prog="sedd-graph")
    verbs = parser.add_subparsers(dest="verb")
    for name, verb in arguments.verbs.choices.items():
        verbs.add_parser(name, parents=[verb], add_help=False, help=verb.description)
    say(shtab.complete(parser, shell=arguments.shell))
    return 0
