"""``sedd-graph serve``: answer completion requests over HTTP, in OpenAI's format, and show a page to try the model on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sedd_graph.cli.options import (
    LARGEST,
    Verbs,
    add_device,
    add_dtype,
    add_memory,
    add_outside,
    add_sampler,
    add_temperature,
    add_verb,
    add_weights,
    integer,
    open_run_folder,
)
from sedd_graph.cli.terminal import say
from sedd_graph.errors import MissingExtraError, UserError

__all__ = ["declare", "run"]


def declare(verbs: Verbs) -> None:
    """Add the ``serve`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(verbs, "serve", run, "answer completion requests over HTTP (OpenAI's format), with a page to try")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=integer(0, 65_535), default=8000, help="port; 0: a free one (default: 8000)")
    parser.add_argument("--name", help="name of the model for clients (default: the blueprint's)")
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer requests to this name, too, such as that of a proxy on this machine (may be repeated)",
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="file of keys, one a line, of which clients send one")
    parser.add_argument(
        "--length", type=integer(1, LARGEST), help="most tokens of a row, prompt included (default: data.length)"
    )
    parser.add_argument(
        "--batch", type=integer(1, 65_536), default=16, help="most rows that are sampled together (default: 16)"
    )
    parser.add_argument("--queue", type=integer(1, 2**20), default=512, help="most requests that wait (default: 512)")
    parser.add_argument(
        "--max-steps", type=integer(1, 1_000_000), default=4096, help="most sampler steps (default: 4096)"
    )
    parser.add_argument(
        "--max-choices", type=integer(1, 65_536), default=128, help="most rows of a request (default: 128)"
    )
    parser.add_argument(
        "--max-body", type=integer(64, 2**30), default=2**20, help="most bytes of a request (default: 1 MiB)"
    )
    parser.add_argument(
        "--timeout", type=integer(1, 86_400), default=600, help="seconds that a request may take (default: 600)"
    )
    parser.add_argument(
        "--grace",
        type=integer(0, 86_400),
        default=30,
        help="seconds for accepted requests after a signal (default: 30)",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="text in blocks without the KV cache, to compare: the answers are the same",
    )
    parser.add_argument(
        "--compile",
        choices=("off", "block"),
        default="off",
        help="block: compile each repeated block (default: off)",
    )
    add_dtype(parser, "auto")
    add_sampler(parser)
    add_temperature(parser)
    add_weights(parser)
    add_memory(parser)
    add_outside(parser)
    add_device(parser)
    parser.set_defaults(classifier=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``serve`` subcommand with the parsed ``arguments`` and return its exit code."""
    try:
        from sedd_graph.runs.serve.server import Address, is_loopback, listen, read_keys, serve
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("starlette", "uvicorn", "h11"):
            raise
        raise MissingExtraError(package, extra="serve", purpose="serve") from None
    from sedd_graph.report.serve import serve_page
    from sedd_graph.runs.serve.model import ServedModel
    from sedd_graph.runs.serve.wire import Limits

    keys = [] if arguments.api_key_file is None else read_keys(Path(arguments.api_key_file))
    if arguments.name is not None and not arguments.name.strip():
        raise UserError("--name is empty: give the model a name, or leave --name out")
    opened = open_run_folder(arguments)
    limits = Limits(
        length=arguments.length or opened.report.data.length,
        steps=arguments.max_steps,
        choices=arguments.max_choices,
        batch=arguments.batch,
        queue=arguments.queue,
        body=arguments.max_body,
        timeout=arguments.timeout,
    )
    name = arguments.name or opened.engine.network.graph.name
    model = ServedModel(opened, name=name, limits=limits, kv_cache=not arguments.no_cache)
    model.require_memory(ignore=arguments.ignore_memory, say=say)
    with listen(Address(arguments.host, arguments.port)) as sock:
        if not is_loopback(arguments.host):
            guarded = "with a key" if keys else "without a key (--api-key-file asks for one)"
            say(f"warning: {arguments.host} can be reached from other machines, {guarded}, and without TLS", sys.stderr)
        say(f"model       {name}, weights {opened.weights}, on {opened.engine.device}")
        page = serve_page(name)
        serve(model, sock, page=page, keys=keys, grace=arguments.grace, say=say, hosts=arguments.allow_host)
    return 0
