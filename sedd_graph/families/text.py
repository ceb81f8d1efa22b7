"""Rules that families of text share: holes in prompts, and tokenizers that fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sedd_graph.engine.process import DataFacts, Text, TextWithHoles
from sedd_graph.errors import UserError

__all__ = [
    "FREE",
    "LARGEST",
    "check_row",
    "check_tokens",
    "fill_holes",
    "split_holes",
    "token_count",
    "too_many_tokens",
]

FREE = -1
"""Marks a position that the model fills in."""
LARGEST = 2**20
"""Most tokens of a prompt."""
_HOLE = re.compile(r"\[\[(\d+)\]\]")


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


def all_but(forbidden: Sequence[int], count: int) -> Tensor:
    """Return bool [count], false at the ``forbidden`` ids."""
    found = torch.ones(count, dtype=torch.bool)
    found[[i for i in forbidden if i < count]] = False
    return found


def check_tokens(tokens: Tensor, count: int) -> None:
    """Raises :class:`UserError` unless ``tokens`` is int64 [b, l] from 0 to below ``count``."""
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise UserError(f"tokens must be int64 [batch, length], not {tokens.dtype} {list(tokens.shape)}")
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= count):
        raise UserError(
            f"tokens run from {int(tokens.min())} to {int(tokens.max())}; this model has {count} (0 to {count - 1})"
        )


def fill_holes(text: TextWithHoles, tokenizer: Text, length: int) -> list[int]:
    """Return the tokens of a text in which ``[[N]]`` stands for N free ones, or of a prefix and a suffix in ``length`` tokens."""
    if text.text is not None:
        row: list[int] = []
        for index, part in enumerate(
            split_holes(text.text, _HOLE, "[[N]] where N tokens are free, such as 'The [[12]] is'")
        ):
            if index % 2 and (len(part) > 7 or len(row) + int(part) > LARGEST):
                raise UserError(f"infill: [[{part[:20]}]] makes more than {LARGEST:,} tokens")
            row += [FREE] * int(part) if index % 2 else tokenizer.encode(part).tolist()
        return row
    before, after = (tokenizer.encode(part).tolist() if part else [] for part in (text.prefix, text.suffix))
    left = length - len(before) - len(after)
    if left <= 0:
        raise UserError(
            f"infill: prefix and suffix have {len(before) + len(after)} tokens; nothing is free of {length}"
        )
    return [*before, *[FREE] * left, *after]


def check_row(row: list[int], tokenizer: Text) -> None:
    """Raises :class:`UserError` for a row that is too long, or holds tokens that the model was not trained on."""
    if set(row) & set(tokenizer.forbidden):
        raise UserError("infill: the text has characters that the model was not trained on")
    if len(row) > LARGEST:
        raise UserError(f"infill: the text has {len(row):,} tokens, more than {LARGEST:,}")
