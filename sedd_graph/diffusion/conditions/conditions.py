"""Conditions on sampled text: the keys of a blueprint's ``sample`` section that every sampler takes. No torch here."""

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
"""A regular expression of the subset in docs/reference/samplers.md; validated by compiling it."""

Forbidden = (
    Annotated[str, pydantic.Field(min_length=1, max_length=1024)] | Annotated[int, pydantic.Field(ge=0, lt=2**31)]
)


class Conditions(ComponentConfig):
    """Config of the conditions on sampled text (see docs/reference/samplers.md)."""

    forbid: Annotated[tuple[Forbidden, ...], pydantic.Field(max_length=4096)] = ()
    """Tokens that are never sampled: ids, or texts, which forbid every token that contains them. Up to 4,096."""
    allow: Annotated[dict[int, Pattern], pydantic.Field(max_length=4096)] = {}
    """Position (negative: from the end) to a regular expression that the token at that position must match. Up to 4,096."""
    matching: Pattern | None = None
    """A regular expression that the whole text of each row must match."""
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Guidance scale of the given text when text is filled in, in [0, 100]. 0: ignore it; 1: the model's own distribution."""
    observed: Literal["clamp", "renoise"] = "clamp"
    """Form in which the network gets the given text: ``clamp``: as it is; ``renoise`` (for kernels under which visible tokens change): noised
    afresh at each step."""
