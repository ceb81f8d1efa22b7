"""Marks for components whose source code is exported as plain torch code (``sedd-graph export``).

An export writes the source of a component's own methods, specialised to its Config
(:mod:`sedd_graph.runs.plain.component_source`). Most components need no mark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["exported_as", "replacement_of"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MARK = "__exported_as__"


def exported_as(other: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Mark a function or method (decorator) whose exported code is that of ``other``, with the same arguments.

    It is for code that cannot run outside sedd_graph, such as an operator registered with torch, or a constructor that
    reads files:

    >>> @exported_as(plain_linear)
    ... def fast_linear(x, weight, bias): ...

    Args:
        other: Function of the same arguments and values, which needs torch, transformers and the standard library alone.
    """

    def mark(function: _Function) -> _Function:
        setattr(function, _MARK, other)
        return function

    return mark


def replacement_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function whose source is exported for ``function``: that of its mark, or ``function`` itself."""
    found: Callable[..., Any] = getattr(function, _MARK, function)
    return found
