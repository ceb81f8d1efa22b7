"""``key=value`` from the command line, laid over the file before it is validated.

``params.x`` must exist already; anywhere else the schema refuses a key that it does not know, as it does in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sedd_graph.blueprint.yaml import MAX_DEPTH, MAX_KEY, MAX_SCALAR, read_scalar, read_yaml
from sedd_graph.errors import BlueprintError, Problem, listed, suggest

__all__ = ["apply_overrides"]

_TOP = ("params", "axes", "nodes", "blocks", "process", "objective", "sample", "data", "train", "store", "name", "use", "inputs", "outputs")  # fmt: skip


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[tuple[str | int, ...], str]:
    """Change ``data`` in place; returns, for every path that was set, the override that set it (for messages).

    Raises :class:`BlueprintError` with every override that cannot be applied.
    """
    problems: list[Problem] = []
    origins: dict[tuple[str | int, ...], str] = {}
    for text in overrides:
        place = f"override {text!r}" if len(text) <= 200 else f"override {text[:200]!r}..."

        def refuse(message: str, place: str = place) -> None:
            problems.append(Problem(place, 0, 0, "", message))

        key, equals, value_text = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            refuse("write key=value, such as train.steps=100")
            continue
        if len(parts) > MAX_DEPTH or max(map(len, parts)) > MAX_KEY or len(value_text) > MAX_SCALAR:
            refuse(f"more than {MAX_DEPTH} keys, {MAX_KEY} characters a key, or {MAX_SCALAR} characters of value")
            continue
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            refuse("is not UTF-8")
            continue
        if parts[0] not in _TOP:
            refuse(f"unknown key {parts[0]!r}{suggest(parts[0], _TOP)}; known: {', '.join(sorted(_TOP))}")
            continue
        if parts[0] in ("params", "axes"):
            held = data.get(parts[0])
            known = list(held) if isinstance(held, dict) else []
            if len(parts) != 2 or parts[1] not in known:
                refuse(
                    f"unknown {parts[0][:-1]} {'.'.join(parts[1:])!r}{suggest(parts[-1], known)}; known: {listed(known)}"
                )
                continue
        try:
            value = _value(value_text, place)
        except BlueprintError as error:
            problems += error.problems
            continue
        target: Any = data
        path: list[str | int] = []
        for part in parts[:-1]:
            step: str | int = int(part) if isinstance(target, list) and part.isdecimal() else part
            path.append(step)
            if isinstance(target, dict) and isinstance(step, str):
                if target.get(step) is None:
                    target[step] = {}
                target = target[step]
            elif isinstance(target, list) and isinstance(step, int) and step < len(target):
                target = target[step]
            else:
                target = None
            if not isinstance(target, dict | list):
                refuse(f"{'.'.join(map(str, path))!r} holds no keys")
                break
        else:
            last: str | int = int(parts[-1]) if isinstance(target, list) and parts[-1].isdecimal() else parts[-1]
            if isinstance(target, list) and not (isinstance(last, int) and last < len(target)):
                refuse(f"{'.'.join(map(str, path))!r} has no item {last!r}")
                continue
            target[last] = value
            origins[(*path, last)] = place
    if problems:
        raise BlueprintError(problems)
    return origins


def _value(text: str, place: str) -> Any:
    """A scalar, or a list or mapping in flow style such as ``[a, b]``."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return read_yaml(text.encode(), name=place).data
    try:
        return read_scalar(text)
    except ValueError as error:
        raise BlueprintError([Problem(place, 0, 0, "", str(error))]) from None
