"""Conversion of pydantic's validation errors to messages for users, with the path of the invalid key or value."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from typing import Any

import pydantic

from sedd_graph.blueprint.yaml import DataPath
from sedd_graph.component.choice import Choice
from sedd_graph.component.strict import branches
from sedd_graph.errors import MAX_PROBLEMS, choices, suggest

__all__ = ["dotted", "findings"]

_PATTERNS = {
    r"^[a-z][a-z0-9_]*$": "use lower-case letters, digits and _, starting with a letter",
    r"^[a-z0-9][a-z0-9._-]*$": "use lower-case letters, digits, '-', '_' and '.'",
    r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$": "a reference is 'node' or 'node.port'",
    r"^[a-z][a-z0-9_]*(\.v[1-9][0-9]{0,3})?$": "an op is a registered name, such as 'attention' or 'attention.v1'",
}
_TYPES = {
    "int_type int_parsing int_from_float": "an integer",
    "float_type float_parsing": "a number",
    "string_type": "a string",
    "bool_type bool_parsing": "true or false",
    "list_type tuple_type": "a list",
    "dict_type model_type model_attributes_type": "a mapping",
    "none_required": "nothing",
}
_WANTED = {kind: words for kinds, words in _TYPES.items() for kind in kinds.split()}
"""Expected value, in words, by the type of a pydantic error."""
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def dotted(path: DataPath) -> str:
    """Return ``path`` as dotted text, such as ``nodes.head.in[0]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def findings(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], data: object
) -> Iterator[tuple[DataPath, str]]:
    """Yield a pair (path within ``data``, message) for each validation error.

    Args:
        error: The error that pydantic raised.
        model: The model that ``data`` was validated against.
        data: The rejected input.
    """
    seen: set[DataPath] = set()
    found = error.errors(include_url=False)[: MAX_PROBLEMS + 1]
    for one in found:
        if one["type"] == "too_short" and any(f["loc"][:-1] == one["loc"] for f in found):
            continue  # counted without the items that are refused in lines of their own
        loc, path = one["loc"], _path_in(data, one["loc"])
        if path in seen and loc != path:
            continue
        if len(loc) > len(path) and one["type"] not in ("missing", "extra_forbidden"):
            seen.add(path)  # several branches of a union were tried: one line for the value is enough
            tried = [f for f in found if len(f["loc"]) > len(path) and _path_in(data, f["loc"]) == path]
            if len(tried) > 1 and all(f["type"] in _WANTED for f in tried):
                yield path, f"must be {_alternatives(f['type'] for f in tried)}, not {_shown(one.get('input'))}"
                continue
        yield path, _message(one, _fields_at(model, loc[:-1], data))


def _alternatives(kinds: Iterable[str]) -> str:
    """Return the expected values of a union's branches in words, such as ``a number, a string, or true or false``."""
    words = list(dict.fromkeys(_WANTED[kind] for kind in kinds))
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    words.sort(key=lambda text: " or " in text)  # last, so that its own "or" is read as one
    return " or ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + ", or " + words[-1]


def _shown(value: object) -> str:
    if value is None or isinstance(value, dict | list):
        return "nothing" if value is None else "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(error: Any, fields: Iterable[str]) -> str:
    kind, context, shown = error["type"], error.get("ctx", {}), _shown(error.get("input"))
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {shown}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}, not {shown}"
    if kind == "extra_forbidden":
        known = sorted(fields)
        return f"unknown key{choices(str(error['loc'][-1]), known) if known else ''}"
    if kind == "missing":
        return "is missing"
    if kind == "too_short" and isinstance(error.get("input"), dict):
        least = context["min_length"]
        has = context["actual_length"] or "none"
        return f"needs at least {least} entr{'y' if least == 1 else 'ies'}, and has {has}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{shown}: {_PATTERNS.get(context['pattern'], 'does not match ' + context['pattern'])}"
    if kind == "literal_error":
        options = _quoted(context["expected"].replace(" or ", ", "))
        return f"{shown}: must be {context['expected']}{suggest(str(error.get('input')), options)}"
    if kind == "union_tag_invalid":
        (name,), tag = _quoted(context["discriminator"]), context["tag"]
        return f"unknown {name} {tag!r}{choices(str(tag), _quoted(context['expected_tags']))}"
    if kind == "union_tag_not_found":
        return f"needs the key {context['discriminator']}"
    if kind == "finite_number":
        return f"{shown}: must be a finite number"
    text: str = error["msg"]
    return text[0].lower() + text[1:]


def _quoted(text: str) -> list[str]:
    """Return the words of pydantic's ``'a', 'b'``."""
    return [word.strip(" '") for word in text.split(",")]


def _fields_at(model: type[pydantic.BaseModel], loc: DataPath, data: Any) -> list[str]:
    """Return the keys that the model at ``loc`` of ``data`` knows; none where that is not one model."""
    options: list[Any] = [model]
    op: list[str] = []
    for part in loc:
        inside = [inner for option in options for inner in _inside(option, part)]
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            data = data[part]
        chosen = [c for inner in inside for c in getattr(inner, "__metadata__", ()) if isinstance(c, Choice)]
        op = ["op"] if chosen else []
        options = [c.config_of(data) for c in chosen] or [o for o in inside if _tag(o) == part] or inside
    models = [m for option in options for m in branches(option) if _is_model(m)]
    return [f.alias or n for n, f in models[0].model_fields.items()] + op if len(models) == 1 else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """Return the annotations of what ``part`` is within a value of this type; a union's own tag gives its branch."""
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
    """Return the value of the ``op`` that tells a model from its siblings in a tagged union."""
    if not _is_model(model) or "op" not in model.model_fields:
        return None
    args = typing.get_args(model.model_fields["op"].annotation)
    return args[0] if len(args) == 1 else None


def _path_in(data: Any, loc: DataPath) -> DataPath:
    """Return pydantic's location without the names of union branches, so that it is a path in ``data``."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        items = dict(enumerate(data)) if isinstance(data, list) else data if isinstance(data, dict) else {}
        if part in items:
            path.append(part)
            data = items[part]
        elif index == len(loc) - 1 and isinstance(data, dict) and part != "[key]":
            path.append(part)
    return tuple(path)
