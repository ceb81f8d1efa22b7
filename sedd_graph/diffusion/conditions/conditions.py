"""Conditions on sampled text: keys of a blueprint's ``sample`` section, for every sampler. Does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.diffusion.conditions.automaton import compile_pattern

__all__ = ["Conditions", "Pattern"]


def _compiled(pattern: str) -> str:
    compile_pattern(pattern)  # pydantic reports its error
    return pattern


Pattern = Annotated[str, pydantic.AfterValidator(_compiled)]
"""Type of a Config field: a regular expression, validated by compiling it. Syntax: docs/reference/samplers.md."""

Forbidden = (
    Annotated[str, pydantic.Field(min_length=1, max_length=1024)] | Annotated[int, pydantic.Field(ge=0, lt=2**31)]
)


class Conditions(ComponentConfig):
    """Config of the conditions on sampled text, which every sampler accepts (see docs/reference/samplers.md)."""

    forbid: Annotated[tuple[Forbidden, ...], pydantic.Field(max_length=4096)] = ()
    """Tokens that are never sampled: token ids, or strings. At most 4,096.

    A string forbids every token whose text contains that string.
    """
    allow: Annotated[dict[int, Pattern], pydantic.Field(max_length=4096)] = {}
    """Regular expressions by position (negative: from the end). At most 4,096.

    The token at the position must match the expression.
    """
    matching: Pattern | None = None
    """A regular expression that the whole text of each row must match."""
    particles: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Number of rows drawn for each one that is returned, from 1 to 4,096.

    The returned row is chosen by importance weights, which corrects the distribution under ``forbid``, ``allow`` and
    ``matching`` to the model's own given the condition, up to an error that falls as 1 / particles. Network evaluations
    and memory grow in proportion.
    """
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Scale of classifier-free guidance by the given text in infilling, in [0, 100].

    1: the model's own distribution; 0: the given text is ignored.
    """
    observed: Literal["clamp", "renoise"] = "clamp"
    """Form in which given tokens enter the network: ``clamp`` or ``renoise``.

    ``clamp``: clean, as given. ``renoise``: noised afresh at each step, for kernels under which visible tokens change.
    """
