"""Reader of untrusted YAML: returns plain data with the position of each value, within limits on size and depth.

A blueprint may contain mappings with string keys, lists, strings, numbers, true/false, null, and anchors. Tags, merge
keys, duplicate keys, multiple documents and ambiguous numbers (``010``, ``1_000``) raise an error with their position.
The data is composed from PyYAML's parser events iteratively, so that deeply nested input cannot overflow the stack.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.inputs.files import open_file

__all__ = ["DataPath", "Document", "Position", "read_scalar", "read_yaml"]

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_SCALAR, MAX_KEY = 512 * 1024, 40, 50_000, 16 * 1024, 100
MAX_NUMBER = 400
"""Largest number of characters of a number that is not an integer; float64 needs at most 24, or 330 without exponent."""
_LOADER = getattr(yaml, "CLoader", yaml.Loader)  # only its event parser is used; nothing is constructed by it

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")  # each digit can match in one place
_ODD_NUMBER = re.compile(
    r"[-+]?(0[0-9_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?|[0-9]+(:[0-5]?[0-9])+)"
)
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

DataPath = tuple[str | int, ...]
"""Path of a value within nested data: keys of mappings and indices of lists."""

Position = tuple[str, int, int]
"""File, line and column; both count from 1 and are 0 if unknown. For a value set by an override, the override's text
replaces the file name."""


@dataclasses.dataclass
class Document:
    """A parsed YAML file.

    Attributes:
        file: Name of the file in messages.
        data: Its content as plain data.
        lines: Line and column (from 1) of each key and list item, by path.
    """

    file: str
    data: Any = None
    lines: dict[DataPath, tuple[int, int]] = dataclasses.field(default_factory=dict)
    overrides: dict[DataPath, str] = dataclasses.field(default_factory=dict)
    """Text of the override that set a value, by the path of the value; used in messages."""

    def position(self, path: DataPath) -> Position:
        """Return the position of ``path``, or of its nearest ancestor that is written in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return self.overrides[path[:length]], 0, 0
        while path and path not in self.lines:
            path = path[:-1]
        return (self.file, *self.lines.get(path, (1, 1)))


class _Refused(Exception):
    """Exception for invalid input, with the line and column of the fault."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.at = (line, column)


def read_scalar(text: str) -> bool | int | float | str | None:
    """Return the value of an unquoted YAML scalar, following the core schema of YAML 1.2.

    For example, ``1e-3`` is a number, and ``yes``, ``no``, ``on`` and ``off`` are strings.

    Raises:
        ValueError: The number is NaN, infinite, out of range, or ambiguous, such as ``010`` or ``1_000``.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number (quote it if a string is meant)")
    if _INT.fullmatch(text):
        if len(text) > 18:
            raise ValueError(f"the integer {text[:12]}... is too large")
        return int(text)
    if len(text) <= 64 and _ODD_NUMBER.fullmatch(text):
        raise ValueError(f"write {text[:40]} as a plain decimal number (or quote it if a string is meant)")
    if _FLOAT.fullmatch(text):
        if len(text) > MAX_NUMBER:
            raise ValueError(
                f"the number {text[:12]}... has more than {MAX_NUMBER} characters (quote it if a string is meant)"
            )
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:40]} is too large")
        return value
    return text


def read_yaml(source: str | Path | bytes, *, name: str | None = None) -> Document:
    """Read one YAML document from a file or from bytes.

    Args:
        source: A path, or the content as bytes.
        name: Name of the file in messages; by default its path, or ``<bytes>`` for bytes.

    Raises:
        BlueprintError: The input cannot be read, is not valid YAML, or is outside the subset that blueprints may use.
    """
    file = name or (str(source) if not isinstance(source, bytes) else "<bytes>")
    try:
        text = _decode(source if isinstance(source, bytes) else _read_file(Path(source)))
        try:
            return _Composer(file).compose(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise _syntax_error(error, text) from error
    except _Refused as error:
        raise BlueprintError([Problem(file, *error.at, "", str(error))]) from error


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise _Refused("no such file" if not path.exists() else "not a file")
        with open_file(path, limit=2**63) as stream:  # a larger one is refused by what is read
            return stream.read(MAX_BYTES + 1) or b""
    except (OSError, ValueError, UserError) as error:
        raise _Refused(f"cannot be read: {error}") from error


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise _Refused(f"larger than {MAX_BYTES // 1024} KiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _Refused(f"not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}", line, 1) from error
    if bad := _CONTROL.search(text):
        at = bad.start()
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise _Refused(f"control character U+{ord(bad[0]):04X}", line, column)
    return text


def _syntax_error(error: yaml.YAMLError | RecursionError, text: str) -> _Refused:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    message = " ".join(str(getattr(error, "problem", None) or getattr(error, "context", None) or error).split())[:200]
    if mark is None:
        return _Refused(f"not YAML: {message}", 1, 1)
    if "cannot start any token" in message and text[mark.index : mark.index + 1] == "\t":
        message = "a tab cannot start a token: indent with spaces"
    return _Refused(f"not YAML: {message}", mark.line + 1, mark.column + 1)


@dataclasses.dataclass
class _Value:
    """A value under construction.

    ``count`` is its number of nested values, aliases expanded; ``key`` is the mapping key whose value is read next.
    """

    data: Any
    path: DataPath
    anchor: str | None = None
    count: int = 1
    depth: int = 0
    key: str | None = None

    @property
    def next_path(self) -> DataPath:
        return (*self.path, len(self.data) if isinstance(self.data, list) else self.key or "")


class _Composer:
    """Builds a :class:`Document` from parser events. A method that refuses an event raises :class:`ValueError`."""

    def __init__(self, file: str) -> None:
        self.document = Document(file)
        self.open: list[_Value] = []
        self.anchors: dict[str, _Value] = {}
        self.count = self.documents = 0

    def compose(self, text: str) -> Document:
        # Any: the stubs know neither tags nor that every event has a position
        events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        for event in events:
            at = (event.start_mark.line + 1, event.start_mark.column + 1)
            try:
                self.event(event, at)
            except ValueError as error:
                raise _Refused(str(error), *at) from None
        if not self.documents:
            raise _Refused("the file is empty", 1, 1)
        return self.document

    def event(self, event: Any, at: tuple[int, int]) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise ValueError("a second document ('---'): one file holds one blueprint")
        elif isinstance(event, yaml.CollectionEndEvent):
            self.add(self.open.pop())
        elif isinstance(event, yaml.NodeEvent):
            tag = getattr(event, "tag", None)
            if tag not in (None, "!"):
                raise ValueError(f"tag {str(tag)[:60]!r}: tags are not allowed in a blueprint")
            parent = self.open[-1] if self.open else None
            if parent is not None and isinstance(parent.data, dict) and parent.key is None:
                self.key(parent, event, at)
            else:
                path = parent.next_path if parent is not None else ()
                self.document.lines.setdefault(path, at)
                self.value(event, path)

    def key(self, parent: _Value, event: Any, at: tuple[int, int]) -> None:
        """Read the key of the next value of ``parent``, a mapping."""
        if not isinstance(event, yaml.ScalarEvent):
            raise ValueError("a key must be a plain string")
        key = self.text(event)
        if event.anchor:
            raise ValueError("a key cannot carry an anchor")
        if key == "<<" and not event.style:
            raise ValueError("merge keys ('<<') are not supported: use params or blocks")
        if not key:
            raise ValueError("an empty key")
        if len(key) > MAX_KEY:
            raise ValueError(f"a key of more than {MAX_KEY} characters")
        path = (*parent.path, key)
        if key in parent.data:
            raise ValueError(f"duplicate key {key[:60]!r}, first on line {self.document.lines[path][0]}")
        self.document.lines[path] = at
        parent.key = key

    def value(self, event: Any, path: DataPath) -> None:
        """Read a scalar or an alias, or open a collection."""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise ValueError(f"alias *{event.anchor} points to nothing that is complete before it")
            target = self.anchors[event.anchor]
            self.grow(target.count, target.depth)
            # a copy, so that a change at one use of the alias is none at another
            self.add(dataclasses.replace(target, data=copy.deepcopy(target.data), path=path, anchor=None))
        elif isinstance(event, yaml.ScalarEvent):
            text = self.text(event)
            self.add(_Value(text if event.style else read_scalar(text), path, event.anchor))
        else:
            self.grow(1, 1)
            empty: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            self.open.append(_Value(empty, path, event.anchor, depth=1))

    def text(self, event: Any) -> str:
        """Return the characters of a scalar."""
        self.grow(1, 0)
        text: str = event.value
        if len(text) > MAX_SCALAR:
            raise ValueError(f"a string of more than {MAX_SCALAR} characters")
        if _SURROGATE.search(text):  # libyaml refuses it by itself, PyYAML's own parser does not
            raise ValueError("half of a surrogate pair is not a character: write it as \\UXXXXXXXX")
        return text

    def grow(self, count: int, depth: int) -> None:
        """Count ``count`` more values, nested ``depth`` deep below the open collections."""
        self.count += count
        if self.count > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values, aliases counted out in full")
        if len(self.open) + depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")

    def add(self, value: _Value) -> None:
        """Put a complete value into the innermost open collection, or make it the document."""
        if value.anchor:
            self.anchors[value.anchor] = value
        if not self.open:
            self.document.data = value.data
            return
        parent = self.open[-1]
        parent.count += value.count
        parent.depth = max(parent.depth, value.depth + 1)
        if isinstance(parent.data, list):
            parent.data.append(value.data)
        else:
            parent.data[parent.key] = value.data
            parent.key = None
