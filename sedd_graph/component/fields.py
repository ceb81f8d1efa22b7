"""Documentation of Config fields: their descriptions, read from the source, and their types as text. Imports no torch.

The description of a field is the string literal below it, or ``pydantic.Field(description=...)``. The source file is
parsed only when a description is requested, so that imports stay fast.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from sedd_graph.component.contract import SizeMark

__all__ = ["add_descriptions", "field_descriptions", "type_text"]


@functools.lru_cache(maxsize=256)
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the class definitions of a module by qualified name; none if its source is not available."""
    found: dict[str, ast.ClassDef] = {}

    def visit(body: Sequence[ast.AST], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                local = "<locals>." if isinstance(node, ast.FunctionDef) else ""
                if isinstance(node, ast.ClassDef):
                    found[prefix + node.name] = node
                visit(node.body, f"{prefix}{node.name}.{local}")

    try:
        visit(ast.parse(inspect.getsource(sys.modules[module])).body, "")
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    return found


def field_descriptions(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """Return the descriptions of the fields of a pydantic model by field name, each on one line.

    Fields without a description are omitted.
    """
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        node = _classes(cls.__module__).get(cls.__qualname__)
        for field, below in zip(node.body, node.body[1:], strict=False) if node is not None else ():
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    found |= {name: field.description for name, field in model.model_fields.items() if field.description}
    return {name: text for name, text in found.items() if name in model.model_fields}


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """Yield the pydantic models within an annotation, recursively."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _models(field.annotation)
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def add_descriptions(model: type[pydantic.BaseModel], schema: dict[str, Any]) -> None:
    """Add field descriptions to the JSON schema of a pydantic model, in place.

    Args:
        model: The pydantic model; models nested in its fields are included.
        schema: The JSON schema of ``model``, as returned by ``model.model_json_schema()``.
    """
    definitions = schema.get("$defs", {})
    for found in dict.fromkeys(_models(model)):
        at = schema if found is model else definitions.get(found.__name__, {})
        names = {name: field.alias or name for name, field in found.model_fields.items()}
        for name, text in field_descriptions(found).items():
            if names[name] in at.get("properties", {}):
                at["properties"][names[name]]["description"] = text


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_LENGTHS = {"min_length": "at least", "max_length": "at most"}


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return text for the type, choices and bounds of a Config field, such as ``float, above 0``.

    Args:
        annotation: Type annotation of the field.
        metadata: Constraints of the field, as in pydantic's ``FieldInfo.metadata``.
    """
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return type_text(inner, [*more, *metadata])
    flat = [m for found in metadata for m in (found.metadata if isinstance(found, FieldInfo) else [found])]
    places = [place for m in flat if isinstance(place := getattr(m, "place", None), str)]
    if places:
        return f"a component of {places[0]}"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        text = " | ".join(map(str, arguments))
    elif origin in (typing.Union, types.UnionType):
        text = " or ".join("null" if a is type(None) else type_text(a) for a in arguments)
    elif origin in (list, dict, tuple):
        inside = dict.fromkeys(type_text(a) for a in arguments if a is not ...)
        text = f"{origin.__name__} of ({'; '.join(inside)})"
    else:
        text = getattr(annotation, "__name__", str(annotation))
    bounds = ["or an expression over axes"] if any(isinstance(m, SizeMark) for m in flat) else []
    for words, suffix in ((_BOUNDS, ""), (_LENGTHS, " long")):
        bounds += [f"{word} {getattr(m, key)}{suffix}" for m in flat for key, word in words.items() if hasattr(m, key)]
    return ", ".join([text, *bounds])
