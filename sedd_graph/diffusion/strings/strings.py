"""Strings: rows that differ in length, and the edits that change them.

A string is a row that begins with the start state (the last state of the kernel), holds data tokens, and is padded with the
start state; ``attend`` marks the start and the tokens. Gap j is the place behind position j, so gap 0 is before the
first token. Axes: b rows, w = 1 + tokens of a noisy row (padded), n tokens of a clean row (padded).
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
    """Rows of different lengths: ``tokens`` int64 [b, w] and ``attend`` bool [b, w], the start state first.

    ``cut`` counts tokens that did not fit and were left out. ``kept`` bool [b, n], where known, marks the clean tokens
    that are still there.
    """

    tokens: Tensor
    attend: Tensor
    cut: int = 0
    kept: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [b]: tokens of each row, the start not counted."""
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
    """Strings of the ``tokens`` [b, w] that ``keep`` marks, each place followed by ``follow`` int64 [b, w] new tokens.

    ``new(place)`` gives the token for each position of the result, int64 of the shape of ``place``, which says behind which
    position of the old row it stands. New tokens stay where they belong when the token before them goes. Rows
    are as wide as the longest, or ``width``: what does not fit is left out and counted.
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
    """The distinct ``tokens`` int64 [b, n] of each row in order, then ``rest``, and which of them each position is, int64 [b, n]."""
    ordered, order = tokens.sort(dim=1, stable=True)
    rank = torch.zeros_like(tokens)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    symbols = torch.full_like(tokens, rest).scatter(1, rank, ordered)
    return symbols, torch.zeros_like(rank).scatter(1, order, rank)


def wide(x: Tensor, width: int) -> Tensor:
    """Cut or pad ``x`` [b, w, ...] to ``width`` positions."""
    x = x[:, :width]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]))
