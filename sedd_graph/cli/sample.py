"""``sedd-graph sample``: sample text, or points of a flow, from a trained model.

This module also defines the arguments that ``sample`` and ``infill`` share.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sedd_graph.cli.options import (
    LARGEST,
    Verbs,
    add_activations,
    add_device,
    add_dtype,
    add_memory,
    add_outside,
    add_sampler,
    add_temperature,
    add_verb,
    add_weights,
    integer,
    open_run_folder,
    position_pattern,
)
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sedd_graph.diffusion.conditions.conditions import Conditions
    from sedd_graph.engine.samples import SampleRequest
    from sedd_graph.runs.open import Run

__all__ = ["add_arguments", "declare", "read_conditions", "run", "show_stored", "watched"]


def declare(verbs: Verbs) -> None:
    """Add the ``sample`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "sample", run, "draw text (or a flow's points) from a run folder's newest weights")
    add_arguments(parser)
    parser.add_argument("--tape", help="also write a tape of the samples, which `sedd-graph restore` repeats")
    add_activations(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` the arguments that the subcommands ``sample`` and ``infill`` share."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--batch", type=integer(1, 65_536), help="samples to draw (default: 4)")
    parser.add_argument(
        "--length",
        type=integer(1, LARGEST),
        help="tokens per sample; for a model of strings, the most tokens (default: data.length)",
    )
    parser.add_argument("--steps", type=integer(1, 1_000_000), help="sampler steps (default: sample.steps)")
    parser.add_argument(
        "--seed", type=integer(0, 2**63 - 1), default=0, help="the same seed draws the same samples (default: 0)"
    )
    parser.add_argument("--trajectory", action="store_true", help="also store the tokens after every step")
    parser.add_argument("--matching", metavar="REGEX", help="the whole text of every sample matches REGEX")
    parser.add_argument(
        "--forbid", metavar="TEXT", action="append", default=[], help="no token contains TEXT (may be repeated)"
    )
    parser.add_argument(
        "--allow",
        metavar="POSITION=REGEX",
        type=position_pattern,
        action="append",
        default=[],
        help="the token at a position (negative: from the end) matches REGEX (may be repeated)",
    )
    parser.add_argument(
        "--particles",
        type=int,
        metavar="K",
        help="draw K rows for each one and choose among them, so that conditions have the model's distribution",
    )
    parser.add_argument(
        "--classifier",
        metavar="OP",
        help="classifier guidance, such as '{op: token_counts, file: counts.npy, label: 1, strength: 2}'",
    )
    parser.add_argument(
        "--compile",
        choices=("off", "block"),
        default="off",
        help="block: compile each repeated block first, which pays for large batches (default: off)",
    )
    add_dtype(parser, "auto; float32 with --tape")
    parser.add_argument("--watch", action="store_true", help="show the drafts of the first rows on the terminal")
    add_sampler(parser)
    add_temperature(parser)
    add_weights(parser)
    add_memory(parser)
    add_outside(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``sample`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.engine.samples import SampleRequest
    from sedd_graph.runs.sample import sample_run

    if arguments.tape is not None and arguments.classifier is not None:
        raise UserError("sample: a tape is of the run folder's own model: leave --tape or --classifier out")
    if arguments.tape is not None and (arguments.sampler or arguments.set or arguments.temperature is not None):
        raise UserError(
            "sample: a tape is of the run folder's own sampler: leave --tape, or the sampler's options, out"
        )
    if arguments.activations is not None and arguments.tape is None:
        raise UserError("sample: --activations are written beside a tape: give --tape, too")
    run = open_run_folder(arguments)
    length = arguments.length
    if length is None and "length" not in run.engine.process.refuses:
        length = run.report.data.length
    request = SampleRequest(
        batch=4 if arguments.batch is None else arguments.batch,
        length=length,
        steps=arguments.steps,
        seed=arguments.seed,
        conditions=read_conditions(run, arguments),
    )
    with watched(run, request, watch=arguments.watch) as watch:
        where = sample_run(
            run,
            request,
            trajectory=arguments.trajectory,
            tape=None if arguments.tape is None else Path(arguments.tape),
            activations=arguments.activations is not None,
            watch=watch,
            ignore_memory=arguments.ignore_memory,
            say=say,
        )
    return show_stored(run, where)


@contextlib.contextmanager
def watched(run: Run, request: SampleRequest, *, watch: bool) -> Iterator[Callable[[int, Tensor], None] | None]:
    """Context manager of the option ``--watch``. Its value is the callback of the sampler's steps, None without it.

    Args:
        run: The opened run folder.
        request: The sampling request.
        watch: Whether the option was given.

    Raises:
        UserError: The rows are not text, or standard output is not a terminal.
    """
    if not watch:
        yield None
        return
    from sedd_graph.cli.live import watching

    process, tokenizer = run.engine.process, run.text_tokenizer()
    with watching(lambda rows: process.drafts(rows, tokenizer), total=process.evaluations(request)) as on_step:
        yield on_step


def read_conditions(run: Run, arguments: argparse.Namespace) -> Conditions | None:
    """Return the sampling conditions of the blueprint, overridden by those given on the command line.

    Args:
        run: The opened run folder.
        arguments: Parsed arguments of ``sample`` or ``infill``.

    Returns:
        The conditions (such as forbidden tokens, a regular expression or guidance), or None if there are none.

    Raises:
        UserError: A condition is invalid, or the process does not support conditions.
    """
    single = {name: getattr(arguments, name, None) for name in ("matching", "particles", "guidance", "observed")}
    changes = {name: value for name, value in single.items() if value is not None}
    changes |= {"forbid": arguments.forbid} if arguments.forbid else {}
    changes |= {"allow": dict(arguments.allow)} if arguments.allow else {}
    return run.engine.process.conditions(changes)


def show_stored(run: Run, where: Path) -> int:
    """Print the path of the stored samples, update ``report.html``, and return exit code 0.

    Args:
        run: The opened run folder.
        where: Path of the zarr group that holds the samples, such as ``samples.zarr`` in the run folder.
    """
    from sedd_graph.report.html import write_report

    say(f"---\nweights {run.weights}; stored in {where}")
    write_report(run.path)
    return 0
