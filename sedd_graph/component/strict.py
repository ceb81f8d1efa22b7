"""Base class of the pydantic models that are read from a blueprint. Imports no torch."""

from __future__ import annotations

import types
import typing
from typing import Any

import pydantic

__all__ = ["Strict", "branches"]


def branches(annotation: Any) -> list[Any]:
    """Return the member types of a union annotation, without ``None`` and without ``Annotated`` metadata.

    Any other annotation is returned as the only member.
    """
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return branches(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [b for a in typing.get_args(annotation) if a is not type(None) for b in branches(a)]
    return [annotation]


class Strict(pydantic.BaseModel):
    """Base class of frozen pydantic models that reject unknown keys, NaN, infinity, and booleans in place of numbers.

    Plain pydantic models convert true to 1.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {field.alias or name: field.annotation for name, field in cls.model_fields.items()}
        return {key: _marked(value, fields[key]) if key in fields else value for key, value in data.items()}


class _Boolean:
    """Wrapper of a boolean in place of a number, which pydantic refuses with the path of the value."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _marked(value: Any, annotation: Any) -> Any:
    """Wrap the booleans in ``value`` where ``annotation`` takes numbers and no booleans."""
    options = branches(annotation)
    if isinstance(value, bool):
        numbers = any(o in (int, float) or _is_number_literal(o) for o in options)
        return _Boolean(value) if numbers and bool not in options else value
    for option in options:
        origin, arguments = typing.get_origin(option), [a for a in typing.get_args(option) if a is not ...]
        if isinstance(value, dict) and origin is dict:
            return {key: _marked(item, arguments[1]) for key, item in value.items()}
        if isinstance(value, list) and origin in (list, tuple):
            return [_marked(item, arguments[min(i, len(arguments) - 1)]) for i, item in enumerate(value)]
    return value


def _is_number_literal(option: Any) -> bool:
    return typing.get_origin(option) is typing.Literal and all(type(a) is int for a in typing.get_args(option))
