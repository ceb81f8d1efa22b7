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

import torch
from torch import Tensor

__all__ = ["Alignment", "Links", "align"]

_RENEWED = 32
"""Diagonals between two renewals of the scales."""
_SLOPE = 16.0
"""A scale falls by at most this many powers of two from one i to the next: 32 diagonals can then not overflow."""
_MOST = 1000.0
_CHUNK = 2**15
"""Cells of a diagonal at a time, of all rows: enough for the work to outweigh the calls, few enough to stay in cache."""


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

    ``log_p`` [b]: log p(x | x0), nats. ``missing`` [b, s, m + 1]: p(x with clean token i put in after j tokens, as that
    token itself) / p(x), summed over the tokens i of one symbol. ``fresh`` [b, m + 1]: the same for a new token, without
    the factor of its frequency. ``spurious`` [b, m]: the chance that token j is one that was born behind another.
    """

    log_p: Tensor
    missing: Tensor
    fresh: Tensor
    spurious: Tensor


def _scales(values: Tensor, old: Tensor, *, leftward: bool) -> Tensor:
    """New exponents [n + 3, b] for ``values`` at exponents ``old``; what is 0 takes its neighbour's."""
    slope = _SLOPE * torch.arange(len(values), device=values.device, dtype=values.dtype)[:, None]
    slope = slope.flip(0) if leftward else slope
    found = values.log2().floor_().add_(old).add_(slope)  # log 0 is minus infinity, which no maximum takes
    found = found.flip(0).cummax(0).values.flip(0) if leftward else found.cummax(0).values
    return found.sub_(slope).nan_to_num_(neginf=0.0)


def _power(exponent: Tensor) -> Tensor:
    return exponent.clamp(-_MOST, _MOST).exp2_()


class _Table:
    """The geometry of the anti-diagonals, and the weight of a step from (i - 1, j - 1) to (i, j).

    With A(i, j) the sum over all ways to come to (i, j) and to have done with it, and e(i, j) the chance that token i
    becomes token j, A(i, j) = vanish A(i-1, j) + birth A(i, j-1) + [(1 - birth) e(i, j) - birth vanish] A(i-1, j-1): births
    behind a token that has vanished are those behind the one before. The sum over all ways to go on from (i, j) obeys
    the same, read backward, so one recursion does for both. (A is at least vanish A(i-1, j) and birth A(i, j-1), so that the
    difference loses nothing.)

    Without births, j can be no more than i, nor can more tokens be gone by then than are gone in the end: ``most`` is that
    number, and cells beyond are left out.
    """

    def __init__(self, clean: Tensor, noisy: Tensor, weight: Tensor, links: Links, most: int | None) -> None:
        b, self.n = clean.shape
        self.m, self.most = noisy.shape[1], most
        edge = weight.new_full((1, b), -math.inf)
        # index i + 1 holds clean token i (from 1), index m - j + 1 noisy token j: along a diagonal both are slices; beyond
        # the ends there is something that is equal to nothing
        self._clean = torch.cat([edge, edge, clean.T.double(), edge])
        self._noisy = torch.cat([-edge, noisy.T.double().flip(0), -edge])
        size = self.n + 3
        stop = 1 - links.birth
        self.birth, self.vanish = (x.expand(size, b).contiguous() for x in (links.birth, links.vanish))
        self._other = (stop * links.replace - links.birth * links.vanish).expand(size, b).contiguous()
        zero = torch.zeros_like(edge)
        self._match = torch.cat([zero, weight.T.flip(0) * (stop * links.survive), zero])
        self._work = torch.empty_like(self.birth)

    def band(self, k: int) -> tuple[int, int]:
        """The i of diagonal k: from the first to one past the last."""
        if self.most is None:
            return max(0, k - self.m), min(self.n, k) + 1
        return max(k - self.m, (k + 1) // 2), min(self.n, k, (k + self.most) // 2) + 1

    def gaps(self, i: int) -> tuple[int, int]:
        """The j of the cells (i, j): from the first to one past the last."""
        if self.most is None:
            return 0, self.m + 1
        return max(0, i - self.most), min(self.m, i) + 1

    def weight(self, k: int, lo: int, hi: int) -> Tensor:
        """Of the steps to cells (i, k - i), lo <= i < hi, [hi - lo, b]; good until the next call."""
        along = slice(self.m - k + lo + 1, self.m - k + hi + 1)
        same = self._work[lo:hi]
        torch.eq(self._clean[lo + 1 : hi + 1], self._noisy[along], out=same)
        return torch.addcmul(self._other[lo:hi], same, self._match[along], out=same)


class _Store:
    """Memory for the cells of the diagonals, [k, min(n, m) + 1, b]."""

    def __init__(self, table: _Table, memory: Tensor) -> None:
        n, m, b = table.n, table.m, table.birth.shape[1]
        width = min(n, m) + 1
        self._table, self._by_j = table, m < n
        self._steps = (width * b, (width - 1) * b) if self._by_j else ((width + 1) * b, width * b)
        self._cells = memory[: (n + m + 1) * width * b].view(n + m + 1, width, b)
        self._diagonals = self._cells.unbind(0)

    def __getitem__(self, k: int) -> Tensor:
        """Cells (i, k - i) in their band, [i, b]."""
        lo, hi = self._table.band(k)
        shift = self._table.m - k if self._by_j else 0
        return self._diagonals[k][lo + shift : hi + shift]

    def across(self, i: int) -> Tensor:
        """Cells (i, j) in their band, [j, b]."""
        start, stop = self._table.gaps(i)
        first = self._steps[0] * i + self._steps[1] * start + (self._table.m * self._cells.shape[2] if self._by_j else 0)
        return self._cells.as_strided(
            (stop - start, self._cells.shape[2]), (self._steps[1], 1), self._cells.storage_offset() + first
        )


@torch.no_grad()
def align(
    clean: Tensor,
    clean_lengths: Tensor,
    noisy: Tensor,
    noisy_lengths: Tensor,
    frequency: Tensor | None,
    links: Links,
    symbols: Tensor | None = None,
) -> Alignment:
    """Align ``noisy`` int64 [b, m] with ``clean`` [b, n], of which the first ``lengths`` [b] count.

    ``frequency`` float64 [b, m] is the chance of a new token to be the noisy one; None where there are no births (and
    the links have no ``birth`` and no ``replace``). ``symbols`` int64 [b, n] numbers the symbols that clean tokens are of,
    from 0; every token is its own where None.
    """
    b, n = clean.shape
    m = noisy.shape[1]
    device = clean.device
    symbols = torch.arange(n, device=device).expand(b, n) if symbols is None else symbols
    count = int(symbols.max()) + 1 if symbols.numel() else 0
    real = torch.arange(m, device=device) < noisy_lengths[:, None]
    # everything is divided by the frequencies of the noisy tokens: a new token counts 1, a survivor 1/frequency
    law = torch.ones_like(real, dtype=torch.float64) if frequency is None else frequency.double().where(real, 1.0)
    # padding is no token: it is matched by nothing
    clean = torch.where(torch.arange(n, device=device) < clean_lengths[:, None], clean, -(2**30))
    noisy = torch.where(real, noisy, -(2**30) - 1)

    log_p = law.new_empty(b)
    missing, after = law.new_zeros(b, count, m + 1), law.new_zeros(b, m)
    order = noisy_lengths.argsort()
    sizes = torch.stack([clean_lengths, noisy_lengths])[:, order].tolist()
    memory = law.new_empty(0)
    stop = b
    while stop > 0:  # the longest first, so that their memory does for all
        high = sizes[1][stop - 1]
        start = max(0, stop - max(1, _CHUNK // (min(n, high) + 1)))
        rows, long = order[start:stop], max(sizes[0][start:stop])
        gone = [i - j for i, j in zip(sizes[0][start:stop], sizes[1][start:stop], strict=True)]
        most = max(gone) if frequency is None and min(gone) >= 0 else None
        own = Links(*(getattr(links, f.name)[rows] for f in dataclasses.fields(links)))
        table = _Table(clean[rows, :long], noisy[rows, :high], 1 / law[rows, :high], own, most)
        needed = (long + high + 1) * (min(long, high) + 1) * len(rows)
        memory = memory if len(memory) >= needed else law.new_empty(needed)
        store = _Store(table, memory)
        ends = list(zip(sizes[0][start:stop], sizes[1][start:stop], strict=True))
        log_p[rows], found = _sweep(table, store, ends, own, births=frequency is not None)
        if found is not None:
            after[rows, :high] = found
        flat, index = missing.view(b * count, m + 1), (rows * count + symbols[rows].T)
        for i in range(long):
            flat[:, slice(*table.gaps(i))].index_add_(0, index[i], store.across(i).contiguous().T)
        stop = start
    fresh = links.birth[:, None].expand(b, m + 1)
    if frequency is not None:
        fresh = fresh + (links.replace / links.survive)[:, None] * missing.sum(1)
    gaps = torch.arange(m + 1, device=device) <= noisy_lengths[:, None]
    return Alignment(log_p + law.log().sum(-1), missing, torch.where(gaps, fresh, 0.0), after)


def _sweep(
    table: _Table, store: _Store, ends: list[tuple[int, int]], links: Links, *, births: bool
) -> tuple[Tensor, Tensor | None]:
    """log p(x | x0) without the frequencies, [b], and with ``births`` the chances [b, m] that tokens were born.

    ``ends`` are the lengths of each pair. Cell (i, j) of ``store`` becomes p(x with clean token i + 1 put in after j) / p(x).
    Every path meets each gap once with births still open, so the sums over open cells of one gap are p(x | x0) itself.

    Index i + 1 of every array stands for i. Of the last two diagonals there is ``here`` and ``one``, the cells as they are,
    and ``came`` and ``before``, the same moved to the next i, at its scale.
    """
    n, m, last = table.n, table.m, table.n + table.m
    birth, vanish = table.birth, table.vanish
    start = 1 - links.birth

    here, one, came, before = (torch.zeros_like(birth) for _ in range(4))
    one[1] = start
    store[0].copy_(one[1:2])
    came[2] = start
    scale, step = torch.zeros_like(birth), torch.ones_like(birth)
    exponents = [scale]
    for k in range(1, last + 1):
        if k % _RENEWED == 0:
            new = _scales(torch.maximum(one, here), scale, leftward=False)
            change = _power(scale - new)
            one.mul_(change)
            here.mul_(change)
            step[1:] = _power(new[:-1] - new[1:])
            torch.mul(step[1:], one[:-1], out=came[1:])
            torch.mul(step[1:], here[:-1], out=before[1:])
            scale = new
            exponents.append(new)
        lo, hi = table.band(k)
        at, to = slice(lo + 1, hi + 1), slice(lo + 2, hi + 2)
        found = here[at]
        torch.mul(vanish[at], came[at], out=found)
        found.addcmul_(table.weight(k, lo, hi), before[at])
        if births:
            found.addcmul_(birth[at], one[at])
        torch.mul(step[to], found, out=before[to])
        if lo:
            here[lo - 1 : lo + 1] = 0.0
            before[lo + 1] = 0.0
        store[k].copy_(found)
        here, one, came, before = one, here, before, came
    stacked = torch.stack(exponents)
    reached = [store[i + j][i - table.band(i + j)[0], r] for r, (i, j) in enumerate(ends)]
    height = [stacked[(i + j) // _RENEWED, i + 1, r] for r, (i, j) in enumerate(ends)]
    total = torch.stack(reached).log2() + torch.stack(height)

    # backward, from the end of each pair
    for kept in (here, one, came, before):
        kept.zero_()
    gathered = birth.new_zeros(m + 1, birth.shape[1])  # by m - j
    entries: dict[int, list[tuple[int, int]]] = {}
    for r, (i, j) in enumerate(ends):
        entries.setdefault(i + j, []).append((r, i))
    scale, fed = torch.zeros_like(scale), torch.empty_like(scale)
    step, inner, outer = torch.ones_like(scale), scale, scale
    for k in range(last, -1, -1):
        if k == last or k % _RENEWED == _RENEWED - 1:
            new = _scales(torch.maximum(one, here), scale, leftward=True)
            change = _power(scale - new)
            one.mul_(change)
            here.mul_(change)
            step[:-1] = _power(new[1:] - new[:-1])
            torch.mul(step[:-1], one[1:], out=came[:-1])
            torch.mul(step[:-1], here[1:], out=before[:-1])
            scale = new
            # what turns a cell of the forward table times one of the backward one into a chance
            outer = _power(stacked[k // _RENEWED] - total + scale)
            inner = outer * links.survive
        lo, hi = table.band(k)
        at, to = slice(lo + 1, hi + 1), slice(lo, hi)
        forward, found = store[k], here[at]
        if births:
            # open cells of gap j before a birth: all that are done with, less those that came by a vanished token
            torch.addcmul(one[at], vanish[at], before[at], value=-1, out=fed[at])
            gathered[m - k + lo : m - k + hi].addcmul_(fed[at].mul_(forward), outer[at])
        torch.mul(vanish[at], came[at], out=found)
        found.addcmul_(table.weight(k + 2, lo + 1, hi + 1), before[at])
        if births:
            found.addcmul_(birth[at], one[at])
        for r, i in entries.get(k, ()):
            here[i + 1, r] = start[r]
        forward.mul_(came[at]).mul_(inner[at])
        torch.mul(step[to], found, out=before[to])
        here[hi + 1 : hi + 3] = 0.0
        before[hi] = 0.0
        here, one, came, before = one, here, before, came
    share = links.birth / (1 - links.birth)
    return total * math.log(2), (share * gathered.flip(0)[:m]).T.clamp(min=0.0) if births else None
