"""Alignments of noise strings with clean strings, and strings between them (Edit Flows, arXiv 2506.09018).

A column of an alignment pairs a token or a blank of the noise string with a token or a blank of the clean string. At an
intermediate time some columns have switched to their clean entry, and the others still have their noise entry; these
entries without blanks are the noisy string. Axes: b rows, m noise tokens, n clean tokens, c columns, w positions of a
padded string (the BOS token first).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["BLANK", "Columns", "Remaining", "align_optimal", "align_padded", "partway"]

BLANK = -1
"""Entry of an alignment's column in which the noise string, or the clean string, has no token (a gap symbol)."""


class Columns(NamedTuple):
    """Alignments of noise strings with clean strings, with c columns each.

    A column pairs a token or a blank of the noise string with a token or a blank of the clean string. Columns with two
    blanks are padding.

    Attributes:
        noise: int64 [b, c], noise tokens or :data:`BLANK`.
        clean: int64 [b, c], clean tokens or :data:`BLANK`.
    """

    noise: Tensor
    clean: Tensor


class Remaining(NamedTuple):
    """The edits that turn a noisy string into the clean one.

    There is one edit for each column of the alignment that still has its noise entry and whose two entries differ.

    Attributes:
        place: int64 [b, c], the position in the noisy string of the token to delete or replace, or behind which to
            insert.
        token: int64 [b, c], the new token; 0 for a deletion.
        insert: bool [b, c], True for an insertion. All three masks are False for a column without an edit.
        delete: bool [b, c], True for a deletion.
        substitute: bool [b, c], True for a substitution.
    """

    place: Tensor
    token: Tensor
    insert: Tensor
    delete: Tensor
    substitute: Tensor


def align_padded(noise: Tensor, clean: Tensor) -> Columns:
    """Align strings position by position, with blanks behind the end of the shorter one.

    Args:
        noise: Noise tokens, int64 [b, m], :data:`BLANK` at padding.
        clean: Clean tokens, int64 [b, n], :data:`BLANK` at padding.

    Returns:
        Columns, [b, max(m, n)].
    """
    width = max(noise.shape[1], clean.shape[1])
    return Columns(*(pad(x, (0, width - x.shape[1]), value=BLANK) for x in (noise, clean)))


def align_optimal(noise: Tensor, clean: Tensor) -> Columns:
    """Return an alignment with the fewest edits (Levenshtein distance; Needleman and Wunsch 1970).

    Among the alignments with the fewest edits, columns are chosen from right to left: a column with two tokens if
    possible, else a deletion, else an insertion. The time is that of at most 2 m + n steps, each vectorised over the
    batch.

    Args:
        noise: Noise tokens, int64 [b, m], :data:`BLANK` at padding.
        clean: Clean tokens, int64 [b, n], :data:`BLANK` at padding.

    Returns:
        Columns, [b, m + n], with padding on the left.
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
    """Return the noisy strings in which some columns have switched to clean, and the edits that remain.

    Args:
        columns: Alignments of noise strings with clean strings.
        moved: bool [b, c], columns that have switched to their clean entry.
        start: The BOS token, the first position of each string and its padding.
        width: Number of positions w of the noisy strings, the BOS token included; None: that of the longest noisy
            string. Tokens and edits beyond it are dropped; :attr:`Strings.cut` counts the dropped tokens.
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
