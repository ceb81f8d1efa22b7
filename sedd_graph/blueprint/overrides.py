"""Overrides ``key=value`` from the command line, applied to the parsed YAML of a blueprint before validation.

An override of ``params.x`` or ``axes.x`` requires that the file declares ``x``. Under other keys, unknown names are
rejected by validation, as if they were written in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sedd_graph.blueprint.problems import dotted
from sedd_graph.blueprint.schema import Blueprint
from sedd_graph.blueprint.yaml import MAX_DEPTH, MAX_KEY, MAX_SCALAR, DataPath, Document, read_scalar, read_yaml
from sedd_graph.errors import BlueprintError, Problem, choices, listed

__all__ = ["apply_overrides"]

_TOP = sorted(Blueprint.model_fields.keys() - {"blueprint", "description"})


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Apply ``overrides`` to ``document.data`` in place, and record in ``document.overrides`` the paths that were set.

    Args:
        document: The parsed blueprint.
        overrides: Texts ``key=value``, where ``key`` is a dotted path such as ``train.steps``.

    Raises:
        BlueprintError: Holds a problem for every override that cannot be applied.
    """
    problems: list[Problem] = []
    for text in overrides:
        label = f"override {text!r}" if len(text) <= 200 else f"override {text[:200]!r}..."
        try:
            document.overrides[_apply(document.data, text, label)] = label
        except ValueError as error:
            problems.append(Problem(label, 0, 0, "", str(error)))
        except BlueprintError as error:
            problems += error.problems
    if problems:
        raise BlueprintError(problems)


def _apply(data: dict[str, Any], text: str, label: str) -> DataPath:
    """Set one value in ``data`` and return its path. Raises :class:`ValueError` where that cannot be done."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    top = parts[0]
    if not equals or not all(parts):
        raise ValueError("write key=value, such as train.steps=100")
    if len(parts) > MAX_DEPTH or max(map(len, parts)) > MAX_KEY or len(value) > MAX_SCALAR:
        raise ValueError(f"more than {MAX_DEPTH} keys, {MAX_KEY} characters a key, or {MAX_SCALAR} characters of value")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("is not UTF-8")
    if top not in _TOP:
        raise ValueError(f"unknown key {top!r}{choices(top, _TOP)}")
    if top in ("params", "axes"):
        known = data[top] if isinstance(data.get(top), dict) else {}
        if len(parts) == 1:
            raise ValueError(f"give one of the {top} at a time: {top}.NAME=VALUE; known: {listed(known)}")
        if len(parts) != 2 or parts[1] not in known:
            raise ValueError(f"unknown {top[:-1]} {'.'.join(parts[1:])!r}{choices(parts[-1], known)}")
    parsed = _value(value, label)
    target: Any = data
    path: DataPath = ()
    for part in parts[:-1]:
        step = _step(target, part, path)
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target, path = target[step], (*path, step)
    last = _step(target, parts[-1], path)
    target[last] = parsed
    return (*path, last)


def _step(target: Any, part: str, path: DataPath) -> str | int:
    """Return ``part`` as a key of a mapping, or as the index of an item of a list; ``path`` leads to ``target``."""
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise ValueError(f"{dotted(path)!r} holds no keys")
    if not part.isdecimal() or int(part) >= len(target):
        raise ValueError(f"{dotted(path)!r} has no item {part!r}")
    return int(part)


def _value(text: str, label: str) -> Any:
    """Read a scalar, or a list, a mapping or a quoted string in YAML's flow style, such as ``[a, b]``."""
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return read_yaml(text.encode(), name=label).data
    return read_scalar(text)
