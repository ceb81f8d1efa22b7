"""``sedd-graph export``: write a run folder's newest weights to a folder, in our format or in that of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_device, add_outside, add_verb, picked_device
from sedd_graph.cli.terminal import say

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``export`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "export", run, "write a run folder's newest weights and tokenizer to a folder")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    parser.add_argument(
        "--format",
        choices=("sedd_graph", "transformers"),
        default="sedd_graph",
        help="sedd_graph: weights, lock file and tokenizer; transformers: a folder with Python code, which the transformers "
        "library opens where sedd_graph is not installed (default: sedd_graph)",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload the folder to a repository owner/name of a model hub, too (extra 'hub')"
    )
    parser.add_argument("--public", action="store_true", help="create the repository of --push as a public one")
    add_device(parser)
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``export`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.export import export_run
    from sedd_graph.runs.hub import push, require_repo

    out = Path(arguments.output)
    if arguments.push is not None:
        require_repo(arguments.push)
    done = export_run(Path(arguments.run), out, device=picked_device(arguments), format=arguments.format)
    if arguments.format == "sedd_graph":
        what = "lock file and tokenizer"
        say(f"weights ({done.weights}), {what} written to {out}; sedd_graph.build({str(out)!r}) opens it")
    else:
        for reason in done.left_out.values():
            say(f"left out    {reason}")
        same = "not compared with the run: the transformers library is not installed (extra 'hub')"
        if done.difference is not None:
            same = f"logits of the exported code and of the run differ by at most {done.difference:.1e}"
        say(f"weights     {done.weights}; {same}")
        say(f"next        AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)")
    if arguments.push is not None:
        say(f"pushed      {push(out, arguments.push, private=not arguments.public)}")
    return 0
