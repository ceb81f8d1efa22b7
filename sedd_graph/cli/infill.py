"""``sedd-graph infill``: sample the free tokens of a text, given the other tokens."""

from __future__ import annotations

import argparse
import sys

from sedd_graph.cli import sample
from sedd_graph.cli.options import Verbs, add_verb, open_run_folder
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``infill`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "infill", run, "fill in the free parts of a text")
    sample.add_arguments(parser)
    parser.add_argument(
        "--text", help="text in which [[N]] stands for N free tokens ([[]] for any number, for a model of strings)"
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
    from sedd_graph.engine.process import SampleRequest, TextWithHoles
    from sedd_graph.runs.sample import read_prompt, sample_run

    run = open_run_folder(arguments)
    conditions = sample.read_conditions(run, arguments)
    holes = TextWithHoles(
        text=arguments.text, prefix=arguments.prefix, suffix=arguments.suffix, length=arguments.length
    )
    prompt = read_prompt(run, holes, observed=conditions.observed if conditions else "clamp")
    if not prompt.exact:
        say(f"warning: {prompt.how}", sys.stderr)
    request = SampleRequest(
        batch=arguments.batch,
        length=prompt.length,
        steps=arguments.steps,
        seed=arguments.seed,
        prompt=prompt.tokens,
        conditions=conditions,
    )
    where = sample_run(
        run,
        request,
        trajectory=arguments.trajectory,
        name="infilled.zarr",
        notes={"infilling": prompt.how},
        ignore_memory=arguments.ignore_memory,
        say=say,
    )
    return sample.show_stored(run, where)
