"""Functions for corpora that read files: file patterns, UTF-8, fields of records, optional libraries."""

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
    """Return the files that match ``patterns``, without repetitions, sorted within each pattern.

    Args:
        patterns: File names or glob patterns.
        root: Folder that relative ones start from.

    Raises:
        UserError: A pattern names no file, or the files have more than :data:`MAX_BYTES` bytes in all.
    """
    found: dict[Path, int] = {}
    for pattern in patterns:
        # the name of a file may be a pattern itself, "a[1].txt"; os.path.isfile is false where Path.is_file raises
        exact = os.path.isfile(root / pattern) or not glob.has_magic(pattern)
        names = [pattern] if exact else sorted(glob.glob(pattern, root_dir=root, recursive=True))
        paths = [root / n for n in names if os.path.isfile(root / n)]
        if not paths:
            raise UserError(f"data.corpus.files: {pattern!r} matches no file under {root}")
        for path in paths:
            found.setdefault(Path(os.path.realpath(path)), path.stat().st_size)
    total = sum(found.values())
    if total > MAX_BYTES:
        raise UserError(f"data.corpus.files: {total / 2**30:.1f} GiB in all; the limit is {MAX_BYTES >> 30} GiB")
    return list(found)


def decode_utf8(raw: bytes, where: str, offset: int) -> str:
    """Decode ``raw``, which begins at byte ``offset`` of the file ``where``.

    Raises:
        UserError: The bytes are not UTF-8; the message names the first invalid one.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}") from None


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the exception for a file that cannot be opened or read."""
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def missing_field(where: str, field: str, names: list[str]) -> UserError:
    """Return the exception for a record without ``field``; ``names`` are the fields that it has."""
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"{where}: no text field {field!r}{suggest(field, names)}; fields: {known or 'none'}")


def read_document(record: Any, where: str, field: str, prompt: str | None) -> Document:
    """Convert a record to a document.

    Args:
        record: A mapping of field names to values.
        where: File and line or row, for messages.
        field: Field of the text.
        prompt: Field of the prompt, or None.

    Raises:
        UserError: The record is not a mapping, or a field is missing or not text.
    """
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
            # JSON can encode half of a surrogate pair, which is not a character and has no UTF-8 form
            half = f"U+{ord(value[error.start]):04X}, at character {error.start}"
            raise UserError(f"{where}: field {name!r} has a lone surrogate, {half}") from None
        parts.append(value)
    return Document(*parts)


def import_extra(module: str, purpose: str, *, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Dotted name of the module.
        purpose: The feature that needs it, for the message.
        extra: Extra of this project that installs it.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.split(".")[0], extra=extra, purpose=purpose) from None
