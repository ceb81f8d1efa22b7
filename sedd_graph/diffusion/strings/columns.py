"""Two strings in columns, and the strings on the way from one to the other (Edit Flows, arXiv 2506.09018, section 3).

A column holds what stands at one place of either string: a token, or a blank. Between the strings each column is still the
one's or already the other's, and what is read there, without the blanks, is a string. Axes: b rows, m noise tokens,
n clean tokens, c columns, w positions of a padded string (the start state first).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["BLANK", "Columns", "Remaining", "align_optimal", "align_padded", "partway"]

BLANK = -1
"""Stands in a column where a string has no token."""


class Columns(NamedTuple):
    """``noise`` and ``clean`` int64 [b, c], each a token or :data:`BLANK`; columns that are blank on both sides are padding."""

    noise: Tensor
    clean: Tensor


class Remaining(NamedTuple):
    """The edits that are left to do, one for each column that is still noise and not clean, in terms of the string there is.

    ``place`` int64 [b, c]: the position of the token to be deleted or replaced, or the gap to insert into; ``token`` int64
    [b, c]: what comes (0 where nothing does); and which of the three it is, bool [b, c], all False where nothing is left.
    """

    place: Tensor
    token: Tensor
    insert: Tensor
    delete: Tensor
    substitute: Tensor


def align_padded(noise: Tensor, clean: Tensor) -> Columns:
    """Rows int64 [b, m] and [b, n], blank behind their ends, one under the other from the left."""
    width = max(noise.shape[1], clean.shape[1])
    return Columns(*(pad(x, (0, width - x.shape[1]), value=BLANK) for x in (noise, clean)))


def align_optimal(noise: Tensor, clean: Tensor) -> Columns:
    """Columns [b, m + n] with as few edits as there can be (Levenshtein distance; Needleman and Wunsch 1970).

    Of equally good ones, the last columns that can hold two tokens do. Takes m + (m + n) vectorised steps.
    """
    rows, device = len(noise), noise.device
    deep, wide = ((x != BLANK).sum(-1) for x in (noise, clean))
    cost = torch.arange(clean.shape[1] + 1, device=device).expand(rows, -1)
    count = cost
    table = [cost]
    for row in range(int(deep.max()) if rows else 0):
        best = cost + 1
        differs = (noise[:, row, None] != clean).long()
        best = torch.cat([best[:, :1], torch.minimum(best[:, 1:], cost[:, :-1] + differs)], 1)
        # clean tokens that come in one after another cost one each: a running minimum
        cost = (best - count).cummin(-1).values + count
        table.append(cost)
    costs, each = torch.stack(table, 1), torch.arange(rows, device=device)
    size = noise.shape[1] + clean.shape[1]
    made = Columns(*(torch.full((rows, size), BLANK, device=device) for _ in range(2)))
    if not size:
        return made
    above, left = pad(noise, (1, 0), value=BLANK), pad(clean, (1, 0), value=BLANK)
    i, j = deep, wide
    for column in range(size - 1, size - 1 - int((deep + wide).max()), -1):
        here, a, b = costs[each, i, j], above[each, i], left[each, j]
        up, back = (i - 1).clamp(min=0), (j - 1).clamp(min=0)
        both = (i > 0) & (j > 0) & (costs[each, up, back] + (a != b) == here)
        down = ~both & (i > 0) & (costs[each, up, j] + 1 == here)
        along = ~both & ~down & (j > 0)
        made.noise[:, column] = torch.where(both | down, a, BLANK)
        made.clean[:, column] = torch.where(both | along, b, BLANK)
        i, j = i - (both | down).long(), j - (both | along).long()
    return made


def partway(columns: Columns, moved: Tensor, *, start: int, width: int | None = None) -> tuple[Strings, Remaining]:
    """The strings whose ``moved`` bool [b, c] columns are clean and whose others are noise, and what is left to do.

    Rows are as wide as the longest, or ``width``: what does not fit is left out and counted, and so are edits there.
    """
    noise, clean = columns
    now = torch.where(moved, clean, noise)
    there = now != BLANK
    place, length = there.long().cumsum(-1), there.sum(-1, keepdim=True)
    size = 1 + (int(length.max()) if len(now) else 0) if width is None else width
    tokens = now.new_full((len(now), size + 1), start)  # the last column takes what is left out
    tokens.scatter_(1, torch.where(there, place.clamp(max=size), size), now.clamp(min=0))
    left = (noise != clean) & ~moved & (place < size)
    attend = torch.arange(size, device=now.device) <= length
    return (
        Strings(tokens[:, :size], attend, int((length + 1 - size).clamp(min=0).sum())),
        Remaining(
            place.clamp(max=size - 1),
            clean.clamp(min=0),
            left & (noise == BLANK),
            left & (clean == BLANK),
            left & (noise != BLANK) & (clean != BLANK),
        ),
    )
