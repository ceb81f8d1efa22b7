"""Where text comes from: documents, in an order that never changes."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedd_graph.data.config import BuiltinCorpus, Corpus, DatasetCorpus, JsonlCorpus, ParquetCorpus, TextCorpus
from sedd_graph.errors import MissingExtraError, UserError, suggest

__all__ = ["Document", "read_corpus"]

MAX_BYTES = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and the prompt before it (attended to, neither corrupted nor counted)."""

    text: str
    prompt: str = ""


def _files(patterns: list[str], root: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        names = (
            sorted(glob.glob(str(root / pattern), recursive=True)) if glob.has_magic(pattern) else [str(root / pattern)]
        )
        paths = [Path(n) for n in names if Path(n).is_file()]
        if not paths:
            raise UserError(f"data.corpus.files: {pattern!r} names no file under {root}")
        found += paths
    total = sum(p.stat().st_size for p in found)
    if total > MAX_BYTES:
        raise UserError(
            f"data.corpus.files: {total / 2**30:.1f} GiB in all; this reader takes up to {MAX_BYTES >> 30} GiB"
        )
    return found


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None


def _record(record: Any, where: str, field: str, prompt: str | None) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    for name in (field, *([prompt] if prompt else [])):
        if not isinstance(record.get(name), str):
            known = ", ".join(map(str, record)) or "none"
            raise UserError(f"{where}: no text field {name!r}{suggest(name, map(str, record))}; fields: {known}")
    return Document(record[field], record[prompt] if prompt else "")


def _jsonl(config: JsonlCorpus, root: Path) -> Iterator[Document]:
    for path in _files(config.files, root):
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from None
                yield _record(record, f"{path}:{number}", config.field, config.prompt)


def _library(purpose: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise MissingExtraError("datasets", extra="datasets", purpose=purpose) from None


def _table(config: ParquetCorpus | DatasetCorpus, root: Path) -> Iterator[Document]:
    library = _library(f"the corpus {config.op!r}")
    if isinstance(config, ParquetCorpus):
        table = library.Dataset.from_parquet([str(p) for p in _files(config.files, root)], keep_in_memory=True)
    else:
        local = root / config.name
        source = str(local) if local.is_dir() else config.name
        try:
            table = library.load_dataset(source, config.subset, split=config.split)
        except Exception as error:  # network, hub and format errors of the library come in many classes
            raise UserError(f"data.corpus: the datasets library cannot load {config.name!r}: {error}") from None
    for number, record in enumerate(table):
        yield _record(record, f"row {number}", config.field, config.prompt)


def read_corpus(config: Corpus, *, root: Path) -> list[Document]:
    """All documents. Relative names start from ``root``. Raises :class:`UserError` naming file and line."""
    if isinstance(config, BuiltinCorpus):
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return [Document(topics[name].strip() + "\n\n") for name in sorted(topics)]
    if isinstance(config, TextCorpus):
        documents = [Document(_text(p)) for p in _files(config.files, root)]
    elif isinstance(config, JsonlCorpus):
        documents = list(_jsonl(config, root))
    else:
        documents = list(_table(config, root))
    if not any(d.text for d in documents):
        raise UserError("data.corpus: there is no text in it")
    return documents
