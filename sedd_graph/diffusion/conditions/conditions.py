"""What a text that is drawn is held to: keys of a blueprint's ``sample`` section, the same for every sampler. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.diffusion.conditions.automaton import compile_pattern

__all__ = ["Conditions", "Pattern"]


def _compiled(pattern: str) -> str:
    compile_pattern(pattern)  # its error says what is wrong with the pattern
    return pattern


Pattern = Annotated[str, pydantic.AfterValidator(_compiled)]
"""A regular expression of the subset that docs/reference/samplers.md lists."""

Forbidden = (
    Annotated[str, pydantic.Field(min_length=1, max_length=1024)] | Annotated[int, pydantic.Field(ge=0, lt=2**31)]
)


class Conditions(ComponentConfig):
    """Conditions on the text (docs/reference/samplers.md)."""

    forbid: Annotated[tuple[Forbidden, ...], pydantic.Field(max_length=4096)] = ()
    """Tokens that never come out: ids, or texts, which bar every token that holds them."""
    allow: Annotated[dict[int, Pattern], pydantic.Field(max_length=4096)] = {}
    """At a position (negative: from the end), a regular expression for the token that stands there."""
    matching: Pattern | None = None
    """A regular expression for the whole text of each row."""
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """When text is filled in, how much the given text counts: 0 not at all, 1 as the model has it, more for more."""
    observed: Literal["clamp", "renoise"] = "clamp"
    """What the network sees of the given text: itself, or (for kernels under which tokens that are seen change) itself
    noised anew each time."""
