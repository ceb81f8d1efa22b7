"""Strings: rows of different lengths, and the operation that edits them.

A string is a row that begins with the start state (the last state of the kernel), holds tokens, and is padded with the
start state. Gap j is the place behind position j, so gap 0 is before the first token. Axes: b rows, w positions of a noisy string
(padded), n tokens of a clean string (padded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Strings", "distinct", "rebuild", "wide"]


@dataclasses.dataclass(frozen=True)
class Strings:
    """Rows of different lengths.

    Attributes:
        tokens: int64 [b, w], the start state first.
        attend: bool [b, w], the start state and the tokens; False at padding.
        cut: Number of tokens that did not fit in w positions and were dropped.
        kept: bool [b, n], clean tokens that are still in the string; None if unknown.
    """

    tokens: Tensor
    attend: Tensor
    cut: int = 0
    kept: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each row without the start state, int64 [b]."""
        return self.attend.sum(-1) - 1


def rebuild(
    tokens: Tensor,
    keep: Tensor,
    follow: Tensor,
    new: Callable[[Tensor], Tensor],
    *,
    start: int,
    width: int | None = None,
) -> Strings:
    """Delete tokens and insert others.

    Args:
        tokens: int64 [b, w].
        keep: bool [b, w], tokens to retain.
        follow: int64 [b, w], number of new tokens behind each position. They are inserted also if the token there is deleted.
        new: ``new(place)`` returns a token for each position of the result, int64 [b, width]; ``place`` is the position in
            ``tokens`` behind which it stands. Values at positions that are not new are ignored.
        start: The start state, which pads the result.
        width: Positions of the result; None: those of the longest row. Tokens beyond it are dropped and counted in
            :attr:`Strings.cut`.
    """
    count = follow + keep
    ends = count.cumsum(-1)
    total = ends[:, -1:]
    size = int(total.max()) if width is None else width
    place = torch.arange(size, device=tokens.device).expand(len(tokens), size).contiguous()
    attend = place < total
    link = torch.searchsorted(ends, place, right=True).clamp(max=tokens.shape[1] - 1)
    first = place == (ends - count).gather(1, link)
    old = first & keep.gather(1, link)
    made = torch.where(old, tokens.gather(1, link), new(link))
    return Strings(torch.where(attend, made, start), attend, int((total - size).clamp(min=0).sum()))


def distinct(tokens: Tensor, rest: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ``tokens`` int64 [b, n] of each row, sorted and padded with ``rest``, and the index of each position's
    token among them; both int64 [b, n]."""
    ordered, order = tokens.sort(dim=1, stable=True)
    rank = torch.zeros_like(tokens)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    symbols = torch.full_like(tokens, rest).scatter(1, rank, ordered)
    return symbols, torch.zeros_like(rank).scatter(1, order, rank)


def wide(x: Tensor, width: int) -> Tensor:
    """Return ``x`` [b, w, ...] truncated or zero-padded to ``width`` positions."""
    x = x[:, :width]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]))
