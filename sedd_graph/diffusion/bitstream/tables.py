"""Frequency tables of the coder: probabilities rounded to integers of a fixed sum.

A table gives a distribution over n symbols for each of m rows. Rounding changes a probability by at most 2^-29, but the
largest of a row, which takes up what is left: the total variation distance from the exact distribution is at most n 2^-29.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sedd_graph.diffusion.bitstream.coder import BITS, TOTAL, Code, Integers

__all__ = ["Numbers", "Rows", "SharedRows", "Table", "Without", "rounded"]

Numbers = npt.NDArray[np.float64]
"""Type of arrays of probabilities."""


def rounded(weights: Numbers, support: npt.NDArray[np.bool_] | None = None) -> Integers:
    """Round weights to frequencies of sum :data:`~sedd_graph.diffusion.bitstream.coder.TOTAL`.

    Args:
        weights: Weights of any sum, [m, n], at least 0; of a row of zeros, the ``support`` alone counts.
        support: bool [m, n], symbols that must be possible: their frequencies are at least 1, all others 0. None:
            frequencies are rounded to the nearest integer, and small weights may become 0.

    Returns:
        int64 [m, n]; a row without any weight and support is 0.
    """
    if not np.isfinite(weights).all():
        raise ValueError("probabilities are not finite")
    weights = weights.clip(min=0)
    free = TOTAL
    if support is not None:
        weights = np.where(support, weights, 0.0)
        least = support.astype(np.int64)
        free = TOTAL - least.sum(-1, keepdims=True)
    total = weights.sum(-1, keepdims=True)
    share = weights / np.where(total > 0, total, 1.0)
    found = (
        np.rint(share * free).astype(np.int64) if support is None else np.floor(share * free).astype(np.int64) + least
    )
    rows, most = np.arange(len(found)), found.argmax(-1)
    rest = TOTAL - found.sum(-1)
    found[rows, most] += np.where(found[rows, most] > 0, rest, 0)
    return found


class Table(Protocol):
    """A conditional distribution over symbols, in integers."""

    def take(self, code: Code, rows: Integers, active: npt.NDArray[np.bool_], known: Integers | None) -> Integers:
        """Code one symbol on each active lane and return it; arguments are those of :meth:`Code.digit`."""

    def digest(self) -> bytes:
        """Return a digest of all frequencies."""

    def bits(self, rows: Integers, symbols: Integers) -> Numbers:
        """Return the number of bits of each symbol given its row, [...]."""


def _digest(*parts: Integers) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return found.digest()


def _bits(size: Integers) -> Numbers:
    return BITS - np.log2(size.clip(min=1).astype(np.float64))


class Rows:
    """A table with one row of frequencies for each condition.

    Args:
        frequencies: int64 [m, n], of sum TOTAL in each row, or 0 for a row that is never read.
    """

    def __init__(self, frequencies: Integers) -> None:
        self.frequencies = frequencies
        self.ends = frequencies.cumsum(-1)
        # row i in one sorted array: its values are shifted by i TOTAL
        shift = np.arange(len(frequencies), dtype=np.int64)[:, None] << BITS
        self._flat = (self.ends + shift).ravel()

    def of(self, rows: Integers, symbols: Integers) -> tuple[Integers, Integers]:
        size = self.frequencies[rows, symbols]
        return self.ends[rows, symbols] - size, size

    def find(self, rows: Integers, values: Integers) -> tuple[Integers, Integers, Integers]:
        place = np.searchsorted(self._flat, values + (rows << BITS), side="right")
        symbols = (place - rows * self.frequencies.shape[1]).clip(0, self.frequencies.shape[1] - 1)
        return symbols, *self.of(rows, symbols)

    def take(self, code: Code, rows: Integers, active: npt.NDArray[np.bool_], known: Integers | None) -> Integers:
        return code.digit(self, rows, active, known)

    def digest(self) -> bytes:
        return _digest(self.frequencies)

    def bits(self, rows: Integers, symbols: Integers) -> Numbers:
        return _bits(self.frequencies[rows, symbols])


class Without:
    """One row of frequencies, from which the symbol that equals the condition is taken out; the others are scaled up.

    Args:
        frequencies: int64 [n], of sum TOTAL.
    """

    def __init__(self, frequencies: Integers) -> None:
        self.frequencies = frequencies
        self.ends = frequencies.cumsum()

    def _scaled(self, rows: Integers, ends: Integers) -> Integers:
        """Scale cumulative frequencies, of which the condition's are taken out, to the sum TOTAL."""
        rest = np.maximum(TOTAL - self.frequencies[rows], 1)
        return (ends * TOTAL) // rest

    def of(self, rows: Integers, symbols: Integers) -> tuple[Integers, Integers]:
        gone, own = self.frequencies[rows], np.where(symbols == rows, 0, self.frequencies[symbols])
        ends = self.ends[symbols] - np.where(symbols >= rows, gone, 0)
        start = self._scaled(rows, ends - own)
        return start, self._scaled(rows, ends) - start

    def find(self, rows: Integers, values: Integers) -> tuple[Integers, Integers, Integers]:
        gone = self.frequencies[rows]
        # the greatest cumulative frequency whose scaled value is at most ``values``
        place = -((-(values + 1) * (TOTAL - gone)) // TOTAL) - 1
        place = place + np.where(place >= self.ends[rows] - gone, gone, 0)
        symbols = np.searchsorted(self.ends, place, side="right").clip(max=len(self.ends) - 1)
        return symbols, *self.of(rows, symbols)


class SharedRows:
    """A table of the probability that the symbol equals its condition, and of frequencies that all conditions share.

    A symbol is coded in two digits: whether it equals the condition, and if not, which of the others it is. Memory is
    linear in n, so that vocabularies may be large.

    Args:
        stay: int64 [n], frequency out of TOTAL that the symbol equals the condition.
        others: int64 [n], frequencies of sum TOTAL of symbols that differ from the condition, before the condition is
            taken out.
    """

    def __init__(self, stay: Integers, others: Integers) -> None:
        self._stay = Rows(np.stack([TOTAL - stay, stay], -1))
        self._others = Without(others)

    def take(self, code: Code, rows: Integers, active: npt.NDArray[np.bool_], known: Integers | None) -> Integers:
        same = None if known is None else (known == rows).astype(np.int64)
        stays = code.digit(self._stay, rows, active, same) == 1
        other = code.digit(self._others, rows, active & ~stays, known)
        return np.where(active, np.where(stays, rows, other), 0)

    def digest(self) -> bytes:
        return _digest(self._stay.frequencies, self._others.frequencies)

    def bits(self, rows: Integers, symbols: Integers) -> Numbers:
        same = (symbols == rows).astype(np.int64)
        return self._stay.bits(rows, same) + np.where(same, 0.0, _bits(self._others.of(rows, symbols)[1]))
