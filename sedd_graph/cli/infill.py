"""``sedd-graph infill``: sample the free tokens of a text, given the other tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sedd_graph.cli import sample
from sedd_graph.cli.options import Verbs, add_verb, integer, open_run_folder
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``infill`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "infill", run, "fill in the free parts of a text")
    sample.add_arguments(parser)
    parser.add_argument(
        "--text", help="text in which [[N]] stands for N free tokens ([[]] for any number, for a model of strings)"
    )
    parser.add_argument(
        "--hole",
        metavar="REGEX",
        action="append",
        default=[],
        help="what fills the holes matches REGEX: one for all holes, or one for each, in order (may be repeated)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="fill in every text of a file: one per line, or JSON lines (.jsonl) with text, or prefix and suffix, and "
        "optionally id and length; --batch (default here: 1) is the number of answers for each",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="with --prompts: file of the answers, JSON lines (default: beside the zarr)",
    )
    parser.add_argument(
        "--rows",
        type=integer(1, 65_536),
        default=32,
        help="with --prompts: most rows of one length that are sampled together (default: 32)",
    )
    parser.add_argument("--prefix", help="text that every sample starts with")
    parser.add_argument("--suffix", help="text that every sample ends with")
    parser.add_argument(
        "--guidance", type=float, help="strength of guidance towards the given text: 1 is the model's own, 2 or 3 more"
    )
    parser.add_argument(
        "--observed",
        choices=("clamp", "renoise"),
        help="for kernels that move visible tokens: hold the given text fixed, or noise it anew at each step",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the ``infill`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.engine.samples import SampleRequest, TextWithHoles
    from sedd_graph.runs.prompts import hole_pattern
    from sedd_graph.runs.sample import read_prompt, sample_run

    if arguments.prompts is not None:
        return _run_prompts(arguments)
    if arguments.output is not None:
        raise UserError("infill: -o is for the answers to --prompts FILE")
    run = open_run_folder(arguments)
    holes = TextWithHoles(
        text=arguments.text, prefix=arguments.prefix, suffix=arguments.suffix, length=arguments.length
    )
    if arguments.hole:
        if arguments.matching is not None:
            raise UserError("infill: --hole says what fills the holes, --matching the whole text: give one of them")
        arguments.matching = hole_pattern(holes, arguments.hole)
    conditions = sample.read_conditions(run, arguments)
    prompt = read_prompt(run, holes, observed=conditions.observed if conditions else "clamp")
    if not prompt.exact:
        say(f"warning: {prompt.how}", sys.stderr)
    request = SampleRequest(
        batch=4 if arguments.batch is None else arguments.batch,
        length=prompt.length,
        steps=arguments.steps,
        seed=arguments.seed,
        prompt=prompt.tokens,
        conditions=conditions,
    )
    with sample.watched(run, request, watch=arguments.watch) as watch:
        where = sample_run(
            run,
            request,
            trajectory=arguments.trajectory,
            name="infilled.zarr",
            notes={"infilling": prompt.how},
            watch=watch,
            ignore_memory=arguments.ignore_memory,
            say=say,
        )
    return sample.show_stored(run, where)


def _run_prompts(arguments: argparse.Namespace) -> int:
    """Fill in the prompts of a file."""
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.prompts import fill_in, read_prompts

    if arguments.hole:
        raise UserError("infill: --hole is of one --text; for the prompts of a file give --matching")
    for name in ("text", "prefix", "suffix", "length", "trajectory", "watch"):
        if getattr(arguments, name):
            raise UserError(f"infill: --prompts gives the texts: leave --{name} out")
    lines = read_prompts(Path(arguments.prompts))
    run = open_run_folder(arguments)
    where, answers = fill_in(
        run,
        lines,
        samples=1 if arguments.batch is None else arguments.batch,
        rows=arguments.rows,
        seed=arguments.seed,
        steps=arguments.steps,
        conditions=sample.read_conditions(run, arguments),
        output=None if arguments.output is None else Path(arguments.output),
        ignore_memory=arguments.ignore_memory,
        say=lambda text: say(text, sys.stderr),
    )
    say(f"weights {run.weights}; answers to {len(lines):,} prompts in {answers}; stored in {where}")
    write_report(run.path)
    return 0
