"""``sedd-graph export``: write a run folder's newest weights, lock file and tokenizer to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_graph.cli.options import Verbs, add_device, add_verb, open_run_folder, say
from sedd_graph.errors import UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = add_verb(verbs, "export", run, "write a run folder's newest weights, lock file and tokenizer to a folder")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from sedd_graph.runs.check import LOCK

    out = Path(arguments.output)
    if (out / LOCK).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already; choose another folder")
    run = open_run_folder(arguments)
    run.engine.save(out)
    say(f"weights ({run.weights}), lock file and tokenizer written to {out}; sedd_graph.build({str(out)!r}) opens it")
    return 0
