"""How likely a string is to have come from another by deletions and insertions: a pair hidden Markov model, in O(n m).

The strings of a batch are aligned at once, along anti-diagonals: cell (i, j) of the table stands for the first i tokens of
the clean string and the first j of the noisy one, and all cells with i + j = k are computed together. Values span
thousands of orders of magnitude; each i keeps a power of two of its own, renewed every few diagonals, so that sums are
those of floating-point numbers and no logarithm is taken of a cell.

Axes: b rows, n clean tokens, m noisy tokens (both padded), k diagonals.
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
_CHUNK = 2**14
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

    ``log_p`` [b]: log p(x | x0), nats. ``missing`` [b, n, m + 1]: p(x with clean token i put in after j tokens, as that
    token itself) / p(x). ``fresh`` [b, m + 1]: the same for a new token, without the factor of its frequency.
    ``spurious`` [b, m]: the chance that token j is one that was born behind another.
    """

    log_p: Tensor
    missing: Tensor
    fresh: Tensor
    spurious: Tensor


def _scales(values: Tensor, old: Tensor, *, leftward: bool) -> Tensor:
    """New exponents [b, n + 2] for ``values`` at exponents ``old``; what is 0 takes its neighbour's."""
    slope = _SLOPE * torch.arange(values.shape[1], device=values.device, dtype=values.dtype)
    slope = slope.flip(0) if leftward else slope
    found = old + torch.floor(torch.log2(values)) + slope  # log 0 is minus infinity, which no maximum takes
    found = found.flip(1).cummax(1).values.flip(1) if leftward else found.cummax(1).values
    return (found - slope).nan_to_num(neginf=0.0)


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.clamp(-_MOST, _MOST))


class _Table:
    """The geometry of the anti-diagonals, and the weight of a step from (i - 1, j - 1) to (i, j).

    With A(i, j) the sum over all ways to come to (i, j) and to have done with it, and e(i, j) the chance that token i
    becomes token j, A(i, j) = vanish A(i-1, j) + birth A(i, j-1) + [(1 - birth) e(i, j) - birth vanish] A(i-1, j-1): births
    behind a token that has vanished are those behind the one before. The sum over all ways to go on from (i, j) obeys
    the same, read backward, so one recursion does for both. (A is at least vanish A(i-1, j) and birth A(i, j-1), so that the
    difference loses nothing.)
    """

    def __init__(self, clean: Tensor, noisy: Tensor, weight: Tensor, links: Links) -> None:
        b, self.n = clean.shape
        self.m = noisy.shape[1]
        edge = clean.new_full((b, 1), torch.iinfo(clean.dtype).min)
        # index i holds clean token i (from 1), and index m - j noisy token j: along a diagonal both are slices
        self.clean = torch.cat([edge, clean], 1)
        self.noisy = torch.cat([noisy.flip(1), edge + 1], 1)
        stop = 1 - links.birth[:, None]
        self.other = stop * links.replace[:, None] - links.birth[:, None] * links.vanish[:, None]
        survive = stop * links.survive[:, None]
        self.match = torch.cat([weight.flip(1), weight.new_zeros(b, 1)], 1) * survive + self.other

    def band(self, k: int) -> tuple[int, int]:
        """The i of diagonal k: from the first to one past the last."""
        return max(0, k - self.m), min(self.n, k) + 1

    def weight(self, k: int, lo: int, hi: int) -> Tensor:
        """Of the steps to cells (i, k - i), lo <= i < hi, [b, hi - lo]."""
        along = slice(self.m - k + lo, self.m - k + hi)
        return torch.where(self.clean[:, lo:hi] == self.noisy[:, along], self.match[:, along], self.other)


@torch.no_grad()
def align(
    clean: Tensor, clean_lengths: Tensor, noisy: Tensor, noisy_lengths: Tensor, frequency: Tensor | None, links: Links
) -> Alignment:
    """Align ``noisy`` int64 [b, m] with ``clean`` [b, n], of which the first ``lengths`` [b] count.

    ``frequency`` float64 [b, m] is the chance of a new token to be the noisy one; None where there are no births (and
    the links have no ``birth`` and no ``replace``).
    """
    b, n = clean.shape
    m = noisy.shape[1]
    device = clean.device
    real = torch.arange(m, device=device) < noisy_lengths[:, None]
    # everything is divided by the frequencies of the noisy tokens: a new token counts 1, a survivor 1/frequency
    law = torch.where(real, 1.0 if frequency is None else frequency.double(), 1.0)
    # padding is no token: it is matched by nothing
    clean = torch.where(torch.arange(n, device=device) < clean_lengths[:, None], clean, -(2**30)).int()
    noisy = torch.where(real, noisy, -(2**30) - 1).int()

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device=device)

    log_p, missing, after = empty(b), empty(b, n, m + 1), empty(b, m)
    chunk = min(b, max(1, _CHUNK // (n + 1)))
    store = empty(chunk * (n + 1) * (m + 1))  # one for all chunks: memory is touched once
    for start in range(0, b, chunk):
        rows = slice(start, min(b, start + chunk))
        own = Links(*(getattr(links, f.name)[rows] for f in dataclasses.fields(links)))
        table = _Table(clean[rows], noisy[rows], 1 / law[rows], own)
        lengths = clean_lengths[rows], noisy_lengths[rows]
        out = missing[rows], after[rows] if frequency is not None else None
        log_p[rows] = _sweep(table, *lengths, own, store, *out)
    fresh = links.birth[:, None].expand(b, m + 1)
    if frequency is None:
        after.zero_()
    else:
        fresh = fresh + (links.replace / links.survive)[:, None] * missing.sum(1)
    gaps = torch.arange(m + 1, device=device) <= noisy_lengths[:, None]
    return Alignment(log_p + law.log().sum(-1), missing, torch.where(gaps, fresh, 0.0), after)


def _sweep(
    table: _Table,
    clean_lengths: Tensor,
    noisy_lengths: Tensor,
    links: Links,
    store: Tensor,
    missing: Tensor,
    after: Tensor | None,
) -> Tensor:
    """Fill ``missing`` [b, n, m + 1] and ``after`` [b, m]; returns log p(x | x0) without the frequencies, [b].

    Every path meets each gap once with births still open, so the sums over open cells of one gap are p(x | x0) itself.
    """
    n, m, last = table.n, table.m, table.n + table.m
    b, device = len(clean_lengths), clean_lengths.device
    birth, vanish = links.birth[:, None], links.vanish[:, None]
    rows = torch.arange(b, device=device)
    end = clean_lengths + noisy_lengths
    start = 1 - links.birth

    # forward; index 0 of a diagonal stands for i = -1, and is 0
    ring = [torch.zeros(b, n + 2, dtype=torch.float64, device=device) for _ in range(3)]
    ring[0][:, 1] = start
    diagonals = [store[:b].view(b, 1).copy_(start[:, None])]
    exponents = [torch.zeros_like(ring[0])]
    used = b
    step, fall = torch.ones_like(ring[0][:, 1:]), vanish.expand(b, n + 1)
    for k in range(1, last + 1):
        here, one, two = (ring[(k - back) % 3] for back in range(3))
        if k % _RENEWED == 0:
            new = _scales(torch.maximum(one, two), exponents[-1], leftward=False)
            change = _power(exponents[-1] - new)
            one.mul_(change)
            two.mul_(change)
            step = _power(new[:, :-1] - new[:, 1:])
            fall = vanish * step
            exponents.append(new)
        lo, hi = table.band(k)
        found = here[:, lo + 1 : hi + 1]
        torch.mul(fall[:, lo:hi], one[:, lo:hi], out=found)
        found.addcmul_(table.weight(k, lo, hi).mul_(step[:, lo:hi]), two[:, lo:hi])
        if after is not None:
            found.addcmul_(birth, one[:, lo + 1 : hi + 1])
        if lo:
            here[:, max(0, lo - 2) : lo + 1] = 0.0
        diagonals.append(store[used : used + b * (hi - lo)].view(b, hi - lo).copy_(found))
        used += b * (hi - lo)
    stacked = torch.stack(exponents)
    reached = torch.stack(
        [diagonals[k][r, i - table.band(k)[0]] for r, (k, i) in enumerate(_pairs(end, clean_lengths))]
    )
    total = torch.log2(reached) + stacked[end // _RENEWED, rows, clean_lengths + 1]

    # backward, from the end of each pair
    if after is not None:
        gathered = torch.zeros(b, m + 1, dtype=torch.float64, device=device)  # by m - j
    for kept in ring:
        kept.zero_()
    ends: dict[int, list[tuple[int, int]]] = {}
    for r, (k, i) in enumerate(_pairs(end, clean_lengths)):
        ends.setdefault(k, []).append((r, i))
    scale = inner = outer = torch.zeros_like(ring[0])
    step, fall = torch.ones_like(scale[:, 1:]), vanish.expand(b, n + 1)
    for k in range(last, -1, -1):
        here, one, two = (ring[(k + on) % 3] for on in range(3))
        if k == last or k % _RENEWED == _RENEWED - 1:
            new = _scales(torch.maximum(one, two), scale, leftward=True)
            change = _power(scale - new)
            one.mul_(change)
            two.mul_(change)
            scale = new
            step = _power(new[:, 1:] - new[:, :-1])
            fall = vanish * step
            there = stacked[k // _RENEWED][:, 1:] - total[:, None]
            # what turns cell i of the forward table times i + 1 (or i) of the backward one into a chance
            inner = _power(there[:, :-1] + scale[:, 1:-1]) * links.survive[:, None]
            outer = _power(there + scale[:, :-1])
        lo, hi = table.band(k)
        found, following, past = here[:, lo:hi], one[:, lo + 1 : hi + 1], two[:, lo + 1 : hi + 1]
        torch.mul(fall[:, lo:hi], following, out=found)
        first, top = max(lo, k + 1 - m), min(hi, n)
        if first < top:
            weight = table.weight(k + 2, first + 1, top + 1).mul_(step[:, first:top])
            here[:, first:top].addcmul_(weight, two[:, first + 1 : top + 1])
        if after is not None:
            on = one[:, lo:hi]
            found.addcmul_(birth, on)
            # open cells of gap j before a birth: all that are done with, less those that came by a vanished token
            fed = torch.addcmul(on, fall[:, lo:hi], past, value=-1).mul_(diagonals[k]).mul_(outer[:, lo:hi])
            gathered[:, m - k + lo : m - k + hi].add_(fed)
        for r, i in ends.get(k, ()):
            here[r, i] = start[r]
        if k < n:
            here[:, hi : hi + 3] = 0.0
        if lo < top:
            # cells (i, k - i) of `missing`, side by side
            place = missing.as_strided((b, top - lo), (n * (m + 1), m), missing.storage_offset() + lo * m + k)
            ways = diagonals[k][:, : top - lo] * following[:, : top - lo]
            torch.mul(ways, inner[:, lo:top], out=place)
    if after is not None:
        share = links.birth / (1 - links.birth)
        torch.mul(share[:, None], gathered.flip(1)[:, :m], out=after)
        after.clamp_(min=0.0)
    return total * math.log(2)


def _pairs(end: Tensor, lengths: Tensor) -> list[tuple[int, int]]:
    return list(zip(end.tolist(), lengths.tolist(), strict=True))
