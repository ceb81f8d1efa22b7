"""Counts of characters (Unicode code points) in text, and entropies of the character frequencies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["code_points", "count_characters", "cross_entropy_bits", "entropy_bits", "pieces", "split_stream"]

BLOCK = 4 * 2**20
"""Number of characters that are converted to an integer array at a time, to limit memory."""
CODES = 0x110000
"""Number of Unicode code points, and length of an array of counts."""

Counts = npt.NDArray[np.int64]
"""Type of an array of character counts: the number of occurrences of each code point, int64 [0x110000]."""


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the code points of ``text``, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def pieces(text: str, size: int = BLOCK) -> Iterator[str]:
    """Yield consecutive pieces of a text, split before a space if possible.

    Args:
        text: The text.
        size: Largest number of characters per piece.
    """
    start = 0
    while start < len(text):
        stop = min(len(text), start + size)
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop)
            stop = space if space > start else stop
        yield text[start:stop]
        start = stop


def split_stream(blocks: Iterable[str], size: int = BLOCK) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text, as :func:`pieces` splits it, while it is read.

    Args:
        blocks: The text, in blocks of any size.
        size: Largest number of characters per piece.

    Yields:
        A piece, and whether it is the last. Nothing for an empty text.
    """
    waiting = ""
    for block in blocks:
        waiting += block
        while len(waiting) > size:
            space = waiting.rfind(" ", 1, size)
            stop = space if space > 0 else size
            yield waiting[:stop], False
            waiting = waiting[stop:]
    if waiting:
        yield waiting, True


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in blocks of about ``BLOCK`` characters, since each block costs a pass over all code
    points.
    """
    waiting: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, len(text), BLOCK):
            waiting.append(text[start : start + BLOCK])
            size += len(waiting[-1])
            if size >= BLOCK:
                yield "".join(waiting)
                waiting, size = [], 0
    yield "".join(waiting)


def count_characters(texts: Iterable[str]) -> Counts:
    """Return the number of occurrences of each code point in all ``texts`` together, int64 [0x110000]."""
    total = np.zeros(CODES, dtype=np.int64)
    for block in _blocks(texts):
        found = np.bincount(code_points(block))
        total[: len(found)] += found
    return total


def entropy_bits(counts: Counts) -> float:
    """Return the entropy of the character frequencies, bits per character, for ``counts`` int64 [0x110000]."""
    seen = counts[counts > 0].astype(np.float64)
    chance = seen / seen.sum()
    return float(-(chance * np.log2(chance)).sum()) + 0.0


def cross_entropy_bits(counts: Counts, *, under: Counts) -> float:
    """Return the cross-entropy of a text under the character frequencies of a reference text, bits per character.

    Args:
        counts: Character counts of the evaluated text, int64 [0x110000].
        under: Character counts of the reference text, int64 [0x110000]. Its frequencies are smoothed by adding one to
            the count of each character that occurs in either text.
    """
    alphabet = (under > 0) | (counts > 0)
    seen, new = under[alphabet].astype(np.float64), counts[alphabet].astype(np.float64)
    chance = (seen + 1) / (seen + 1).sum()
    return float(-(new * np.log2(chance)).sum() / max(1.0, new.sum())) + 0.0
