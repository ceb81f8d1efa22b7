"""Edit scripts between two rows of tokens: which tokens are kept, replaced, inserted and deleted.

An edit script has as few insertions and deletions as possible (Myers 1986, "An O(ND) difference algorithm and its
variations"); those at one place are then paired to replacements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Gap", "gaps"]

MOST = 500
"""Largest number of insertions and deletions that are searched for; of rows that differ more, the middle is replaced."""


class Gap(NamedTuple):
    """A range of a row that is replaced by a range of another one.

    Attributes:
        start: First position in the row before.
        stop: Position behind the range there.
        new_start: First position in the row after.
        new_stop: Position behind the range there.
    """

    start: int
    stop: int
    new_start: int
    new_stop: int


def gaps(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> list[Gap]:
    """Return where two rows differ, from left to right; the tokens between the gaps are equal.

    Args:
        before: Token ids, int64 [position].
        after: Token ids, int64 [position], of any length.
    """
    shorter = min(len(before), len(after))
    differ = np.flatnonzero(before[:shorter] != after[:shorter])
    head = int(differ[0]) if len(differ) else shorter
    room = shorter - head
    differ = np.flatnonzero(before[len(before) - room :][::-1] != after[len(after) - room :][::-1])
    tail = int(differ[0]) if len(differ) else room
    one, other = before[head : len(before) - tail].tolist(), after[head : len(after) - tail].tolist()
    found, x, y = list[Gap](), 0, 0
    for i, j in [*_matches(one, other), (len(one), len(other))]:
        if i > x or j > y:
            found.append(Gap(head + x, head + i, head + y, head + j))
        x, y = i + 1, j + 1
    return found


def _matches(one: Sequence[int], other: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions of tokens that are kept, in order; none if the rows differ in more than :data:`MOST`."""
    ends = {1: 0}  # of each diagonal, the furthest position in the first row
    history = list[dict[int, int]]()
    for edits in range(min(MOST, len(one) + len(other)) + 1):
        history.append(dict(ends))
        for diagonal in range(-edits, edits + 1, 2):
            x = _step(ends, diagonal, edits)
            y = x - diagonal
            while x < len(one) and y < len(other) and one[x] == other[y]:
                x, y = x + 1, y + 1
            ends[diagonal] = x
            if x >= len(one) and y >= len(other):
                yield from reversed(list(_backwards(history, x, y)))
                return


def _step(ends: dict[int, int], diagonal: int, edits: int) -> int:
    """Return the position in the first row after one more edit that leads to a diagonal: an insertion, or a deletion."""
    insert = diagonal == -edits or (diagonal != edits and ends[diagonal - 1] < ends[diagonal + 1])
    return ends[diagonal + 1] if insert else ends[diagonal - 1] + 1


def _backwards(history: Sequence[dict[int, int]], x: int, y: int) -> Iterator[tuple[int, int]]:
    """Yield the kept tokens from the last to the first, given the furthest positions before each number of edits."""
    for edits in range(len(history) - 1, -1, -1):
        ends, diagonal = history[edits], x - y
        start = _step(ends, diagonal, edits) if edits else 0
        while x > start:
            x, y = x - 1, y - 1
            yield x, y
        if edits:
            insert = diagonal == -edits or (diagonal != edits and ends[diagonal - 1] < ends[diagonal + 1])
            x, y = (x, y - 1) if insert else (x - 1, y)
