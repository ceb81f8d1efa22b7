"""Pydantic's findings in the user's words, each at the place of the key or value it is about."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any

import pydantic

from sedd_graph.component.choice import Choice
from sedd_graph.component.strict import branches
from sedd_graph.errors import MAX_PROBLEMS, Problem, suggest

__all__ = ["Locate", "dotted", "model_problems"]

Locate = Callable[[tuple[str | int, ...]], tuple[str, int, int]]
"""From a path within the data to file, line and column."""

_PATTERNS = {
    r"^[a-z][a-z0-9_]*$": "use lower-case letters, digits and _, starting with a letter",
    r"^[a-z0-9][a-z0-9._-]*$": "use lower-case letters, digits, '-', '_' and '.'",
    r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$": "a reference is 'node' or 'node.port'",
    r"^[a-z][a-z0-9_]*(\.v[1-9][0-9]{0,3})?$": "an op is a registered name, such as 'attention' or 'attention.v1'",
}


def dotted(path: Iterable[str | int]) -> str:
    """``nodes.head.in[0]``"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(error: Any, fields: Iterable[str]) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        known = sorted(fields)
        return f"unknown key{suggest(str(error['loc'][-1]), known)}" + (f"; known: {', '.join(known)}" if known else "")
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{_shown(value)}: {_PATTERNS.get(context['pattern'], 'does not match ' + context['pattern'])}"
    if kind == "literal_error":
        options = [o.strip(" '") for o in context["expected"].replace(" or ", ", ").split(",")]
        return f"{_shown(value)}: must be {context['expected']}{suggest(str(value), options)}"
    if kind == "union_tag_invalid":
        options = [o.strip(" '") for o in context["expected_tags"].split(",")]
        return f"unknown {context['discriminator'].strip(chr(39))} {context['tag']!r}{suggest(str(context['tag']), options)}; known: {', '.join(options)}"
    if kind == "union_tag_not_found":
        return f"needs the key {context['discriminator'].strip(chr(39))!r}"
    if kind == "finite_number":
        return f"{_shown(value)}: must be a finite number"
    wanted = {
        "int_type": "an integer",
        "int_parsing": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "float_parsing": "a number",
        "string_type": "a string",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "tuple_type": "a list",
        "none_required": "nothing",
    }.get(kind)
    if wanted:
        return f"must be {wanted}, not {_shown(value)}"
    bound = {
        "greater_than": ("gt", "greater than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }.get(kind)
    if bound:
        return f"must be {bound[1]} {context[bound[0]]:g}, not {_shown(value)}"
    text: str = error["msg"]
    return text[0].lower() + text[1:]


def _fields_at(model: Any, loc: tuple[str | int, ...], data: Any) -> list[str]:
    """Return the keys that the model at ``loc`` of ``data`` knows; none where that is not one model."""
    options, op = [model], []
    for part in loc:
        inside = [inner for option in options for inner in _inside(option, part)]
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            data = data[part]
        choices = [c for inner in inside for c in getattr(inner, "__metadata__", ()) if isinstance(c, Choice)]
        op = ["op"] if choices else []
        options = [c.config_of(data) for c in choices] or [o for o in inside if _tag(o) == part] or inside
    models = [m for option in options for m in branches(option) if _is_model(m)]
    return [f.alias or n for n, f in models[0].model_fields.items()] + op if len(models) == 1 else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """What may stand at ``part`` within a value of this type; a union's own tag steps into that branch."""
    found: list[Any] = []
    for branch in branches(annotation):
        if _is_model(branch):
            if _tag(branch) == part:
                return [branch]
            fields = [f for n, f in branch.model_fields.items() if part in (n, f.alias)]
            found += [typing.Annotated[f.annotation, *f.metadata] if f.metadata else f.annotation for f in fields]
        elif typing.get_origin(branch) is dict:
            found.append(typing.get_args(branch)[1])
        elif typing.get_origin(branch) in (list, tuple):
            found.append(typing.get_args(branch)[0])
    return found


def _tag(model: Any) -> Any:
    """The value of the ``op`` that tells a model from its siblings in a tagged union."""
    if not _is_model(model) or "op" not in model.model_fields:
        return None
    args = typing.get_args(model.model_fields["op"].annotation)
    return args[0] if len(args) == 1 else None


def model_problems(
    error: pydantic.ValidationError,
    model: type[pydantic.BaseModel],
    locate: Locate,
    base: tuple[str | int, ...],
    data: Any,
) -> list[Problem]:
    """One :class:`Problem` per finding. ``data`` is what was validated; ``base`` is its path in the file."""
    problems, seen = [], set()
    findings = error.errors(include_url=False)[: MAX_PROBLEMS + 1]
    for found in findings:
        if found["type"] == "too_short" and any(f["loc"][:-1] == found["loc"] for f in findings):
            continue  # counted without the items that are refused in lines of their own
        loc, fields = _path_in(data, found["loc"]), _fields_at(model, found["loc"][:-1], data)
        message = _message(found, fields)
        path = (*base, *loc)
        if (path, "union") in seen and found["loc"] != loc:
            continue
        if len(found["loc"]) > len(loc) and found["type"] not in ("missing", "extra_forbidden"):
            # several branches of a union were tried: one line for the value is enough
            seen.add((path, "union"))
        problems.append(Problem(*locate(path), dotted(path), message))
    return problems


def _path_in(data: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Pydantic's location with the names of union branches left out, so that it is a path in the data."""
    path: list[str | int] = []
    current = data
    for index, part in enumerate(loc):
        if (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(current)
        ):
            path.append(part)
            current = current[part]  # type: ignore[index]
        elif index == len(loc) - 1 and isinstance(current, dict) and part != "[key]":
            path.append(part)
    return tuple(path)
