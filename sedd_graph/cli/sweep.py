"""``sedd-graph sweep``: build and train one run for every combination of values of a blueprint's keys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sedd_graph.cli.options import Verbs, add_device, add_verb, integer, picked_device, say_json
from sedd_graph.cli.terminal import say
from sedd_graph.errors import EnvironmentFault

if TYPE_CHECKING:
    from sedd_graph.runs.sweep import Sweep

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``sweep`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "sweep", run, "build and train one run for every combination of values of keys")
    parser.add_argument("blueprint", help="a blueprint, or the name of a shipped one such as first")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=a,b,c",
        help="values to combine, such as train.batch=16,32 params.depth=2,4; a key with one value is the same in all cases. "
        "Brackets and quotes keep commas together",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder of the sweep (default: sweeps/NAME-DIGEST); an interrupted one goes on",
    )
    parser.add_argument("--jobs", type=integer(1, 256), default=1, help="cases at a time (default: 1)")
    parser.add_argument("--slurm", action="store_true", help="print a Slurm job array of the cases instead")
    parser.add_argument("--case", type=integer(0, 4095), metavar="N", help="run case N alone, in this process")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``sweep`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.blueprint.shipped import find_blueprint
    from sedd_graph.cli.train import SIGNALS
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.sweep import open_sweep, python_command, run_case, run_sweep, slurm_script

    sweep = open_sweep(
        find_blueprint(arguments.blueprint),
        arguments.overrides,
        None if arguments.output is None else Path(arguments.output),
        only=arguments.case,
    )
    if arguments.case is not None:
        reason = run_case(sweep, arguments.case, device=picked_device(arguments), say=say)
        if (summary := sweep.summary(arguments.case)) is not None:
            write_report(summary.path)
        return SIGNALS.get(reason, 0)
    own = ["sweep", arguments.blueprint, *arguments.overrides, "-o", str(sweep.folder)]
    own += ["--device", arguments.device] if arguments.device else []
    if arguments.slurm:
        say(slurm_script(sweep, ["sedd-graph", *own]))
        return 0
    quiet = (lambda text: None) if arguments.json else say
    quiet(f"sweep       {sweep.folder}, {len(sweep.grid.cases())} cases")
    command = [*python_command(), *own, "--case"]
    failed = run_sweep(sweep, lambda number: [*command, str(number)], jobs=arguments.jobs, say=quiet)
    _print_table(sweep, as_json=arguments.json)
    if failed:
        raise EnvironmentFault(
            f"{len(failed)} of {len(sweep.grid.cases())} cases failed: {', '.join(map(str, failed))}; "
            f"see log.txt in {sweep.case_folder(failed[0])}. The same command tries them again"
        )
    return 0


def _print_table(sweep: Sweep, *, as_json: bool) -> None:
    """Print one row for each case, the best first, and write a page that compares the best ones."""
    from sedd_graph.report.compare import COMPARED, write_comparison

    cases, many = sweep.grid.cases(), len(sweep.grid.fixed)
    found = [(number, sweep.summary(number)) for number in range(len(cases))]
    known = sorted(
        ((n, s) for n, s in found if s is not None), key=lambda pair: (pair[1].bits is None, pair[1].bits or 0.0)
    )
    page = sweep.folder / "compare.html"
    best = [summary for _, summary in known][:COMPARED]
    if len(best) > 1:
        write_comparison(best, page)
    if as_json:
        rows = [{"case": n, "overrides": cases[n], **s.record()} for n, s in known]
        say_json({"folder": str(sweep.folder), "cases": rows})
        return
    for number, summary in known:
        bits = "not trained" if summary.bits is None else f"{summary.bits:.4f}"
        error = f" ± {summary.error:.4f}" if summary.error else ""
        say(f"{bits}{error}  case {number:<4} {' '.join(cases[number][many:])}  {summary.path}")
    if len(best) > 1:
        say(f"page        {page}")
