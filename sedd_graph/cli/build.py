"""``sedd-graph build``: check a blueprint, verify it numerically, compile the network, and write a run folder.

Verified are the noise process (kernel, schedule, objective, sampler) and the inverses of invertible blocks.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from sedd_graph.cli.options import (
    Verbs,
    add_device,
    add_from,
    add_json,
    add_memory,
    add_outside,
    add_overrides,
    add_path_to,
    add_runs,
    add_verb,
    integer,
    picked_device,
    reporter,
    say_json,
    weights_from,
    write_path_to,
)
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``build`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "build", run, "check a blueprint, prove its process, compile, and write a run folder")
    parser.add_argument("blueprint", help="a blueprint, or the name of a shipped one such as first")
    add_overrides(parser)
    parser.add_argument(
        "--check", action="store_true", help="only check: print the typed graph and its parameter count, write nothing"
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "block", "whole", "cuda_graphs", "off"),
        help="overrides train.compile of the blueprint",
    )
    parser.add_argument(
        "--proof", choices=("quick", "full"), default="full", help="strength of the verification of the process"
    )
    parser.add_argument(
        "--processes",
        type=integer(1, 65_536),
        help="processes that will train: memory is estimated and measured for the rows of one of them (default: those of "
        "train.parallel, else 1)",
    )
    add_path_to(parser)
    add_json(parser, "the graph's facts (with --check), or the run folder with all checks,")
    add_from(parser)
    add_runs(parser)
    add_memory(parser)
    add_device(parser)
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``build`` subcommand with the parsed ``arguments`` and return its exit code."""
    if arguments.check:
        gc.disable()  # the process ends soon; walking over torch's objects would take a tenth of a second
        from sedd_graph.runs.check import check

        report = check(arguments.blueprint, arguments.overrides)
        if arguments.json:
            say_json(report.record())
        else:
            say(str(report))
        return 0
    from sedd_graph.blueprint.shipped import find_blueprint
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.build import build_run

    folder = build_run(
        find_blueprint(arguments.blueprint),
        arguments.overrides,
        runs=Path(arguments.runs),
        device=picked_device(arguments),
        compile=arguments.compile,
        proof=arguments.proof,
        ignore_memory=arguments.ignore_memory,
        weights=weights_from(arguments),
        table=arguments.map,
        processes=arguments.processes,
        say=reporter(arguments),
    )
    write_report(folder)
    write_path_to(arguments, folder)
    if arguments.json:
        from sedd_graph.store.files import json_object

        say_json({"run": str(folder), **json_object(folder / "certificate.json")})
    else:
        say(f"\nrun folder  {folder}\nnext        sedd-graph train {folder}")
    return 0
