"""Batches of strings of different lengths, and the operation that deletes and inserts tokens.

A string is a row that begins with the BOS (beginning-of-string) token, the last state of the kernel, followed by data
tokens, and is padded with the BOS token. Gap j is the place for insertions behind position j, so gap 0 is before the first token. Axes: b
rows, w positions of a noisy string (padded), n tokens of a clean string (padded).
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
    """A padded batch of strings of different lengths.

    Attributes:
        tokens: int64 [b, w]. Position 0 holds the BOS token, which is the padding too.
        attend: bool [b, w], True at position 0 and at tokens, False at padding.
        cut: Number of tokens that exceeded w positions and were dropped, over all rows.
        kept: bool [b, n], over the n positions of the clean strings: True at tokens that noise has not deleted. None if
            unknown.
    """

    tokens: Tensor
    attend: Tensor
    cut: int = 0
    kept: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each string, without the BOS token, int64 [b]."""
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
    """Delete tokens from strings and insert new ones.

    Args:
        tokens: The strings, int64 [b, w].
        keep: bool [b, w], tokens to retain.
        follow: int64 [b, w], number of new tokens to insert behind each position, whether or not its token is deleted.
        new: Function that chooses the new tokens, ``tokens = new(place)``, both int64 [b, width] over the positions of
            the result. If position i of the result is a new token, ``place[:, i]`` is the position of the original
            string behind which it is inserted. The returned ``tokens`` are ignored at all other positions.
        start: The BOS token, which pads the result.
        width: Number of positions of the result; None: that of the longest string. Tokens beyond it are dropped and
            counted in :attr:`Strings.cut`.
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
    """Return the distinct tokens of each row, and the index of each position's token among them.

    Args:
        tokens: int64 [b, n].
        rest: Value that pads the distinct tokens to n entries.

    Returns:
        The distinct tokens of each row, sorted and padded, int64 [b, n]; and the index of each position's token, int64
        [b, n].
    """
    ordered, order = tokens.sort(dim=1, stable=True)
    rank = torch.zeros_like(tokens)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    symbols = torch.full_like(tokens, rest).scatter(1, rank, ordered)
    return symbols, torch.zeros_like(rank).scatter(1, order, rank)


def wide(x: Tensor, width: int) -> Tensor:
    """Return ``x`` truncated or zero-padded along its second axis to ``width`` positions.

    Args:
        x: [b, w, ...].
        width: Number of positions of the result.
    """
    x = x[:, :width]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]))
