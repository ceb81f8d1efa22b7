"""Untrusted YAML in, plain data with positions out: a small composer over PyYAML's events, bounded in every direction.

Only what a blueprint needs: mappings with string keys, lists, strings, numbers, true/false, null, and anchors within a
budget. Tags, merge keys, duplicate keys, several documents and odd spellings of numbers are refused with a place.
Iterative on purpose: deep nesting can exhaust no stack.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sedd_graph.errors import BlueprintError, Problem

__all__ = ["Document", "read_scalar", "read_yaml"]

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_SCALAR, MAX_KEY = 512 * 1024, 40, 50_000, 16 * 1024, 100
_LOADER = getattr(yaml, "CLoader", yaml.Loader)  # only its event parser is used; nothing is constructed by it

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_ODD_NUMBER = re.compile(
    r"[-+]?(0[0-9_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?|[0-9]+(:[0-5]?[0-9])+)"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)

Path_ = tuple[str | int, ...]


@dataclasses.dataclass
class Document:
    """One file: plain ``data`` and where each part of it stands (line and column from 1)."""

    file: str
    data: Any
    keys: dict[Path_, tuple[int, int]] = dataclasses.field(default_factory=dict)
    values: dict[Path_, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def position(self, path: Path_) -> tuple[int, int]:
        """Line and column of the key at ``path``, or of the nearest part that exists around it."""
        while path:
            found = self.keys.get(path) or self.values.get(path)
            if found:
                return found
            path = path[:-1]
        return self.values.get((), (1, 1))


class _Refused(Exception):
    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(message)
        self.place = (mark.line + 1, mark.column + 1) if mark else (1, 1)


def read_scalar(text: str) -> Any:
    """The value of a plain scalar in YAML 1.2's core schema (1e-3 is a number; yes, no, on and off are strings).

    Raises :class:`ValueError` for numbers spelled oddly, for NaN and infinities, and for numbers out of range.
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number (quote it if a string is meant)")
    if _INT.fullmatch(text):
        if len(text) > 18:
            raise ValueError(f"the integer {text[:12]}... is too large")
        return int(text)
    if len(text) <= 64 and _ODD_NUMBER.fullmatch(text):
        raise ValueError(f"write {text[:40]} as a plain decimal number (or quote it if a string is meant)")
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:40]} is too large")
        return value
    return text


def read_yaml(source: str | Path | bytes, *, name: str | None = None) -> Document:
    """Read one document. Raises :class:`BlueprintError` with the place of what is wrong."""
    file = name or (str(source) if not isinstance(source, bytes) else "<bytes>")

    def fail(message: str, place: tuple[int, int] = (1, 1)) -> BlueprintError:
        return BlueprintError([Problem(file, *place, "", message)])

    if isinstance(source, bytes):
        raw = source
    else:
        try:
            path = Path(source)
            if not path.is_file():
                raise fail("no such file" if not path.exists() else "not a file", (0, 0))
            with path.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise fail(f"cannot be read: {error}", (0, 0)) from error
    if len(raw) > MAX_BYTES:
        raise fail(f"larger than {MAX_BYTES // 1024} KiB", (0, 0))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise fail(f"not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}", (line, 1)) from error
    bad = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)
    if bad:
        at = bad.start()
        place = (text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
        raise fail(f"control character U+{ord(bad[0]):04X}", place)
    document = Document(file, None)
    try:
        document.data = _compose(text, document)
    except _Refused as error:
        raise fail(str(error), error.place) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(str(error.problem or error.context or "not YAML").split())
        if "\\t" in message or "'\t'" in str(error.problem):
            message = "a tab cannot start a token: indent with spaces"
        raise fail(f"not YAML: {message}", (mark.line + 1, mark.column + 1) if mark else (1, 1)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise fail(f"not YAML: {' '.join(str(error).split())[:200]}") from None
    return document


@dataclasses.dataclass
class _Open:
    value: dict[str, Any] | list[Any]
    path: Path_
    anchor: str | None
    key: str | None = None
    weight: int = 1


def _compose(text: str, document: Document) -> Any:
    stack: list[_Open] = []
    anchors: dict[str, tuple[Any, int]] = {}
    result: list[Any] = []
    nodes, documents = 0, 0

    def child_path() -> Path_:
        if not stack:
            return ()
        top = stack[-1]
        return (*top.path, len(top.value) if isinstance(top.value, list) else top.key or "")

    def add(value: Any, mark: Any, weight: int) -> None:
        if not stack:
            result.append(value)
            return
        top = stack[-1]
        top.weight += weight
        if isinstance(top.value, list):
            top.value.append(value)
        else:
            assert top.key is not None
            top.value[top.key] = value
            top.key = None

    # Any: the stubs know neither tags nor that every event has a place
    events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
    for event in events:
        mark = event.start_mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused("a second document ('---'): one file holds one blueprint", mark)
            continue
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Refused(f"tag {str(event.tag)[:60]!r}: tags are not allowed in a blueprint", mark)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise _Refused(f"alias *{event.anchor} points to nothing that is complete before it", mark)
            value, weight = anchors[event.anchor]
            if len(stack) + _depth(value) > MAX_DEPTH:
                raise _Refused(f"nested deeper than {MAX_DEPTH}", mark)
            nodes += weight
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            nodes += 1
        if nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} values, aliases counted out in full", mark)
        expects_key = bool(stack) and isinstance(stack[-1].value, dict) and stack[-1].key is None
        if expects_key and not isinstance(event, yaml.ScalarEvent | yaml.MappingEndEvent):
            raise _Refused("a key must be a plain string", mark)
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_SCALAR:
                raise _Refused(f"a string of more than {MAX_SCALAR} characters", mark)
            if _SURROGATE.search(event.value):  # libyaml refuses it by itself, PyYAML's own parser does not
                raise _Refused("half of a surrogate pair is not a character: write it as \\UXXXXXXXX", mark)
            if expects_key:
                top = stack[-1]
                key = event.value
                if event.anchor:
                    raise _Refused("a key cannot carry an anchor", mark)
                if key == "<<" and not event.style:
                    raise _Refused("merge keys ('<<') are not supported: use params or blocks", mark)
                if not key:
                    raise _Refused("an empty key", mark)
                if len(key) > MAX_KEY:
                    raise _Refused(f"a key of more than {MAX_KEY} characters", mark)
                path = (*top.path, key)
                if key in top.value:
                    first = document.keys[path][0]
                    raise _Refused(f"duplicate key {key[:60]!r}, first on line {first}", mark)
                document.keys[path] = (mark.line + 1, mark.column + 1)
                top.key = key
                continue
            value = event.value
            if not event.style:
                try:
                    value = read_scalar(event.value)
                except ValueError as error:
                    raise _Refused(str(error), mark) from None
            document.values[child_path()] = (mark.line + 1, mark.column + 1)
            if event.anchor:
                anchors[event.anchor] = (value, 1)
            add(value, mark, 1)
        elif isinstance(event, yaml.AliasEvent):
            document.values[child_path()] = (mark.line + 1, mark.column + 1)
            add(_copy(value), mark, weight)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(stack) >= MAX_DEPTH:
                raise _Refused(f"nested deeper than {MAX_DEPTH}", mark)
            path = child_path()
            document.values[path] = (mark.line + 1, mark.column + 1)
            container: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            stack.append(_Open(container, path, event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            if done.anchor:
                anchors[done.anchor] = (done.value, done.weight)
            add(done.value, mark, done.weight)
    if not result:
        raise _Refused("the file is empty", None)
    return result[0]


def _depth(value: Any) -> int:
    """How deep an anchored value is nested; what was read is never deeper than the reader allows."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def _copy(value: Any) -> Any:
    """A copy of an anchored value, so that one use of an alias cannot change another. Depth is bounded by the reader."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
