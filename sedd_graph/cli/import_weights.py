"""``sedd-graph import``: convert released SEDD, MDLM or Diffusion-LM weights to a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_runs, add_verb
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``import`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "import", run, "turn released SEDD, MDLM or Diffusion-LM weights into a run folder")
    parser.add_argument("kind", choices=("sedd", "mdlm", "diffusion-lm"))
    parser.add_argument("weights", help="a safetensors file, a local hub folder, or a .pth file")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: a new run folder)")
    parser.add_argument("--kernel", choices=("absorb", "uniform"), help="the kernel, where the weights do not tell")
    parser.add_argument("--heads", type=int, help="attention heads of Diffusion-LM weights that are not 768 wide")
    add_runs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``import`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.data.tokenizer import FILE as TOKENIZER
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.import_weights import import_run

    folder = import_run(
        arguments.kind,
        Path(arguments.weights),
        out=Path(arguments.output) if arguments.output else None,
        runs=Path(arguments.runs),
        kernel=arguments.kernel,
        say=say,
        heads=arguments.heads,
    )
    write_report(folder)
    say(f"run folder  {folder}")
    if (folder / TOKENIZER).is_file():
        say(f"next        sedd-graph sample {folder}")
    else:
        say(
            f"next        copy the tokenizer of the weights, a {TOKENIZER} (released weights have GPT-2's), "
            f"into {folder}, then sedd-graph sample {folder}"
        )
    return 0
