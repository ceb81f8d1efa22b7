"""Helper functions for corpora that read files: glob patterns, UTF-8, record fields and optional packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sedd_graph.data.sources import Document
from sedd_graph.errors import MissingExtraError, UserError, suggest
from sedd_graph.inputs.confine import matching
from sedd_graph.inputs.files import require_file

__all__ = ["BOM", "decode_utf8", "find_files", "import_extra", "missing_field", "read_document", "unreadable"]

BOM = b"\xef\xbb\xbf"
"""Byte-order mark of UTF-8, which corpora skip at the start of a file."""


def find_files(patterns: list[str], root: Path) -> list[Path]:
    """Return the files that match any of ``patterns``, without duplicates.

    The files are in the order of the patterns, and sorted for each pattern.

    Args:
        patterns: File names or glob patterns.
        root: The project's folder, to which the patterns are relative and within which the files lie.

    Raises:
        UserError: A pattern matches no file; a match is not a regular file, such as a pipe; a match is outside
            ``root``, unless :func:`~sedd_graph.inputs.confine.allow_outside` permits this; or the patterns search too
            many files.
    """
    found: dict[Path, None] = {}
    looked = [0]
    for pattern in patterns:
        paths = matching(pattern, root, what="data.corpus.files", looked=looked)
        paths = [path for path in paths if not path.is_dir()]
        if not paths:
            raise UserError(f"data.corpus.files: {pattern!r} matches no file under {root}")
        for path in paths:
            if path not in found:
                require_file(path, limit=2**63)
                found[path] = None
    return list(found)


def decode_utf8(raw: bytes, where: str, offset: int) -> str:
    """Decode UTF-8 bytes of a file.

    Args:
        raw: The bytes.
        where: Name of the file, for the message.
        offset: Offset of ``raw`` in the file, in bytes, for the message.

    Raises:
        UserError: The bytes are not UTF-8; the message gives the first invalid byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}") from None


def unreadable(path: Path, error: OSError) -> UserError:
    """Return (without raising) the exception for a file that cannot be opened or read.

    Args:
        path: The file.
        error: The exception of the operating system, whose reason is added to the message.
    """
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def missing_field(where: str, field: str, names: list[str]) -> UserError:
    """Return (without raising) the exception for a record without the text field.

    Args:
        where: File and line or row of the record.
        field: Name of the missing field.
        names: Names of the record's fields, of which the message suggests the nearest.
    """
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"{where}: no text field {field!r}{suggest(field, names)}; fields: {known or 'none'}")


def read_document(record: Any, where: str, field: str, prompt: str | None) -> Document:
    """Convert a record, such as a parsed line of JSON, to a document.

    Args:
        record: A mapping from field names to values.
        where: File and line or row of the record, for messages.
        field: Name of the field that contains the text.
        prompt: Name of the field that contains the prompt; None for documents without prompts.

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
    """Import and return a module of an optional package.

    Args:
        module: Dotted name of the module.
        purpose: The feature that needs the package, for the message.
        extra: Name of this project's extra that installs the package.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.split(".")[0], extra=extra, purpose=purpose) from None
