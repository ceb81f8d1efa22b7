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
    """List of at most 4,096 token ids or strings. These tokens are never sampled.

    A string forbids every token whose text contains that string.
    """
    allow: Annotated[dict[int, Pattern], pydantic.Field(max_length=4096)] = {}
    """Mapping from positions of a row to regular expressions, for at most 4,096 positions.

    The text of the token at the position must match the expression as a whole. Negative positions count from the end.
    """
    matching: Pattern | None = None
    """A regular expression that the whole text of each row must match."""
    particles: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Number of candidate rows drawn for each returned row, from 1 (the default) to 4,096.

    Under ``forbid``, ``allow`` and ``matching``, the distribution of one candidate is not exactly the model's
    distribution given the condition. The returned row is therefore chosen among the candidates by importance weights,
    and the error falls as 1 / particles. Network evaluations and memory grow in proportion.
    """
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Scale g of classifier-free guidance by the given text in infilling, from 0 to 100.

    A token is sampled from ``p(token | row) ** g * p(token | row with the given text masked) ** (1 - g)``, normalised.
    1 (the default): the model's own distribution, without guidance; 0: the given text is ignored.
    """
    observed: Literal["clamp", "renoise"] = "clamp"
    """Form in which given tokens enter the network: ``clamp`` or ``renoise``.

    ``clamp``: clean, as given. ``renoise``: noised afresh at each step, for kernels under which visible tokens change.
    """
