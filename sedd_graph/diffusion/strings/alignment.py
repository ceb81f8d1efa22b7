"""How likely a string is to have come from another by deletions and insertions: a pair hidden Markov model, in O(n m).

The strings of a batch are aligned at once, along anti-diagonals: cell (i, j) of the table stands for the first i tokens of
the clean string and the first j of the noisy one, and all cells with i + j = k are computed together. Values span
thousands of orders of magnitude; each i keeps a power of two of its own, renewed every few diagonals, so that sums are
those of floating-point numbers and no logarithm is taken of a cell. Rows of like length go together; in memory the rows
of a cell are side by side, so that a piece of a diagonal is one piece of memory.

Axes: b rows, n clean tokens, m noisy tokens (both padded), k diagonals, s symbols.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Alignment", "Links", "Pairs", "align", "log_likelihood"]

_RENEWED = 32
"""Diagonals between two renewals of the scales."""
_SLOPE = 16.0
"""A scale falls by at most this many powers of two from one i to the next: 32 diagonals can then not overflow."""
_MOST = 1000.0
_CHUNK = 2**15
"""Cells of a diagonal at a time, of all rows: enough for the work to outweigh the calls, few enough to stay in cache."""
_CELLS = 2**26
"""Cells of whole tables at a time: half a gigabyte."""
_KEPT = threading.local()


@dataclasses.dataclass(frozen=True)
class Links:
    """What becomes of one token by the birth-death process, float64 [b] each (Thorne, Kishino and Felsenstein 1991).

    It survives (``survive``), dies without offspring (``vanish``), or leaves a first new token behind as it dies
    (``replace``); and every token that is there, the start included, is followed by one more new token with chance ``birth``.
    """

    survive: Tensor
    vanish: Tensor
    replace: Tensor
    birth: Tensor


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Sums over all ways in which the noisy string x can have come from the clean one, beside p(x | x0), float64.

    ``log_p`` [b]: log p(x | x0), nats. ``missing`` [b, n, m + 1]: p(x with clean token i put in after j tokens, as that
    token itself) / p(x), summed over the tokens i of one symbol. ``fresh`` [b, m + 1]: the same for a new token, without
    the factor of its frequency. ``spurious`` [b, m]: the chance that token j is one that was born behind another.
    """

    log_p: Tensor
    missing: Tensor
    fresh: Tensor
    spurious: Tensor


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Clean strings int64 [b, n] and noisy ones [b, m], of which the first ``lengths`` [b] tokens count, and what made them.

    ``frequency`` float64 [b, m] is the chance of a new token to be the noisy one; None where there are no births (and
    the links have no ``birth`` and no ``replace``).
    """

    clean: Tensor
    clean_lengths: Tensor
    noisy: Tensor
    noisy_lengths: Tensor
    frequency: Tensor | None
    links: Links

    @property
    def law(self) -> Tensor:
        """``frequency``, 1 where there is none, float64 [b, m]."""
        real = torch.arange(self.noisy.shape[1], device=self.noisy.device) < self.noisy_lengths[:, None]
        return torch.ones_like(real, dtype=torch.float64) if self.frequency is None else self.frequency.where(real, 1.0)


@torch.no_grad()
def log_likelihood(pairs: Pairs) -> Tensor:
    """log p(x | x0), nats, float64 [b]."""
    law = pairs.law
    found = law.log().sum(-1)
    for rows, sweep in _sweeps(pairs, law):
        found[rows] += sweep.forward()
    return found


@torch.no_grad()
def align(pairs: Pairs, *, symbols: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Alignment:
    """All there is to know of ``pairs``, with ``missing`` as ``dtype``.

    ``symbols`` int64 [b, n] numbers the symbols that clean tokens are of, from 0; every token is its own where None.
    """
    (b, n), m, law = pairs.clean.shape, pairs.noisy.shape[1], pairs.law
    symbols = torch.arange(n, device=law.device).expand(b, n) if symbols is None else symbols
    log_p, born = law.log().sum(-1), law.new_zeros(b, m)
    missing = torch.zeros(b, n, m + 1, dtype=dtype, device=law.device)
    flat = missing.view(b * n, m + 1)
    for rows, sweep in _sweeps(pairs, law):
        log_p[rows] += sweep.forward()
        born[rows, : sweep.m] = sweep.backward()
        into = symbols[rows].T + n * rows
        for i in range(sweep.n):
            ways = sweep.cells.across(i).to(dtype, copy=True).T.contiguous()
            flat[:, slice(*sweep.cells.band.across(i))].index_add_(0, into[i], ways)
    fresh, links = pairs.links.birth[:, None].expand(b, m + 1), pairs.links
    if pairs.frequency is not None:
        used = int(symbols.max()) + 1 if symbols.numel() else 0
        fresh = fresh + (links.replace / links.survive)[:, None] * missing[:, :used].sum(1)
    gaps = torch.arange(m + 1, device=law.device) <= pairs.noisy_lengths[:, None]
    return Alignment(log_p, missing, torch.where(gaps, fresh, 0.0), born)


def _sweeps(pairs: Pairs, law: Tensor) -> Iterator[tuple[Tensor, _Sweep]]:
    """Pairs of like length at a time: their rows int64, and what is to go over their table, which is good until the next.

    Everything is divided by the frequencies of the noisy tokens: a new token counts 1, a survivor 1/frequency.
    """
    order = pairs.noisy_lengths.argsort()
    lengths = list(zip(pairs.clean_lengths[order].tolist(), pairs.noisy_lengths[order].tolist(), strict=True))
    stop = len(order)
    while stop:  # the longest first: what memory they take does for all
        start = stop - _rows(max(i for i, _ in lengths[:stop]), lengths[stop - 1][1], stop)
        ends, rows = lengths[start:stop], order[start:stop]
        gone = [i - j for i, j in ends]
        births = pairs.frequency is not None
        band = _Band(max(i for i, _ in ends), ends[-1][1], max(gone) if not births and min(gone) >= 0 else None)
        links = Links(*(getattr(pairs.links, f.name)[rows] for f in dataclasses.fields(Links)))
        clean, noisy = (
            # padding is no token: it is matched by nothing
            tokens[rows, :size]
            .T.double()
            .masked_fill(torch.arange(size, device=law.device)[:, None] >= real[rows], edge)
            for tokens, real, size, edge in (
                (pairs.clean, pairs.clean_lengths, band.n, -math.inf),
                (pairs.noisy, pairs.noisy_lengths, band.m, math.inf),
            )
        )
        cells = _Cells(band, len(ends), law.device)
        yield rows, _Sweep(clean, noisy, 1 / law[rows, : band.m].T, links, ends, cells, births=births)
        stop = start


def _rows(n: int, m: int, most: int) -> int:
    """How many pairs to align at once, of ``most`` that are left: equal parts."""
    fit = max(1, min(_CHUNK // (min(n, m) + 1), _CELLS // ((n + 1) * (m + 1))))
    return math.ceil(most / max(1, round(most / fit)))


class _Band:
    """The cells (i, j), 0 <= i <= n and 0 <= j <= m, that are computed.

    Without births, j can be no more than i, nor can more tokens be gone by then than are gone in the end: ``most`` is that
    number (None with births), and cells beyond are left out.
    """

    def __init__(self, n: int, m: int, most: int | None) -> None:
        self.n, self.m, self.most = n, m, most

    def along(self, k: int) -> tuple[int, int]:
        """The i of diagonal k: from the first to one past the last. Neither falls, nor rises by more than 1, with k."""
        if self.most is None:
            return max(0, k - self.m), min(self.n, k) + 1
        return max(k - self.m, (k + 1) // 2), min(self.n, k, (k + self.most) // 2) + 1

    def across(self, i: int) -> tuple[int, int]:
        """The j of the cells (i, j): from the first to one past the last."""
        if self.most is None:
            return 0, self.m + 1
        return max(0, i - self.most), min(self.m, i) + 1


class _Cells:
    """The cells of all diagonals, ``rows`` pairs side by side: float64 [n + m + 1, min(n, m) + 1, b].

    Their memory is kept for the next table of this thread: to be given new memory costs more than the arithmetic.
    """

    def __init__(self, band: _Band, rows: int, device: torch.device) -> None:
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
        """Cells (i, k - i) of the band, [i, b]."""
        lo, hi = self.band.along(k)
        shift = self.band.m - k if self._by_j else 0
        return self._diagonals[k][lo + shift : hi + shift]

    def across(self, i: int) -> Tensor:
        """Cells (i, j) of the band, [j, b]."""
        j, stop = self.band.across(i)
        down = self._width - 1 if self._by_j else self._width
        first = (i + j) * self._width + (self.band.m - j if self._by_j else i)
        return self._all.as_strided((stop - j, self._rows), (down * self._rows, 1), first * self._rows)


def _scales(values: Tensor, old: Tensor, *, leftward: bool) -> Tensor:
    """New exponents [i, b] for ``values`` at exponents ``old``; what is 0 takes its neighbour's."""
    slope = _SLOPE * torch.arange(len(values), device=values.device, dtype=values.dtype)[:, None]
    slope = slope.flip(0) if leftward else slope
    found = values.log2().floor_().add_(old).add_(slope)  # log 0 is minus infinity, which no maximum takes
    found = found.flip(0).cummax(0).values.flip(0) if leftward else found.cummax(0).values
    return found.sub_(slope).nan_to_num_(neginf=0.0)


def _power(exponent: Tensor) -> Tensor:
    return exponent.clamp(-_MOST, _MOST).exp2_()


class _Sweep:
    """Diagonal by diagonal, forward and backward.

    With A(i, j) the sum over all ways to come to (i, j) and to have done with it, and e(i, j) the chance that token i
    becomes token j, A(i, j) = vanish A(i-1, j) + birth A(i, j-1) + [(1 - birth) e(i, j) - birth vanish] A(i-1, j-1): births
    behind a token that has vanished are those behind the one before. The sum over all ways to go on from (i, j) obeys
    the same, read backward, so one recursion does for both. (A is at least vanish A(i-1, j) and birth A(i, j-1), so that the
    difference loses nothing.)

    Index i + 1 of every lane stands for i. Of the last two diagonals, in turn, lanes ``sums`` hold A as it is, and lanes
    ``moved`` hold vanish A where it is needed next, at i + 1 (backward i - 1) and at the scale there. A step along both
    strings is then weighed by what stands in brackets over vanish. ``ends`` are the lengths of each pair.
    """

    def __init__(
        self,
        clean: Tensor,
        noisy: Tensor,
        weight: Tensor,
        links: Links,
        ends: list[tuple[int, int]],
        cells: _Cells,
        *,
        births: bool,
    ) -> None:
        self.cells, self.ends, self.births = cells, ends, births
        self.n, self.m, b = cells.band.n, cells.band.m, len(ends)
        self.start, self.survive, self.vanish = 1 - links.birth, links.survive, links.vanish.clamp(min=1e-30)
        self.share = links.birth / self.start
        self.lanes = weight.new_zeros(11, self.n + 3, b)
        self.clean, birth, other, self.fall, _, *rest = self.lanes.unbind(0)
        self.sums, self.moved, (self.inner, self.outer) = rest[:2], rest[2:4], rest[4:]
        ratio = self.start / self.vanish
        birth.copy_(links.birth)
        other.copy_(ratio * links.replace - links.birth)
        # beyond its ends each string has something that is equal to nothing; noisy token j is at m - j + 1
        self.clean.fill_(-math.inf)
        self.clean[2:-1] = clean
        self.noisy = weight.new_full((self.m + 2, b), math.inf)
        self.noisy[1:-1] = noisy.flip(0)
        self.match = torch.zeros_like(self.noisy)
        self.match[1:-1] = weight.flip(0) * (ratio * links.survive)
        self.exponents: list[Tensor] = []
        self.total = torch.zeros_like(self.start)

    def _recur(self, lanes: Sequence[Tensor], along: slice, turn: int, into: Tensor) -> Tensor:
        """The next diagonal: A in its lane, and vanish A ``into`` place."""
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
        """Fill the cells with A; log p(x | x0) without the frequencies, nats [b]."""
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
                self.moved[1 - turn][lo + 1] = 0.0  # from beyond the band
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
        """New exponents for what diagonals k to k + 31 are about."""
        here, last = self.sums[k % 2], self.sums[1 - k % 2]
        (start, _), (low, _) = self.cells.band.along(k - 2), self.cells.band.along(k - 1)
        start, stop = start + 1, min(self.n + 3, self.cells.band.along(k)[1] + _RENEWED + 2)
        last[start : low + 1] = 0.0
        new, at = scale.clone(), slice(start, stop)
        new[at] = _scales(torch.maximum(here[at], last[at]), scale[at], leftward=False)
        change = _power(scale[at] - new[at])
        of, to = slice(start, stop - 1), slice(start + 1, stop)
        torch.mul(_power(new[of] - new[to]), self.vanish, out=self.fall[of])
        for kept, moved in zip(self.sums, self.moved, strict=True):
            kept[at].mul_(change)
            torch.mul(self.fall[of], kept[of], out=moved[to])
        return new

    def backward(self) -> Tensor:
        """Make cell (i, j) p(x with clean token i + 1 put in after j) / p(x); the chances [b, m] that tokens were born.

        Every path meets each gap once with births still open, so the sums over open cells of one gap are p(x | x0) itself.
        """
        for lane in (*self.sums, *self.moved):
            lane.zero_()
        self.clean[:-1] = self.clean[1:].clone()  # steps go to i + 1
        self.fall.copy_(self.vanish)
        entries: dict[int, list[tuple[int, int]]] = {}
        for r, (i, j) in enumerate(self.ends):
            entries.setdefault(i + j, []).append((i, r))
        born = torch.zeros_like(self.noisy[1:])  # by m - j
        scale, edge = torch.zeros_like(self.fall), 0
        for k in range(self.n + self.m, -1, -1):
            turn = k % 2
            lo, hi = self.cells.band.along(k)
            if k == self.n + self.m or k % _RENEWED == _RENEWED - 1:
                scale = self._renew_backward(k, scale)
            if edge == hi <= self.n:
                self.moved[1 - turn][hi] = 0.0  # from beyond the band
            *lanes, inner, outer = self.lanes[:, lo + 1 : hi + 1].unbind(0)
            work, rings, ways = lanes[4], lanes[5:], self.cells.along(k)
            last, before, came = rings[1 - turn], rings[2 + turn], rings[3 - turn]
            along = slice(self.m - k + lo, self.m - k + hi)
            if self.births:
                # open cells of gap j before a birth: all that are done with, less those that came by a vanished token
                born[along].addcmul_(torch.sub(last, before, out=work).mul_(ways), outer)
            ways.mul_(came).mul_(inner)
            found = self._recur(lanes, along, turn, self.moved[turn][lo:hi])
            for i, r in entries.get(k, ()):
                found[i - lo, r] = self.start[r]
                self.moved[turn][i, r] = self.start[r] * self.fall[i + 1, r]
            edge = hi
        return (self.share * born.flip(0)[: self.m]).T.clamp(min=0.0)

    def _renew_backward(self, k: int, scale: Tensor) -> Tensor:
        """New exponents for what diagonals k to k - 31 are about, and what turns two cells at theirs into a chance."""
        band, new = self.cells.band, scale
        start, stop = max(0, band.along(k)[0] - _RENEWED), self.n + 3
        if k < self.n + self.m - 1:
            here, last = self.sums[k % 2], self.sums[1 - k % 2]
            stop = band.along(k + 2)[1] + 1
            last[band.along(k + 1)[1] + 1 : stop] = 0.0
            new, at = scale.clone(), slice(start, stop)
            new[at] = _scales(torch.maximum(here[at], last[at]), scale[at], leftward=True)
            change = _power(scale[at] - new[at])
            of, to = slice(start + 1, stop), slice(start, stop - 1)
            torch.mul(_power(new[of] - new[to]), self.vanish, out=self.fall[of])
            for kept, moved in zip(self.sums, self.moved, strict=True):
                kept[at].mul_(change)
                torch.mul(self.fall[of], kept[of], out=moved[to])
        at = slice(start, stop)
        self.outer[at] = _power(self.exponents[k // _RENEWED][at] - self.total + new[at])
        torch.mul(self.outer[at], self.survive / self.vanish, out=self.inner[at])
        return new
