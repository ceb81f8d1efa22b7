"""Where text comes from: documents, in an order that never changes. No tokens and no rows here."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedd_graph.data.config import BuiltinCorpus, Corpus, DatasetCorpus, JsonlCorpus, ParquetCorpus, TextCorpus
from sedd_graph.errors import MissingExtraError, UserError, suggest

__all__ = ["Document", "read_corpus"]

MAX_BYTES = 8 * 2**30
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and the prompt before it (attended to, neither corrupted nor counted)."""

    text: str
    prompt: str = ""


def _files(patterns: list[str], root: Path) -> list[Path]:
    """Files in the order of the patterns, sorted within one; a file that two patterns name is read once."""
    found: dict[Path, int] = {}
    for pattern in patterns:
        # a file may itself be called "a[1].txt"; os.path.isfile says no, rather than raise, to impossible names
        if os.path.isfile(root / pattern):
            names = [pattern]
        elif glob.has_magic(pattern):
            names = sorted(glob.glob(pattern, root_dir=root, recursive=True))
        else:
            names = []
        paths = [root / n for n in names if os.path.isfile(root / n)]
        if not paths:
            raise UserError(f"data.corpus.files: {pattern!r} names no file under {root}")
        for path in paths:
            found.setdefault(Path(os.path.realpath(path)), path.stat().st_size)
    total = sum(found.values())
    if total > MAX_BYTES:
        size, limit = f"{total / 2**30:.1f} GiB", f"{MAX_BYTES >> 30} GiB"
        raise UserError(f"data.corpus.files: {size} in all; this reader takes up to {limit}")
    return list(found)


def _decoded(raw: bytes, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}") from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def _text(path: Path) -> Document:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    skipped = len(BOM) if raw.startswith(BOM) else 0
    return Document(_decoded(raw[skipped:] if skipped else raw, str(path), skipped))


def _missing(where: str, field: str, names: list[str]) -> UserError:
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"{where}: no text field {field!r}{suggest(field, names)}; fields: {known or 'none'}")


def _record(record: Any, where: str, field: str, prompt: str | None) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    parts = []
    for name in (field, *([prompt] if prompt is not None else [])):
        if name not in record:
            raise _missing(where, name, [str(key) for key in record])
        value = record[name]
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} is {'null' if value is None else type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which is no character: no tokenizer and no file takes it
            half = f"U+{ord(value[error.start]):04X}, at character {error.start}"
            raise UserError(f"{where}: field {name!r} has a lone surrogate, {half}") from None
        parts.append(value)
    return Document(*parts)


def _jsonl(config: JsonlCorpus, root: Path) -> Iterator[Document]:
    for path in _files(config.files, root):
        try:
            with path.open("rb") as lines:
                offset = 0
                for number, line in enumerate(lines, 1):
                    where = f"{path}:{number}"
                    skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
                    text = _decoded(line[skipped:], where, offset + skipped)
                    offset += len(line)
                    if text.strip():
                        yield _record(_parsed(text.rstrip(), where), where, config.field, config.prompt)
        except OSError as error:
            raise _unreadable(path, error) from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise UserError(f"{where}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        # not str(error): its "line 1" is a line of this line
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(name.split(".")[0], extra="datasets", purpose=purpose) from None


def _parquet(config: ParquetCorpus, root: Path) -> Iterator[Document]:
    library = _library("pyarrow.parquet", "the corpus 'parquet'")
    wanted = list(dict.fromkeys([config.field, *([config.prompt] if config.prompt is not None else [])]))
    for path in _files(config.files, root):
        try:
            table = library.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from None
        with table:
            names = list(table.schema_arrow.names)
            for name in wanted:
                if name not in names:
                    raise _missing(str(path), name, names)
            number = 0
            try:
                # a few columns of a few rows at a time: other columns may be large
                for batch in table.iter_batches(batch_size=4096, columns=wanted):
                    for record in batch.to_pylist():
                        number += 1
                        yield _record(record, f"{path}: row {number}", config.field, config.prompt)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: damaged after row {number}: {error}") from None


def _dataset(config: DatasetCorpus, root: Path) -> Iterator[Document]:
    library = _library("datasets", "the corpus 'dataset'")
    local = root / config.name
    try:
        if (local / "state.json").is_file():  # the folder of one split, by the library's save_to_disk
            table = library.load_from_disk(str(local))
        elif (local / "dataset_dict.json").is_file():
            table = library.load_from_disk(str(local / config.split))
        else:
            source = str(local) if local.is_dir() else config.name
            table = library.load_dataset(source, config.subset, split=config.split)
    except Exception as error:  # network, hub and format errors of the library come in many classes
        raise UserError(f"data.corpus: the datasets library cannot load {config.name!r}: {error}") from None
    wanted = list(dict.fromkeys([config.field, *([config.prompt] if config.prompt is not None else [])]))
    for name in wanted:
        if name not in table.column_names:
            raise _missing(f"data.corpus: {config.name}", name, list(table.column_names))
    for number, record in enumerate(table.select_columns(wanted), 1):
        yield _record(record, f"{config.name}: row {number}", config.field, config.prompt)


def _documents(config: Corpus, root: Path) -> Iterator[Document]:
    if isinstance(config, BuiltinCorpus):
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (Document(topics[name].strip() + "\n\n") for name in sorted(topics))
    elif isinstance(config, TextCorpus):
        yield from (_text(path) for path in _files(config.files, root))
    elif isinstance(config, JsonlCorpus):
        yield from _jsonl(config, root)
    elif isinstance(config, ParquetCorpus):
        yield from _parquet(config, root)
    else:
        yield from _dataset(config, root)


def read_corpus(config: Corpus, *, root: Path) -> list[Document]:
    """All documents that have text, in order. Relative names start from ``root``.

    Raises :class:`UserError` naming file and line, row or byte, and :class:`MissingExtraError` where a reader's
    package is absent.
    """
    documents = []
    held = 0
    for document in _documents(config, root):
        # a document without text has nothing to learn from: as a row of its own it would be all padding
        if document.text:
            documents.append(document)
        held += len(document.text) + len(document.prompt)
        if held > MAX_BYTES:  # compressed files grow when read
            raise UserError(f"data.corpus: more than {MAX_BYTES >> 30} Gi characters; this reader takes no more")
    if not documents:
        raise UserError("data.corpus: there is no text in it")
    return documents
