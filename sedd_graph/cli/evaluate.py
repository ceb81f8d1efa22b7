"""``sedd-graph eval``: compute a likelihood bound on held-out text, or evaluate a run folder's samples."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from sedd_graph.cli.options import (
    Verbs,
    add_corpus,
    add_device,
    add_dtype,
    add_json,
    add_outside,
    add_sampler,
    add_verb,
    add_weights,
    integer,
    moved_corpus,
    picked_device,
    reporter,
    say_json,
)
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``eval`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "eval", run, "bound the likelihood of held-out text under a run folder's weights, or judge its samples"
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--batches", type=integer(1, 10**9), help="batches to evaluate (default: all)")
    parser.add_argument("--draws", type=integer(1, 4096), help="noise draws per sequence (default: 1)")
    parser.add_argument(
        "--likelihood",
        default="bound",
        metavar="NAME",
        help="'bound' (the default), or 'ode': an estimate of the likelihood of a process on vectors by its "
        "probability-flow ODE",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="evaluate on a published benchmark instead, as the authors of its table do: text8, lm1b, lm1b-packed, "
        "openwebtext, wikitext103, ptb and others; reads the files of --files",
    )
    parser.add_argument("--files", nargs="+", metavar="FILE", help="local files with the text of --protocol")
    parser.add_argument(
        "--samples",
        nargs="?",
        const="",
        metavar="ZARR",
        help="judge samples instead, the newest or those named: entropy and repetition, beside held-out text",
    )
    parser.add_argument(
        "--judge", metavar="FOLDER", help="a local causal language model (or .gguf file) for generative perplexity"
    )
    parser.add_argument(
        "--mauve", action="store_true", help="also compute MAUVE from the judge's hidden states (extra 'mauve')"
    )
    parser.add_argument(
        "--frontier",
        action="store_true",
        help="draw samples at several temperatures, and read their perplexity under --judge at the entropy of held-out text",
    )
    parser.add_argument(
        "--temperatures", nargs="+", type=float, metavar="T", help="of --frontier (default: 0.7 0.8 0.9 1 1.1)"
    )
    parser.add_argument(
        "--steps", nargs="+", type=integer(1, 1_000_000), metavar="N", help="of --frontier (default: sample.steps)"
    )
    parser.add_argument("--rows", type=integer(2, 1_000_000), help="samples per point of --frontier (default: 64)")
    add_sampler(parser)
    add_dtype(parser, "train.evaluate.dtype")
    parser.add_argument(
        "--compile",
        choices=("auto", "off", "block"),
        default="auto",
        help="block: compile each repeated block first; auto: on a GPU, for 100 evaluations of the network or more "
        "(default: auto)",
    )
    add_json(parser, "the result")
    add_weights(parser)
    add_corpus(parser)
    add_device(parser)
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``eval`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.report.html import write_report

    path = Path(arguments.run)
    found: Any  # a dataclass, or a list of them
    if arguments.frontier:
        found = _frontier(path, arguments)
    elif any((arguments.temperatures, arguments.steps, arguments.rows, arguments.sampler, arguments.set)):
        raise UserError("--temperatures, --steps, --rows, --sampler and --set are for --frontier")
    elif arguments.samples is not None or arguments.judge is not None or arguments.mauve:
        found = _judge_samples(path, arguments)
    elif arguments.protocol is not None:
        found = _evaluate_protocol(path, arguments)
    else:
        if arguments.files:
            raise UserError("--files holds the text of --protocol: name the protocol")
        from sedd_graph.runs.evaluate import evaluate_run

        found = evaluate_run(
            path,
            device=picked_device(arguments),
            batches=arguments.batches,
            draws=arguments.draws or 1,
            weights=arguments.weights,
            say=reporter(arguments),
            corpus=moved_corpus(arguments),
            likelihood=arguments.likelihood,
            dtype=arguments.dtype,
            compile=arguments.compile,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        write_report(path)
        if arguments.json:
            say_json([_record(one) for one in found] if isinstance(found, list) else _record(found))
    return 0


def _record(found: Any) -> dict[str, object]:
    """Return a result as JSON values, without those of single rows."""
    return {k: v for k, v in dataclasses.asdict(found).items() if k not in ("row_nats", "row_tokens")}


def _evaluate_protocol(path: Path, arguments: argparse.Namespace) -> Any:
    from sedd_graph.runs.protocol import run_protocol

    if arguments.likelihood != "bound" or arguments.corpus is not None:
        raise UserError("--likelihood and --corpus are for the run's own held-out text: without --protocol")
    return run_protocol(
        path,
        arguments.protocol,
        arguments.files or [],
        device=picked_device(arguments),
        batches=arguments.batches,
        draws=arguments.draws,
        weights=arguments.weights,
        dtype=arguments.dtype,
        compile=arguments.compile,
        say=reporter(arguments),
    )


def _frontier(path: Path, arguments: argparse.Namespace) -> Any:
    from sedd_graph.runs.frontier import TEMPERATURES, FrontierSettings, frontier_run
    from sedd_graph.runs.sample_section import sample_overrides

    if arguments.judge is None:
        raise UserError("--frontier is of perplexities under a judge: give --judge FOLDER")
    others = (
        arguments.samples,
        arguments.mauve,
        arguments.batches,
        arguments.draws,
        arguments.protocol,
        arguments.files,
    )
    if any(others) or (arguments.likelihood, arguments.compile) != ("bound", "auto"):
        raise UserError(
            "--samples, --mauve, --batches, --draws, --protocol, --files, --likelihood and --compile are for other "
            "evaluations: without --frontier"
        )
    settings = FrontierSettings(
        temperatures=tuple(arguments.temperatures or TEMPERATURES),
        steps=tuple(arguments.steps or ()),
        rows=arguments.rows or 64,
    )
    return frontier_run(
        path,
        judge=Path(arguments.judge),
        settings=settings,
        device=picked_device(arguments),
        weights=arguments.weights,
        say=reporter(arguments),
        corpus=moved_corpus(arguments),
        dtype=arguments.dtype,
        overrides=sample_overrides(path, arguments.sampler, arguments.set),
    )


def _judge_samples(path: Path, arguments: argparse.Namespace) -> Any:
    from sedd_graph.runs.judge import judge_run

    if arguments.protocol is not None or arguments.files:
        raise UserError("--protocol and --files are for the bound: without --samples, --judge and --mauve")
    given = (arguments.batches, arguments.draws, arguments.dtype)
    chosen = (arguments.weights, arguments.likelihood, arguments.compile)
    if any(given) or chosen != ("newest", "bound", "auto"):
        raise UserError(
            "--batches, --draws, --weights, --dtype, --compile and --likelihood are for the bound: without --samples, "
            "--judge and --mauve"
        )
    return judge_run(
        path,
        samples=Path(arguments.samples) if arguments.samples else None,
        judge=Path(arguments.judge) if arguments.judge else None,
        with_mauve=arguments.mauve,
        corpus=moved_corpus(arguments),
        device=picked_device(arguments),
        say=reporter(arguments),
    )
