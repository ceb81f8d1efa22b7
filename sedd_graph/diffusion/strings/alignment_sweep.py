"""Forward and backward sums of the pair hidden Markov model of :mod:`.alignment`, one anti-diagonal at a time.

Cell (i, j) of the table stands for the first i tokens of the clean string and the first j of the noisy string; all
cells of diagonal k = i + j are computed together. Values span thousands of orders of magnitude, more than float64
holds. Each i of each row therefore has a scale, a power of two by which its values are divided and which is updated
every 32 diagonals. Values can then be added directly, without the logsumexp of a computation in log space. The rows of
the batch are adjacent in memory for each cell, so that a segment of a diagonal is contiguous.

Axes: b rows, n clean tokens, m noisy tokens (both padded), k diagonals.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Band", "Cells", "Links", "Sweep"]

_RENEWED = 32
"""Number of diagonals between two updates of the scales."""
_SLOPE = 16.0
"""Largest decrease of the scale, in powers of two, from one i to the next; 32 diagonals then cannot overflow."""
_MOST = 1000.0
"""Largest exponent of a change of scale."""
_KEPT = threading.local()


@dataclasses.dataclass(frozen=True)
class Links:
    """Transition probabilities of one token under the birth-death process (Thorne, Kishino and Felsenstein 1991).

    A descendant of a token is a token that was born behind it, or behind another of its descendants.

    Attributes:
        survive: float64 [b], the probability that the token survives.
        vanish: float64 [b], the probability that the token dies and has no surviving descendants.
        replace: float64 [b], the probability that the token dies and has a surviving descendant.
        birth: float64 [b], the probability that one more born token follows a token of the noisy string. It is equal
            for survivors, for born tokens and for the BOS token.
    """

    survive: Tensor
    vanish: Tensor
    replace: Tensor
    birth: Tensor


class Band:
    """The set of cells of the alignment table that are computed.

    Cell (i, j), with 0 <= i <= n and 0 <= j <= m, stands for the first i tokens of the clean string and the first j of
    the noisy string.

    Args:
        n: Number of clean tokens.
        m: Number of noisy tokens.
        most: Largest number of deletions for a process without births: only cells with 0 <= i - j <= most are computed.
            None: all cells, as a process with births requires.
    """

    def __init__(self, n: int, m: int, most: int | None) -> None:
        self.n, self.m, self.most = n, m, most

    def along(self, k: int) -> tuple[int, int]:
        """Return the range of i over the cells (i, k - i) of anti-diagonal k, as (first, last + 1).

        When k grows by 1, ``first`` and ``last`` each grow by 0 or 1.
        """
        if self.most is None:
            return max(0, k - self.m), min(self.n, k) + 1
        return max(k - self.m, (k + 1) // 2), min(self.n, k, (k + self.most) // 2) + 1

    def across(self, i: int) -> tuple[int, int]:
        """Return the range of j of the cells (i, j) for a given i, as (first, last + 1)."""
        if self.most is None:
            return 0, self.m + 1
        return max(0, i - self.most), min(self.m, i) + 1


class Cells:
    """The alignment table of a batch of b pairs of a clean and a noisy string.

    The table is stored as float64 [n + m + 1, min(n, m) + 1, b], with one anti-diagonal per entry of the first axis.
    The next table that the same thread creates reuses its memory, since allocation costs more than the arithmetic.

    Args:
        band: The cells to compute.
        rows: Number of pairs, b.
        device: Device of the table.
    """

    def __init__(self, band: Band, rows: int, device: torch.device) -> None:
        self.band, self._rows, self._by_j = band, rows, band.m < band.n
        self._width = min(band.n, band.m) + 1
        size = (band.n + band.m + 1) * self._width * rows
        memory = getattr(_KEPT, "memory", None)
        if memory is None or memory.device != device or len(memory) < size:
            _KEPT.memory = None
            with torch.inference_mode(False):
                _KEPT.memory = memory = torch.empty(size, dtype=torch.float64, device=device)
        self._all = memory[:size].view(-1, self._width, rows)
        self._diagonals = self._all.unbind(0)

    def along(self, k: int) -> Tensor:
        """Return a view of the cells (i, k - i) of the band on anti-diagonal k, in the order of i, [cells, b]."""
        lo, hi = self.band.along(k)
        shift = self.band.m - k if self._by_j else 0
        return self._diagonals[k][lo + shift : hi + shift]

    def across(self, i: int) -> Tensor:
        """Return a view of the cells (i, j) of the band in row i of the alignment, in the order of j, [cells, b]."""
        j, stop = self.band.across(i)
        down = self._width - 1 if self._by_j else self._width
        first = (i + j) * self._width + (self.band.m - j if self._by_j else i)
        return self._all.as_strided((stop - j, self._rows), (down * self._rows, 1), first * self._rows)


def _scales(values: Tensor, old: Tensor, *, leftward: bool) -> Tensor:
    """Return new exponents [i, b] for ``values`` whose exponents were ``old``; a value of 0 takes its neighbour's."""
    slope = _SLOPE * torch.arange(len(values), device=values.device, dtype=values.dtype)[:, None]
    slope = slope.flip(0) if leftward else slope
    found = values.log2().floor_().add_(old).add_(slope)  # log 0 is minus infinity, which the maximum ignores
    found = found.flip(0).cummax(0).values.flip(0) if leftward else found.cummax(0).values
    return found.sub_(slope).nan_to_num_(neginf=0.0)


def _power(exponent: Tensor) -> Tensor:
    """Return 2 to the power ``exponent``, clamped."""
    return exponent.clamp(-_MOST, _MOST).exp2_()


class Sweep:
    """The forward-backward algorithm on a batch of pairs of a clean and a noisy string.

    Call :meth:`forward`, then :meth:`backward`.

    ``survive``, ``vanish``, ``replace`` and ``birth`` are the transition probabilities of :class:`Links`. Let A(i, j)
    be the total probability of the alignments of the first i clean tokens with the first j noisy tokens in which no
    further birth follows noisy token j, divided by the frequencies of these noisy tokens among born tokens. Then
    A(i, j) = vanish A(i-1, j) + birth A(i, j-1) + [(1 - birth) e(i, j) - birth vanish] A(i-1, j-1).

    Here e(i, j) is ``replace``, plus ``survive`` divided by the frequency of noisy token j if clean token i equals it.
    The term -birth vanish corrects a double count: if clean token i vanishes and noisy token j is born, both of the
    first two terms contain the pair. Since birth vanish A(i-1, j-1) is at most as large as either of them, there is no
    cancellation. The total probability of all alignments of the remaining tokens obeys the same recursion in reverse.

    Args:
        clean: Clean tokens, float64 [n, b], minus infinity at padding.
        noisy: Noisy tokens, float64 [m, b], plus infinity at padding.
        weight: 1 / frequency of each noisy token, float64 [m, b].
        links: Transition probabilities of each pair.
        ends: (Number of clean tokens, number of noisy tokens) of each pair.
        cells: The table to fill.
        births: False if ``links.birth`` and ``links.replace`` are 0.
    """

    def __init__(
        self,
        clean: Tensor,
        noisy: Tensor,
        weight: Tensor,
        links: Links,
        ends: list[tuple[int, int]],
        cells: Cells,
        *,
        births: bool,
    ) -> None:
        self.cells, self.ends, self.births = cells, ends, births
        self.n, self.m, b = cells.band.n, cells.band.m, len(ends)
        self.start, self.survive, self.vanish = 1 - links.birth, links.survive, links.vanish.clamp(min=1e-30)
        self.share = links.birth / self.start
        # Lanes are vectors over i, stored at index i + 1. ``sums`` has A of the last two diagonals in turn; ``moved``
        # has vanish A at the index where the next diagonal uses it, i + 1 (backward: i - 1), in the scale of that
        # index. The weight of a step along both strings is therefore the bracket of the recursion divided by vanish
        self.lanes = weight.new_zeros(11, self.n + 3, b)
        self.clean, birth, other, self.fall, _, *rest = self.lanes.unbind(0)
        self.sums, self.moved, (self.inner, self.outer) = rest[:2], rest[2:4], rest[4:]
        ratio = self.start / self.vanish
        birth.copy_(links.birth)
        other.copy_(ratio * links.replace - links.birth)
        # the padding of one string equals nothing in the other; noisy token j is at index m - j + 1
        self.clean.fill_(-math.inf)
        self.clean[2:-1] = clean
        self.noisy = weight.new_full((self.m + 2, b), math.inf)
        self.noisy[1:-1] = noisy.flip(0)
        self.match = torch.zeros_like(self.noisy)
        self.match[1:-1] = weight.flip(0) * (ratio * links.survive)
        self.exponents: list[Tensor] = []
        self.total = torch.zeros_like(self.start)

    def _recur(self, lanes: Sequence[Tensor], along: slice, turn: int, into: Tensor) -> Tensor:
        """Compute the next diagonal: return its lane of A, and write vanish A to ``into``."""
        clean, birth, other, fall, work, *rings = lanes
        found, last, before, came = rings[turn], rings[1 - turn], rings[2 + turn], rings[3 - turn]
        torch.eq(clean, self.noisy[along], out=work)
        if self.births:
            torch.addcmul(other, work, self.match[along], out=work)
            torch.addcmul(came, birth, last, out=found)
            found.addcmul_(work, before)
        else:
            torch.addcmul(came, work.mul_(self.match[along]), before, out=found)
        torch.mul(fall, found, out=into)
        return found

    def forward(self) -> Tensor:
        """Fill the table with A(i, j), and return the log-likelihood of each pair.

        Returns:
            log p(x | x0) of noisy string x and clean string x0, minus the sum of the log-frequencies of the tokens of
            x, nats, float64 [b].
        """
        self.fall.copy_(self.vanish)
        self.sums[0][1] = self.start
        self.moved[0][2] = self.start * self.vanish
        self.cells.along(0).copy_(self.start[None])
        scale = torch.zeros_like(self.fall)
        self.exponents, edge, lanes = [scale], 0, self.lanes[:9]
        for k in range(1, self.n + self.m + 1):
            turn = k % 2
            lo, hi = self.cells.band.along(k)
            if k % _RENEWED == 0:
                scale = self._renew_forward(k, scale)
                self.exponents.append(scale)
            if 0 < lo == edge:
                self.moved[1 - turn][lo + 1] = 0.0  # it lies outside the band
            along = slice(self.m - k + lo + 1, self.m - k + hi + 1)
            into = self.moved[turn][lo + 2 : hi + 2]
            found = self._recur(lanes[:, lo + 1 : hi + 1].unbind(0), along, turn, into)
            self.cells.along(k).copy_(found)
            edge = lo
        reached = [
            self.cells.along(i + j)[i - self.cells.band.along(i + j)[0], r] for r, (i, j) in enumerate(self.ends)
        ]
        height = [self.exponents[(i + j) // _RENEWED][i + 1, r] for r, (i, j) in enumerate(self.ends)]
        self.total = torch.stack(reached).log2() + torch.stack(height)
        return self.total * math.log(2)

    def _renew_forward(self, k: int, scale: Tensor) -> Tensor:
        """Return new exponents for diagonals k to k + 31."""
        last = self.sums[1 - k % 2]
        (start, _), (low, _) = self.cells.band.along(k - 2), self.cells.band.along(k - 1)
        start, stop = start + 1, min(self.n + 3, self.cells.band.along(k)[1] + _RENEWED + 2)
        last[start : low + 1] = 0.0
        return self._rescale(scale, start, stop, leftward=False)

    def _rescale(self, scale: Tensor, start: int, stop: int, *, leftward: bool) -> Tensor:
        """Return new exponents between ``start`` and ``stop``, and bring the last two diagonals to them."""
        new, at = scale.clone(), slice(start, stop)
        new[at] = _scales(torch.maximum(self.sums[0][at], self.sums[1][at]), scale[at], leftward=leftward)
        change = _power(scale[at] - new[at])
        of, to = slice(start, stop - 1), slice(start + 1, stop)
        of, to = (to, of) if leftward else (of, to)
        torch.mul(_power(new[of] - new[to]), self.vanish, out=self.fall[of])
        for kept, moved in zip(self.sums, self.moved, strict=True):
            kept[at].mul_(change)
            torch.mul(self.fall[of], kept[of], out=moved[to])
        return new

    def backward(self) -> Tensor:
        """Overwrite each cell (i, j) of the table with p(x') / p(x), and return probabilities of births.

        x' is the noisy string x with clean token i + 1, as a survivor, inserted after noisy token j (tokens are counted
        from 1). p(x') is the total probability of the alignments that match the inserted token with clean token i + 1.

        Returns:
            Probability that each noisy token was born, and is not a surviving clean token, float64 [b, m].
        """
        # The probability of a birth follows from a normalisation. An alignment that has used i clean and j noisy tokens
        # is open if it can still be followed by a birth in gap j. Every alignment is open in gap j at exactly one i, so
        # the products of forward and backward sums of the open alignments, summed over i, are p(x | x0)
        for lane in (*self.sums, *self.moved):
            lane.zero_()
        self.clean[:-1] = self.clean[1:].clone()  # steps go to i + 1
        self.fall.copy_(self.vanish)
        entries: dict[int, list[tuple[int, int]]] = {}
        for r, (i, j) in enumerate(self.ends):
            entries.setdefault(i + j, []).append((i, r))
        born = torch.zeros_like(self.noisy[1:])  # at index m - j
        scale, edge = torch.zeros_like(self.fall), 0
        for k in range(self.n + self.m, -1, -1):
            turn = k % 2
            lo, hi = self.cells.band.along(k)
            if k == self.n + self.m or k % _RENEWED == _RENEWED - 1:
                scale = self._renew_backward(k, scale)
            if edge == hi <= self.n:
                self.moved[1 - turn][hi] = 0.0  # it lies outside the band
            *lanes, inner, outer = self.lanes[:, lo + 1 : hi + 1].unbind(0)
            work, rings, ways = lanes[4], lanes[5:], self.cells.along(k)
            last, before, came = rings[1 - turn], rings[2 + turn], rings[3 - turn]
            along = slice(self.m - k + lo, self.m - k + hi)
            if self.births:
                # open cells of gap j before a birth: the closed ones, less those reached by a vanished token
                born[along].addcmul_(torch.sub(last, before, out=work).mul_(ways), outer)
            ways.mul_(came).mul_(inner)
            found = self._recur(lanes, along, turn, self.moved[turn][lo:hi])
            for i, r in entries.get(k, ()):
                found[i - lo, r] = self.start[r]
                self.moved[turn][i, r] = self.start[r] * self.fall[i + 1, r]
            edge = hi
        return (self.share * born.flip(0)[: self.m]).T.clamp(min=0.0)

    def _renew_backward(self, k: int, scale: Tensor) -> Tensor:
        """Return new exponents for diagonals k to k - 31.

        Also sets the factors whose product with a forward and a backward cell is a probability.
        """
        band, new = self.cells.band, scale
        start, stop = max(0, band.along(k)[0] - _RENEWED), self.n + 3
        if k < self.n + self.m - 1:
            stop = band.along(k + 2)[1] + 1
            self.sums[1 - k % 2][band.along(k + 1)[1] + 1 : stop] = 0.0
            new = self._rescale(scale, start, stop, leftward=True)
        at = slice(start, stop)
        self.outer[at] = _power(self.exponents[k // _RENEWED][at] - self.total + new[at])
        torch.mul(self.outer[at], self.survive / self.vanish, out=self.inner[at])
        return new
