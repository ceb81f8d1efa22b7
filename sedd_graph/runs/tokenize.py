"""Subcommand ``tokenize``: make shards of tokens from a corpus of text, in several processes; a killed one is resumed."""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from sedd_graph.component.progress import progress, track
from sedd_graph.data.config import DataConfig
from sedd_graph.data.encode import Batch, encoded
from sedd_graph.data.shard_index import INDEX, Index, TokenizerFacts, read_index
from sedd_graph.data.shards import Shards
from sedd_graph.data.sources import Corpus
from sedd_graph.data.tokenizer import FILE, Tokenizer, load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.runs.shard_writer import PROGRESS, Progress, ShardWriter
from sedd_graph.store.durable import make_folder, sync_folder
from sedd_graph.store.files import alone, disk_faults, sweep, write_json, write_text
from sedd_graph.store.manifest import read_typed

__all__ = ["SHARD_TOKENS", "TokenizeRequest", "tokenize_corpus", "verify_shards"]

SHARD_TOKENS = 2**27
"""Default number of tokens of a shard: 256 MiB of uint16."""
BATCH = 2**20
"""Number of characters, about, that a process tokenises at a time. A shard ends only between two batches."""


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """What :func:`tokenize_corpus` makes shards of, and how."""

    corpus: Corpus
    """The corpus."""
    root: Path
    """Folder to which file names of the corpus are relative."""
    config: DataConfig | None = None
    """``data`` section whose ``tokenizer`` is used; None for :attr:`tokenizer`."""
    config_root: Path | None = None
    """Folder to which file names of that section are relative; None for :attr:`root`."""
    tokenizer: Path | None = None
    """File of the tokenizer, or folder with one."""
    unit: Literal["document", "line"] = "document"
    """What is a document: a document of the corpus, or each of its lines that has text."""
    processes: int = 1
    """Number of processes that tokenise."""
    shard_tokens: int = SHARD_TOKENS
    """Number of tokens at which a shard is complete. Batches of text are not divided, so a shard may have some more."""

    def settings(self) -> dict[str, Any]:
        """Return what the shards depend on, as JSON values, the files' content apart."""
        section = None if self.config is None else self.config.model_dump(mode="json", include={"tokenizer"})
        corpus = DataConfig(corpus=self.corpus).model_dump(mode="json", include={"corpus"})["corpus"]
        path = None if self.tokenizer is None else str(self.tokenizer)
        return {
            "corpus": corpus,
            "tokenizer": path if section is None else section["tokenizer"],
            "unit": self.unit,
            "shard_tokens": self.shard_tokens,
        }


def tokenize_corpus(request: TokenizeRequest, folder: Path, *, say: Callable[[str], None]) -> Index:
    """Write a corpus to a folder as shards of tokens, or go on where an interrupted call has stopped.

    The shards do not depend on the number of processes, nor on interruptions.

    Args:
        request: The corpus, its tokenizer, and the sizes.
        folder: The folder; it must be new, empty, or one that was left unfinished.
        say: Function that prints a line for the user.

    Returns:
        The index of the shards.

    Raises:
        UserError: The folder holds something else or finished shards, the corpus cannot be read, or an unfinished folder
            is of another corpus or other settings.
        EnvironmentFault: The disk cannot be written, or a process ended.
    """
    _require_free(folder)
    with disk_faults("a folder", folder.parent):
        make_folder(folder)
    with alone(folder, "tokenising into"):
        _require_free(folder)
        sweep(folder, ".*.part")
        if (folder / INDEX).exists():  # a process was ended after its last shard
            (folder / PROGRESS).unlink()
            return read_index(folder / INDEX)
        done, tokenizer = _started(request, folder, say)
        index = _written(request, folder, done, tokenizer)
        (folder / PROGRESS).unlink()
        sync_folder(folder)
    say(
        f"{sum(s.tokens for s in index.shards):,} tokens of {sum(s.documents for s in index.shards):,} {index.unit}s in "
        f"{len(index.shards):,} shard(s): {folder}"
    )
    return index


def _require_free(folder: Path) -> None:
    """Raise :class:`UserError` if nothing may be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} exists and is not a folder")
    if (folder / INDEX).exists() and not (folder / PROGRESS).exists():
        raise UserError(f"{folder} holds finished shards already, which are never overwritten: choose another folder")
    if folder.is_dir() and not (folder / PROGRESS).exists():
        others = [path.name for path in folder.iterdir() if path.name not in (".lock", FILE) and path.suffix != ".part"]
        if others:
            raise UserError(f"{folder} exists and is not empty: {sorted(others)[0]!r} is in it; choose another folder")


def _started(request: TokenizeRequest, folder: Path, say: Callable[[str], None]) -> tuple[Progress, Tokenizer]:
    """Return what is done in the folder, and the tokenizer, which is made and written first."""
    settings = request.settings()
    if (folder / PROGRESS).exists():
        done = read_typed(folder / PROGRESS, Progress)
        if done.settings != settings:
            changed = [key for key in settings if done.settings.get(key) != settings[key]]
            raise UserError(
                f"{folder} was begun with another {' and '.join(changed) or 'setting'}: go on with the same command, or "
                "choose another folder"
            )
        if done.shards:
            say(f"resumed     after {len(done.shards):,} shard(s), {sum(s.tokens for s in done.shards):,} tokens")
        return done, load_tokenizer(folder)
    if request.config is None:
        if request.tokenizer is None:
            raise UserError("no tokenizer is named")
        made = load_tokenizer(request.tokenizer)
    else:
        factory = request.config.tokenizer
        joined = "\n" if request.corpus.records and not factory.separates else ""
        texts = (text + joined if last else text for text, last in _pieces(request)) if factory.trained else iter(())
        made = factory.make(_in_context(texts), root=request.config_root or request.root)
    write_text(folder / FILE, made.to_json())
    done = Progress(settings=settings)
    write_json(folder / PROGRESS, done.model_dump(mode="json"))
    return done, load_tokenizer(folder)


def _written(request: TokenizeRequest, folder: Path, done: Progress, tokenizer: Tokenizer) -> Index:
    """Write the shards that are missing, then the index."""
    records = request.corpus.records or request.unit == "line"
    text = "" if tokenizer.end is not None or not records else "\n"
    separator = [tokenizer.end] if tokenizer.end is not None else tokenizer.encode(text).tolist() if text else []
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.size <= 2**16 else "uint32"
    writer = ShardWriter(folder, done, dtype=dtype, size=request.shard_tokens)
    pieces, hashed, number = _pieces(request), hashlib.sha256(), done.pieces
    total = sum(path.stat().st_size for path in request.corpus.files(request.root)) or None
    with progress("tokenising", total=total, unit="byte") as advance:
        for piece in itertools.islice(pieces, done.pieces):
            advance(_hash(hashed, [piece]))
        if done.pieces and hashed.hexdigest() != done.text_sha256:
            raise UserError(
                f"{folder}: the text has changed since it was begun; put the old one back, or choose another folder"
            )
        made = encoded(
            pieces,
            tokenizer,
            path=str(folder / FILE),
            separator=separator,
            size=min(BATCH, request.shard_tokens),
            processes=request.processes,
        )
        for batch, found in made:
            writer.add(found)
            number += len(batch)
            advance(_hash(hashed, batch))
            if writer.complete:
                writer.close(number, hashed.hexdigest())
    if not writer.empty:
        writer.close(number, hashed.hexdigest())
    if not writer.progress.shards:
        raise UserError("the corpus has no text")
    section = None if request.config is None else request.settings()["tokenizer"]
    index = Index(
        dtype=dtype,
        tokenizer=TokenizerFacts(
            sha256=hashlib.sha256((folder / FILE).read_bytes()).hexdigest(), size=tokenizer.size, section=section
        ),
        separator=separator,
        separator_text="\n" if text else "",
        unit=request.unit,
        text_sha256=hashed.hexdigest(),
        shards=writer.progress.shards,
    )
    write_json(folder / INDEX, index.model_dump(mode="json"))
    return index


def _in_context(items: Iterator[str]) -> Iterator[str]:
    """Return an iterator over ``items`` that makes each with the context variables of the caller.

    Libraries take texts from another thread, where ``--allow-outside`` and the progress display would be unknown.
    """
    context = contextvars.copy_context()  # now, not when the first item is taken
    return iter(lambda: context.run(next, items, None), None)


def _hash(hashed: Any, batch: Batch) -> int:
    """Add pieces of text to a hash, and return their number of bytes."""
    mark = b"\xff"  # a byte that UTF-8 never has
    raw = b"".join(text.encode("utf-8", "surrogatepass") + (mark if last else b"") for text, last in batch)
    hashed.update(raw)
    return len(raw)


def _pieces(request: TokenizeRequest) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether it is the last of its document."""
    if request.corpus.prompted:
        raise UserError("shards hold no prompts: tokenise a corpus without 'prompt'")
    pieces = request.corpus.text(request.root)
    return pieces if request.unit == "document" else _lines(pieces)


def _lines(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield each line that has text, without white space around it."""
    waiting = ""
    for text, last in pieces:
        lines = (waiting + text).splitlines(keepends=True)
        # a carriage return at the end may be half of a line break
        waiting = "" if last or not lines else lines.pop()
        yield from ((line.strip(), True) for line in lines if line.strip())


def verify_shards(folder: Path, *, say: Callable[[str], None]) -> None:
    """Read all shards of a folder and compare them with the hashes in its index.

    Raises:
        UserError: A file is missing or is not what was written.
    """
    shards = Shards([(folder, read_index(folder / INDEX))])
    shards.tokenizer()
    for place in track(range(len(shards.parts)), "verifying", unit="shard"):
        shards.verify(place)
    say(f"{folder}: {len(shards.parts):,} shard(s) of {shards.tokens:,} tokens are what was written")
