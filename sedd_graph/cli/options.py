"""Command-line arguments that several subcommands share, and functions that interpret their values.

This module is imported by ``sedd-graph --help``, so functions that need torch import it when they are called.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

if TYPE_CHECKING:
    import torch

    from sedd_graph.runs.open import Run

__all__ = [
    "LARGEST",
    "Verbs",
    "add_activations",
    "add_corpus",
    "add_debug",
    "add_device",
    "add_dtype",
    "add_from",
    "add_json",
    "add_memory",
    "add_outside",
    "add_overrides",
    "add_path_to",
    "add_runs",
    "add_sampler",
    "add_temperature",
    "add_verb",
    "add_weights",
    "integer",
    "moved_corpus",
    "open_run_folder",
    "picked_device",
    "position_pattern",
    "reporter",
    "say_json",
    "weights_from",
    "write_path_to",
]

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Type of the object that ``ArgumentParser.add_subparsers`` returns; each subcommand adds its parser to this object."""

LARGEST = 2**20
"""Maximum number of tokens per row, equal to the limit on ``data.length``."""


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Add a subcommand to the command line and return its argument parser, which already has ``--debug``.

    Args:
        verbs: Subparsers of the command line.
        name: Name of the subcommand.
        run: Function that runs the subcommand: takes the parsed arguments and returns an exit code.
        summary: Description of the subcommand in ``--help``.
    """
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run_verb=run)
    add_debug(parser, default=argparse.SUPPRESS)  # absent, it does not reset the --debug that stands before the command
    return parser


def add_debug(parser: argparse.ArgumentParser, *, default: object = False) -> None:
    """Add the option ``--debug`` to ``parser``, with value ``default`` if the option is absent."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse ``type`` function that parses an integer and checks ``low <= value <= high``."""

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
    """Parse the value ``POSITION=REGEX`` of ``--allow``, such as ``0=[A-Z]``.

    Returns:
        The position of a token in a sample (from 0; negative: from the end), and the regular expression that the
        token's text must match.

    Raises:
        argparse.ArgumentTypeError: ``text`` does not have this form.
    """
    position, found, pattern = text.partition("=")
    try:
        if found:
            return int(position), pattern
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not POSITION=REGEX, such as 0=[A-Z]")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments ``key=value ...``, overrides of the blueprint, to ``parser``."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the blueprint, such as train.steps=100"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device``, the torch device, to ``parser``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest one present)")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option ``--dtype``, the precision of the network, to ``parser``; ``default`` says what applies without it."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help=f"precision of the network; auto: bfloat16 (autocast) on a GPU that supports it, else float32 (default: {default})",
    )


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--corpus``, the folder of the data's files, to ``parser``."""
    parser.add_argument(
        "--corpus", metavar="DIR", help="folder of the data's files, if it has moved since the run was built"
    )


def moved_corpus(arguments: argparse.Namespace) -> Path | None:
    """Return the folder given by ``--corpus``; None without the option.

    Raises:
        UserError: It is not a folder.
    """
    if arguments.corpus is None:
        return None
    if not Path(arguments.corpus).is_dir():
        raise UserError(f"--corpus {arguments.corpus}: no such folder")
    return Path(arguments.corpus).resolve()


def add_outside(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--allow-outside``, which permits files outside the blueprint's or run folder."""
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="read files that the blueprint or run folder names outside the project's folder (the blueprint's), too, and "
        "write through links that lead out of the run folder",
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--runs``, the parent folder of new run folders, to ``parser``."""
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder for new run folders (default: runs)")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option ``--json`` to ``parser``: ``what`` is printed as JSON on standard output, all else on standard error."""
    parser.add_argument(
        "--json", action="store_true", help=f"print {what} as JSON, and everything else to standard error"
    )


def reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Return the function that prints a line for the user: to standard error under ``--json``."""
    return functools.partial(say, file=sys.stderr) if arguments.json else say


def say_json(value: object) -> None:
    """Print ``value`` as JSON; numbers that JSON lacks are null."""
    from sedd_graph.store.files import plain

    say(json.dumps(plain(value), indent=2, allow_nan=False, sort_keys=True))


def add_path_to(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--path-to``, a file to which the path of the run folder is written, to ``parser``."""
    parser.add_argument("--path-to", metavar="FILE", help="write the path of the run folder to FILE")


def write_path_to(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the path of the run folder to the file of ``--path-to``, if it is given."""
    if arguments.path_to:
        from sedd_graph.store.files import write_text

        write_text(Path(arguments.path_to), str(folder))


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--ignore-memory``: if the estimated memory exceeds the device's, warn and continue."""
    parser.add_argument(
        "--ignore-memory", action="store_true", help="only warn about more memory than the device is estimated to have"
    )


def add_from(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--from`` and ``--map``: weights that training starts from, and a table of their names."""
    parser.add_argument(
        "--from",
        dest="weights",
        metavar="RUN|DIR|FILE",
        help="start from weights, by name: of a run folder, an export, or safetensors or GGUF weights; a table says what matched",
    )
    parser.add_argument(
        "--map",
        metavar="NAME|FILE",
        help="with --from: the names of the weights by our names, a shipped table or a YAML file (default: what matches most)",
    )


def weights_from(arguments: argparse.Namespace) -> Path | None:
    """Return the path of ``--from``; None without it. Raises :class:`UserError` if ``--map`` is given alone."""
    if arguments.map is not None and arguments.weights is None:
        raise UserError("--map names the weights of --from, which is missing")
    return None if arguments.weights is None else Path(arguments.weights)


def add_activations(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--activations``: save ports beside a tape, those of the blueprint or the named ones."""
    parser.add_argument(
        "--activations",
        nargs="*",
        metavar="PORT",
        help="write the values of ports at every step beside the tape, such as trunk/x, or trunk/norm/out for a node of a "
        "block (without names: the ports that the blueprint saves)",
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add the options that change the ``sample`` section of a run: ``--sampler`` and ``--set``."""
    parser.add_argument(
        "--sampler",
        metavar="OP",
        help="sampler in place of the blueprint's, whose other keys are kept where it has them",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the blueprint's section sample, such as top_p=0.9 (may be repeated)",
    )


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--temperature`` of samples to ``parser``."""
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature (default: sample.temperature)"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--weights``, the choice between averaged, raw and untrained weights, to ``parser``."""
    parser.add_argument(
        "--weights",
        choices=("newest", "model", "fresh"),
        default="newest",
        help="newest: the newest checkpoint, averaged (EMA) if it has averages; model: its weights without averaging; "
        "fresh: untrained (default: newest)",
    )


def picked_device(arguments: argparse.Namespace) -> torch.device:
    """Return the torch device named by ``--device``, or by default the fastest one available.

    Raises:
        UserError: The device is unknown or not available.
    """
    from sedd_graph.engine.hardware import pick_device

    return pick_device(arguments.device)


def open_run_folder(arguments: argparse.Namespace) -> Run:
    """Open the run folder given on the command line, with the chosen device, weights, classifier, compilation and dtype.

    Args:
        arguments: Parsed arguments of ``sample`` or ``infill``.
    """
    from sedd_graph.runs.open import open_run
    from sedd_graph.runs.precision import choose_dtype
    from sedd_graph.runs.sample_section import sample_overrides

    settings = [] if arguments.temperature is None else [f"temperature={arguments.temperature}"]
    settings += [] if arguments.classifier is None else [f"classifier={arguments.classifier}"]
    run = open_run(
        Path(arguments.run),
        overrides=sample_overrides(Path(arguments.run), arguments.sampler, [*settings, *arguments.set]),
        device=picked_device(arguments),
        compile="off",
        weights=arguments.weights,
        save=getattr(arguments, "activations", None) or (),
    )
    run.engine.compile(arguments.compile, everywhere=True)
    taped = getattr(arguments, "tape", None) is not None
    choose_dtype(run, arguments.dtype or ("float32" if taped else "auto"))
    return run
