"""Subcommand ``eval --protocol``: the bound on a published benchmark's text, computed as the table's authors do."""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sedd_graph.data.config import DataConfig
from sedd_graph.data.sources import Corpus
from sedd_graph.errors import UserError
from sedd_graph.evaluation.bound import Result
from sedd_graph.evaluation.protocols import TableProtocol, find_protocol, protocol_rows, require_tokenizer
from sedd_graph.inputs.confine import allow_outside
from sedd_graph.runs.evaluate import Compile, Table, compile_evaluation, evaluate_opened
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.precision import choose_dtype
from sedd_graph.training.distributed import World

__all__ = ["evaluate_protocol", "run_protocol"]

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def run_protocol(
    path: Path,
    name: str,
    files: Sequence[str],
    *,
    device: torch.device,
    batches: int | None,
    draws: int | None,
    weights: str,
    say: Callable[[str], None],
    dtype: str | None = None,
    compile: Compile = "auto",
) -> Result:
    """Open a run folder and evaluate it by a protocol, as :func:`evaluate_protocol` does.

    Args:
        path: The run folder.
        name: Name of the protocol.
        files: Files of the benchmark's text, as the user names them.
        device: Device of the network.
        batches: Number of batches of rows, selected at even distances; None evaluates all.
        draws: Number of noise draws per row; None for 1.
        weights: Weights to evaluate, as in :func:`sedd_graph.runs.open.open_run`.
        say: Function that prints a line for the user.
        dtype: Precision of the network (:func:`sedd_graph.runs.precision.choose_dtype`).
        compile: Whether the blocks of the network are compiled (:func:`sedd_graph.runs.evaluate.compile_evaluation`).

    Raises:
        UserError: There is no such protocol, the files are not those of the benchmark, or the run does not fit it.
    """
    protocol = find_protocol(name)
    if not files:
        raise UserError(f"--protocol {name} reads {protocol.part}: name its file with --files")
    with contextlib.ExitStack() as stack:
        world = World.from_environment(device)
        stack.callback(world.close)
        say = say if world.rank == 0 else (lambda text: None)
        run = open_run(path, device=device, compile="off", weights=weights)
        choose_dtype(run, dtype)
        say(f"weights     {run.weights}")
        return evaluate_protocol(run, protocol, files, say, batches=batches, draws=draws, compile=compile, world=world)


def evaluate_protocol(
    run: Run,
    protocol: TableProtocol,
    files: Sequence[str],
    say: Callable[[str], None],
    *,
    corpus: Corpus | None = None,
    batches: int | None = None,
    draws: int | None = None,
    compile: Compile = "off",
    world: World | None = None,
) -> Result:
    """Compute the bound of a run on a benchmark's text, and write ``evaluation-<protocol>.json``.

    Args:
        run: The opened run folder.
        protocol: The protocol.
        files: Files of the text: ``.jsonl`` or ``.parquet`` with the field that the protocol names, also compressed, or
            text with a document on each line. For text8 the file itself.
        say: Function that prints a line for the user.
        corpus: For a protocol without a number of documents, the corpus that checks its file; None for ``text8``.
        batches: Number of batches of rows, selected at even distances; None evaluates all.
        draws: Number of noise draws per row; None for 1.
        compile: Whether the blocks of the network are compiled.
        world: The processes that share the evaluation.

    Returns:
        The bound.

    Raises:
        UserError: The files are not those of the benchmark, or the run's tokenizer or row length is not the protocol's.
    """
    config, tokenizer = run.report.data, run.text_tokenizer()
    if not isinstance(config, DataConfig):
        raise UserError(f"{run.path} is a run of points, not of text")
    if config.length != protocol.length:
        raise UserError(
            f"protocol {protocol.name!r} has rows of {protocol.length:,} tokens; this run was built for {config.length:,}"
        )
    require_tokenizer(protocol, tokenizer)
    with allow_outside():  # the user names the files
        texts = list(_texts(protocol, files, corpus))
    data, sizes = protocol_rows(protocol, texts, tokenizer, config)
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(text.encode("utf-8", "surrogatepass") + b"\xff")
    facts: dict[str, Any] = {
        **protocol.facts(),
        **sizes,
        "files": [Path(name).name for name in files],
        "text_sha256": hashed.hexdigest(),
    }
    say(f"protocol    {protocol.name}: {protocol.part}; {protocol.source}")
    say(f"rows        {sizes['rows']:,} of {protocol.length:,} tokens: {facts['row']}")
    table = Table(protocol.name, facts)
    compile_evaluation(run, compile, data, batches=batches, draws=draws)
    found = evaluate_opened(run, data, say, batches=batches, draws=draws or 1, table=table, world=world)
    unit = "bits per character" if protocol.unit == "bits_per_character" else "perplexity"
    value = getattr(found, protocol.unit)
    say(f"table       {protocol.name}: {unit} at most {value:.3f}")
    return found


def _texts(protocol: TableProtocol, files: Sequence[str], corpus: Corpus | None) -> Iterator[str]:
    """Yield the documents of the benchmark. Raises :class:`UserError` if there are others than it has."""
    if protocol.documents is None:
        if len(files) != 1:
            raise UserError(f"protocol {protocol.name!r} reads one file, not {len(files)}")
        keys = {"op": "text8", "file": files[0], "part": "test"}
        found = corpus or DataConfig.model_validate({"corpus": keys}).corpus
        yield from (document.text for document in found.documents(Path.cwd()))
        return
    kept = collections.deque[str](maxlen=protocol.documents + 1 if protocol.of is None else protocol.documents)
    count = 0
    for text in _documents(protocol, files):
        kept.append(text)
        count += 1
        if count > (protocol.of or protocol.documents):
            break
    if count not in (protocol.documents, protocol.of):
        whole = f", or {protocol.of:,} in all" if protocol.of else ""
        more = "more" if count > (protocol.of or protocol.documents) else f"{count:,}"
        raise UserError(
            f"protocol {protocol.name!r} is of {protocol.part}, which has {protocol.documents:,} documents{whole}; the files "
            f"hold {more}"
        )
    yield from kept


def _documents(protocol: TableProtocol, files: Sequence[str]) -> Iterator[str]:
    for name in files:
        suffix = Path(Path(name).stem).suffix if Path(name).suffix in (".gz", ".zst") else Path(name).suffix
        kind = _KINDS.get(suffix)
        keys = {"op": kind or "text", "files": [name]} | ({} if kind is None else {"field": protocol.field})
        corpus = DataConfig.model_validate({"corpus": keys}).corpus
        for document in corpus.documents(Path.cwd()):
            if kind is not None:
                yield document.text
                continue
            for line in document.text.split("\n")[: None if not document.text.endswith("\n") else -1]:
                # as the loading scripts of the data sets do; a line without text is a document without any
                yield (line + "\n" if line.strip() else "") if protocol.keep_breaks else line.strip()
