"""Counts of characters (Unicode code points) in text, and entropies of them. Long text is handled in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["code_points", "count_characters", "cross_entropy_bits", "entropy_bits", "pieces"]

BLOCK = 4 * 2**20
"""Characters handled at a time, so that gigabytes of text are never held a second time as numbers."""
CODES = 0x110000

Counts = npt.NDArray[np.int64]


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the code points of ``text``, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def pieces(text: str, size: int = BLOCK) -> Iterator[str]:
    """Yield ``text`` in pieces of at most ``size`` characters, cut before a space where there is one."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + size)
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop)
            stop = space if space > start else stop
        yield text[start:stop]
        start = stop


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in blocks of about ``BLOCK`` characters: each block costs one pass over all code points."""
    waiting: list[str] = []
    held = 0
    for text in texts:
        for start in range(0, len(text), BLOCK):
            piece = text[start : start + BLOCK]
            waiting.append(piece)
            held += len(piece)
            if held >= BLOCK:
                yield "".join(waiting)
                waiting, held = [], 0
    if waiting:
        yield "".join(waiting)


def count_characters(texts: Iterable[str]) -> Counts:
    """Return how often each code point occurs, int64 [0x110000]."""
    total = np.zeros(CODES, dtype=np.int64)
    for block in _blocks(texts):
        found = np.bincount(code_points(block))
        total[: len(found)] += found
    return total


def entropy_bits(counts: Counts) -> float:
    """Return the entropy of character frequencies, bits per character: the least of any code without context."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    chance = seen / seen.sum()
    return float(-(chance * np.log2(chance)).sum()) + 0.0


def cross_entropy_bits(counts: Counts, *, under: Counts) -> float:
    """Return the cross-entropy of ``counts`` under the frequencies of ``under``, bits per character.

    Frequencies are smoothed by adding one to each character of either text.
    """
    alphabet = (under > 0) | (counts > 0)
    seen, new = under[alphabet].astype(np.float64), counts[alphabet].astype(np.float64)
    chance = (seen + 1) / (seen + 1).sum()
    return float(-(new * np.log2(chance)).sum() / max(1.0, new.sum())) + 0.0
