"""Reading files of text, for corpora: file patterns, UTF-8, records of fields, optional libraries."""

from __future__ import annotations

import glob
import importlib
import os
from pathlib import Path
from typing import Any

from sedd_graph.data.sources import MAX_BYTES, Document
from sedd_graph.errors import MissingExtraError, UserError, suggest

__all__ = ["BOM", "decode_utf8", "find_files", "import_extra", "missing_field", "read_document", "unreadable"]

BOM = b"\xef\xbb\xbf"
"""Byte-order mark of UTF-8, skipped at the start of a file."""


def find_files(patterns: list[str], root: Path) -> list[Path]:
    """Return the files that ``patterns`` name under ``root``, sorted within each pattern, without repetitions.

    Raises:
        UserError: A pattern names no file, or the files have more than :data:`MAX_BYTES` bytes in all.
    """
    found: dict[Path, int] = {}
    for pattern in patterns:
        # a file may itself be called "a[1].txt"; os.path.isfile is false, rather than raises, for impossible names
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


def decode_utf8(raw: bytes, where: str, offset: int) -> str:
    """Decode bytes that stand at ``offset`` of a file. Raises :class:`UserError` that names the first invalid byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}") from None


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be opened or read."""
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def missing_field(where: str, field: str, names: list[str]) -> UserError:
    """Return the error for a record without ``field``; ``names`` are the fields that it has."""
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"{where}: no text field {field!r}{suggest(field, names)}; fields: {known or 'none'}")


def read_document(record: Any, where: str, field: str, prompt: str | None) -> Document:
    """Return the document of a record. Raises :class:`UserError` where a field is missing or is no text."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    parts = []
    for name in (field, *([prompt] if prompt is not None else [])):
        if name not in record:
            raise missing_field(where, name, [str(key) for key in record])
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


def import_extra(module: str, purpose: str, *, extra: str) -> Any:
    """Import a module of an optional package. Raises :class:`MissingExtraError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.split(".")[0], extra=extra, purpose=purpose) from None
