"""``sedd-graph import``: make a run folder from released weights, from an export, or from any weights by a table of names."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_runs, add_verb
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``import`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "import", run, "turn released weights, or an export, into a run folder")
    parser.add_argument(
        "kind",
        choices=("sedd", "mdlm", "duo", "diffusion-lm", "export", "map"),
        help="code that released the weights; 'export' for a folder of `sedd-graph export`; 'map' for any other weights, "
        "with --blueprint and --map",
    )
    parser.add_argument("weights", help="a safetensors file, a local hub folder, or a .pth file")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: a new run folder)")
    parser.add_argument("--kernel", choices=("absorb", "uniform"), help="the kernel, where the weights do not tell")
    parser.add_argument("--heads", type=int, help="attention heads of Diffusion-LM weights that are not 768 wide")
    parser.add_argument("--blueprint", metavar="FILE", help="with 'map': the blueprint that the weights are for")
    parser.add_argument(
        "--map", metavar="FILE", help="with 'map': a YAML file with the names of the weights by our names"
    )
    parser.add_argument(
        "--set", metavar="key=value", nargs="+", default=[], help="with 'map': changes to the blueprint"
    )
    add_runs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``import`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.data.tokenizer import FILE as TOKENIZER
    from sedd_graph.report.html import write_report
    from sedd_graph.runs.import_mapped import import_exported, import_mapped
    from sedd_graph.runs.import_weights import import_run

    path, runs = Path(arguments.weights), Path(arguments.runs)
    out = Path(arguments.output) if arguments.output else None
    if (arguments.kind == "map") != (arguments.map is not None and arguments.blueprint is not None):
        raise UserError("import: 'map' needs --blueprint and --map, and they need 'map'")
    if arguments.kind == "export":
        folder = import_exported(path, out=out, runs=runs, say=say)
    elif arguments.kind == "map":
        blueprint, table = Path(arguments.blueprint), Path(arguments.map)
        folder = import_mapped(path, blueprint, table, overrides=arguments.set, out=out, runs=runs, say=say)
    else:
        folder = import_run(
            arguments.kind, path, out=out, runs=runs, kernel=arguments.kernel, say=say, heads=arguments.heads
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
