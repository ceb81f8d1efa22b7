"""Probability that one string came from another by deletions and insertions: a pair hidden Markov model, in O(n m).

Pairs of similar length are aligned together (:mod:`.alignment_sweep`). Axes: b rows, n clean tokens, m noisy tokens (both padded).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_graph.diffusion.strings.alignment_sweep import Band, Cells, Links, Sweep

__all__ = ["Alignment", "Links", "Pairs", "align", "log_likelihood"]

_CHUNK = 2**15
"""Cells of a diagonal computed at a time, over all rows: enough to outweigh the calls, few enough to stay in cache."""
_CELLS = 2**26
"""Cells of whole tables at a time: half a gigabyte."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Sums over all alignments of a noisy string x with the clean string x0 that it came from.

    Attributes:
        log_p: float64 [b], log p(x | x0), nats.
        missing: [b, n, m + 1], p(x with clean token i inserted after j tokens, as that token itself) / p(x), summed over the clean
            tokens i of one symbol.
        fresh: float64 [b, m + 1], the same for a new token, without the factor of its frequency.
        spurious: float64 [b, m], the probability that token j was born behind another.
    """

    log_p: Tensor
    missing: Tensor
    fresh: Tensor
    spurious: Tensor


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a clean and a noisy string, and the process between them.

    Attributes:
        clean: int64 [b, n].
        clean_lengths: int64 [b], the number of clean tokens; the rest is padding.
        noisy: int64 [b, m].
        noisy_lengths: int64 [b].
        frequency: float64 [b, m], the probability that a new token is this noisy one; None without births (``links.birth`` and
            ``links.replace`` are then 0).
        links: Transition probabilities.
    """

    clean: Tensor
    clean_lengths: Tensor
    noisy: Tensor
    noisy_lengths: Tensor
    frequency: Tensor | None
    links: Links

    @property
    def weights(self) -> Tensor:
        """``frequency``, 1 without births and at padding, float64 [b, m]."""
        real = torch.arange(self.noisy.shape[1], device=self.noisy.device) < self.noisy_lengths[:, None]
        return torch.ones_like(real, dtype=torch.float64) if self.frequency is None else self.frequency.where(real, 1.0)


@torch.no_grad()
def log_likelihood(pairs: Pairs) -> Tensor:
    """Return log p(x | x0) by the forward sum of a pair hidden Markov model in O(n m), nats, float64 [b]."""
    found = pairs.weights.log().sum(-1)
    for rows, sweep in _sweeps(pairs):
        found[rows] += sweep.forward()
    return found


@torch.no_grad()
def align(pairs: Pairs, *, symbols: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Alignment:
    """Return the sums over all alignments of each pair, in O(n m).

    Args:
        pairs: b pairs.
        symbols: The symbol of each clean token, numbered from 0, int64 [b, n]; None: each token is a symbol of its own.
        dtype: Of ``missing``.
    """
    (b, n), m, device = pairs.clean.shape, pairs.noisy.shape[1], pairs.noisy.device
    symbols = torch.arange(n, device=device).expand(b, n) if symbols is None else symbols
    log_p, born = pairs.weights.log().sum(-1), torch.zeros(b, m, dtype=torch.float64, device=device)
    missing = torch.zeros(b, n, m + 1, dtype=dtype, device=device)
    flat = missing.view(b * n, m + 1)
    for rows, sweep in _sweeps(pairs):
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
    gaps = torch.arange(m + 1, device=device) <= pairs.noisy_lengths[:, None]
    return Alignment(log_p, missing, torch.where(gaps, fresh, 0.0), born)


def _sweeps(pairs: Pairs) -> Iterator[tuple[Tensor, Sweep]]:
    """Yield pairs of similar length, as row numbers int64 and their sweep; a sweep's table is valid until the next is yielded.

    All probabilities are divided by the frequencies of the noisy tokens: a new token counts 1, a survivor 1 / frequency.
    """
    weights, births = pairs.weights, pairs.frequency is not None
    order = pairs.noisy_lengths.argsort()
    lengths = list(zip(pairs.clean_lengths[order].tolist(), pairs.noisy_lengths[order].tolist(), strict=True))
    stop = len(order)
    while stop:  # the longest first, so that their memory serves all
        start = stop - _rows(max(i for i, _ in lengths[:stop]), lengths[stop - 1][1], stop)
        ends, rows = lengths[start:stop], order[start:stop]
        gone = [i - j for i, j in ends]
        band = Band(max(i for i, _ in ends), ends[-1][1], max(gone) if not births and min(gone) >= 0 else None)
        links = Links(*(getattr(pairs.links, f.name)[rows] for f in dataclasses.fields(Links)))
        clean = _lanes(pairs.clean[rows, : band.n], pairs.clean_lengths[rows], -math.inf)
        noisy = _lanes(pairs.noisy[rows, : band.m], pairs.noisy_lengths[rows], math.inf)
        cells = Cells(band, len(ends), weights.device)
        yield rows, Sweep(clean, noisy, 1 / weights[rows, : band.m].T, links, ends, cells, births=births)
        stop = start


def _lanes(tokens: Tensor, lengths: Tensor, padding: float) -> Tensor:
    """Return ``tokens`` [b, w] as float64 [w, b] with ``padding``, which equals no token, behind their ``lengths``."""
    beyond = torch.arange(tokens.shape[1], device=tokens.device)[:, None] >= lengths
    return tokens.T.double().masked_fill(beyond, padding)


def _rows(n: int, m: int, most: int) -> int:
    """Return how many of the ``most`` pairs that are left to align at once, in equal parts."""
    fit = max(1, min(_CHUNK // (min(n, m) + 1), _CELLS // ((n + 1) * (m + 1))))
    return math.ceil(most / max(1, round(most / fit)))
