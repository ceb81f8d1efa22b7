"""``sedd-graph lm-eval``: run lm-evaluation-harness (extra ``lm-eval``) on a run folder."""

from __future__ import annotations

import argparse
import importlib.util

from sedd_graph.cli.options import Verbs, add_verb
from sedd_graph.errors import MissingExtraError, UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``lm-eval`` subcommand to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "lm-eval", run, "evaluate a run on tasks of lm-evaluation-harness (extra 'lm-eval')")
    parser.usage = "sedd-graph lm-eval --model_args run=RUN,draws=8 --tasks TASK [options of lm_eval]"
    parser.epilog = (
        "All arguments are those of the command lm_eval. Keys of --model_args: run, draws, seed, length, steps, sampler, "
        "greedy, weights, dtype, details."
    )
    parser.set_defaults(passes_on=True, rest=[])


def run(arguments: argparse.Namespace) -> int:
    """Run the ``lm-eval`` subcommand with the parsed ``arguments`` and return its exit code."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", extra="lm-eval", purpose="the evaluation harness")
    from sedd_graph.runs.harness_model import harness_main

    if not arguments.rest:
        raise UserError("lm-eval: give the arguments of lm_eval, such as --model_args run=RUN --tasks TASK")
    harness_main(arguments.rest)
    return 0
