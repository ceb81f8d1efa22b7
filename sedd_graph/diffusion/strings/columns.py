"""Alignments of a noise string with a clean string, and the strings between them (Edit Flows, arXiv 2506.09018, section 3).

A column of an alignment holds a token or a blank of each string. At an intermediate time some columns are already clean and the
others still noise; reading them without the blanks gives the noisy string. Axes: b rows, m noise tokens, n clean tokens, c columns,
w positions of a padded string (the start state first).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["BLANK", "Columns", "Remaining", "align_optimal", "align_padded", "partway"]

BLANK = -1
"""Entry of a column where a string has no token."""


class Columns(NamedTuple):
    """Aligned strings: ``noise`` and ``clean`` int64 [b, c], tokens or :data:`BLANK`. Columns with two blanks are padding."""

    noise: Tensor
    clean: Tensor


class Remaining(NamedTuple):
    """The edits from a noisy string to the clean one: one for each column that is still noise and differs from clean.

    Attributes:
        place: int64 [b, c], the position in the noisy string of the token to delete or replace, or of the gap to insert into.
        token: int64 [b, c], the new token; 0 for a deletion.
        insert: bool [b, c]. The three masks are all False where a column needs no edit.
        delete: bool [b, c].
        substitute: bool [b, c].
    """

    place: Tensor
    token: Tensor
    insert: Tensor
    delete: Tensor
    substitute: Tensor


def align_padded(noise: Tensor, clean: Tensor) -> Columns:
    """Return the columns of ``noise`` int64 [b, m] and ``clean`` [b, n] position by position, blank behind the shorter one's end."""
    width = max(noise.shape[1], clean.shape[1])
    return Columns(*(pad(x, (0, width - x.shape[1]), value=BLANK) for x in (noise, clean)))


def align_optimal(noise: Tensor, clean: Tensor) -> Columns:
    """Return an alignment [b, m + n] with the fewest edits (Levenshtein distance; Needleman and Wunsch 1970).

    Ties are broken in favour of columns with two tokens as far right as possible. Takes m + (m + n) vectorised steps.

    Args:
        noise: int64 [b, m], :data:`BLANK` behind the ends.
        clean: Clean strings, int64 [b, n], padded in the same way.
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
        # consecutive insertions cost one each, so the minimum over their number is a running minimum
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
    """Return the strings between noise and clean, and the edits that turn each into the clean string.

    Args:
        columns: Alignments.
        moved: bool [b, c], columns that are already clean; the others are noise.
        start: The start state, put in front of each string and behind its end.
        width: Positions of the result, w; None: those of the longest string. Tokens and edits beyond it are dropped, and the tokens
            counted in :attr:`Strings.cut`.
    """
    noise, clean = columns
    now = torch.where(moved, clean, noise)
    there = now != BLANK
    place, length = there.long().cumsum(-1), there.sum(-1, keepdim=True)
    size = 1 + (int(length.max()) if len(now) else 0) if width is None else width
    tokens = now.new_full((len(now), size + 1), start)  # the last column takes the tokens that are dropped
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
