"""Rules that families of text share: holes in prompts, and tokenizers that fit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sedd_graph.engine.process import DataFacts, Text
from sedd_graph.errors import UserError

__all__ = ["FREE", "LARGEST", "check_row", "split_holes", "token_count", "too_many_tokens"]

FREE = -1
"""Marks a position that the model fills in."""
LARGEST = 2**20
"""Most tokens of a prompt."""


def split_holes(text: str, hole: re.Pattern[str], form: str) -> list[str]:
    """Split ``text`` at its holes. Raises :class:`UserError` that shows the ``form`` of a hole where there is none."""
    parts = hole.split(text)
    if len(parts) == 1:
        raise UserError(f"infill: --text has no hole: write {form}")
    return parts


def token_count(data: DataFacts, tokens: int) -> Iterator[tuple[str, str]]:
    """Yield a problem where the tokenizer's size is known, and is not the number of ``tokens`` of the graph."""
    if data.tokens is not None and data.tokens != tokens:
        message = (
            f"the tokenizer has {data.tokens:,} tokens, but the graph is built for {tokens:,} (states less the mask)"
        )
        yield "data.tokenizer", message


def too_many_tokens(size: int, tokens: int) -> str | None:
    """Why a tokenizer of ``size`` tokens does not fit a graph that is built for ``tokens``; None where it does."""
    if size <= tokens:
        return None
    return (
        f"data.tokenizer has {size:,} tokens, more than the {tokens:,} that the graph is built for; "
        "raise params.tokens or choose a smaller tokenizer"
    )


def check_row(row: list[int], tokenizer: Text) -> None:
    """Raises :class:`UserError` for a row that is too long, or holds tokens that the model was not trained on."""
    if set(row) & set(tokenizer.forbidden):
        raise UserError("infill: the text has characters that the model was not trained on")
    if len(row) > LARGEST:
        raise UserError(f"infill: the text has {len(row):,} tokens, more than {LARGEST:,}")
