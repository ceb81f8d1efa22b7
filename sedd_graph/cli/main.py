"""The command line ``sedd-graph COMMAND``, with one module per subcommand that declares its arguments and runs it.

The module of a subcommand imports torch, and other packages that load slowly, only when the subcommand runs, so that
``sedd-graph --help`` is fast.

Exit codes: 0 success; 1 fault of the environment; 2 error in the user's input; 3 training diverged (NaN or infinite
values); 130 stopped by SIGINT; 143, 129 and 138 training stopped by SIGTERM, SIGHUP and SIGUSR1; 141 standard
output was closed by its reader (SIGPIPE).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from sedd_graph import __version__
from sedd_graph.cli import (
    build,
    compare,
    completion,
    components,
    distill,
    edit,
    evaluate,
    export,
    import_weights,
    infill,
    init,
    invert,
    lm_eval,
    pull,
    restore,
    runs,
    sample,
    schema,
    serve,
    show,
    sweep,
    tokenize,
    train,
    view,
)
from sedd_graph.cli.options import add_debug
from sedd_graph.cli.progress import console_observer
from sedd_graph.cli.terminal import printable, say
from sedd_graph.component.progress import observed
from sedd_graph.errors import SeddGraphError, suggest
from sedd_graph.inputs.confine import allow_outside

__all__ = ["main", "run"]

VERBS = (
    init,
    build,
    tokenize,
    train,
    distill,
    sweep,
    sample,
    infill,
    serve,
    invert,
    restore,
    edit,
    evaluate,
    lm_eval,
    show,
    runs,
    compare,
    view,
    components,
    schema,
    import_weights,
    export,
    pull,
    completion,
)
"""Modules of the subcommands, in the order in which ``--help`` lists them."""


class _Parser(argparse.ArgumentParser):
    """Argument parser with one-line error messages that suggest the most similar valid choice."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        if choices is not None and value not in choices:
            names = ", ".join(choices)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{suggest(value, choices)}; choose from {names}"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sedd-graph",
        description="Discrete-diffusion language models: declare them in YAML, prove them, run them.",
        epilog="Exit codes: 0 done, 1 environment, 2 your input, 3 diverged numbers.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_debug(parser)
    subparsers = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for verb in VERBS:
        verb.declare(subparsers)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Overrides may follow options, where argparse takes them for unknown arguments."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if getattr(arguments, "passes_on", False):  # to the command line of another program
        arguments.rest = rest
        return arguments
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand named in ``argv`` (default: ``sys.argv[1:]``), and exit with its exit code."""
    # without file, line and source
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    sys.excepthook = _show_traceback
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named in ``argv`` and return its exit code.

    An exception is printed to standard error as one message, and determines the exit code. With ``--debug``, the
    exception is raised instead.

    Args:
        argv: Arguments without the program name; ``sys.argv[1:]`` by default.
    """
    arguments = _parsed(argv)
    try:
        with observed(console_observer()), allow_outside(getattr(arguments, "allow_outside", False)):
            code: int = arguments.run_verb(arguments)
        return code
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug and not isinstance(error, BrokenPipeError):
            raise
        return _fail(error)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


def _fail(error: BaseException) -> int:
    """Print what went wrong and return the exit code."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the exit code of a program that SIGPIPE ends
    code, text = 1, str(error)
    if isinstance(error, SeddGraphError):
        code = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "stopped"
    elif _out_of_memory(error):
        text = (
            "out of memory: take fewer or shorter rows (--batch, --length; train.batch, train.accumulate, data.length), "
            "or a smaller model"
        )
    else:  # a defect of this package or of a component
        first = text.strip().split("\n")[0]
        text = f"internal error: {type(error).__name__}: {first} (run again with --debug for the traceback)"
    say(text, sys.stderr)
    return code


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: torch raises a class of its own on a GPU, and a RuntimeError on a CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError)
