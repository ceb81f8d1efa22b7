"""Alignment of noisy strings with their clean strings by a pair hidden Markov model of deletions and insertions.

Log-likelihoods and posterior expectations take time O(n m). Pairs of similar length are processed together
(:mod:`.alignment_sweep`). Axes: b rows (pairs), n clean tokens, m noisy tokens (both padded).
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
"""Table cells of one anti-diagonal computed at a time, over all rows.

The number is large enough to outweigh the overhead of each call, and small enough for the cache.
"""
_CELLS = 2**26
"""Table cells in memory at a time: half a gibibyte of float64."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Likelihood, likelihood ratios and birth probabilities of noisy strings x given their clean strings x0.

    Each token of x (m tokens) is either a token of x0 (n tokens) that survived, or was born, that is, inserted by
    noise. An alignment states which one it is. p(x) is short for p(x | x0), the sum over all alignments of x with x0.

    Attributes:
        log_p: float64 [b], log p(x | x0), nats.
        missing: [b, n, m + 1], dtype as requested from :func:`align`. Let x' be x with a copy of clean token i
            inserted after j tokens, and p_i(x') the sum over those alignments of x' in which the inserted token is
            clean token i, which survived. Entry (s, j) is the sum of p_i(x') / p(x) over all i whose symbol is s, by
            the argument ``symbols`` of :func:`align`.
        fresh: float64 [b, m + 1]. Let x' be x with any token inserted after j tokens, and q(x') the sum over those
            alignments of x' in which the inserted token was born. Entry j is q(x') / p(x), divided by the frequency of
            the token among born tokens; it is then the same for all tokens.
        spurious: float64 [b, m], the probability that noisy token j was born.
    """

    log_p: Tensor
    missing: Tensor
    fresh: Tensor
    spurious: Tensor


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a clean and a noisy string, with the transition probabilities of the process between them.

    Attributes:
        clean: Clean tokens, int64 [b, n].
        clean_lengths: Number of clean tokens, int64 [b]; the rest is padding.
        noisy: Noisy tokens, int64 [b, m].
        noisy_lengths: Number of noisy tokens, int64 [b]; the rest is padding.
        frequency: float64 [b, m], the probability that a newly born token equals this noisy token; None for a process
            without births (``links.birth`` and ``links.replace`` are then 0).
        links: Transition probabilities of each pair.
    """

    clean: Tensor
    clean_lengths: Tensor
    noisy: Tensor
    noisy_lengths: Tensor
    frequency: Tensor | None
    links: Links

    @property
    def weights(self) -> Tensor:
        """Frequency of each noisy token among newly born tokens, float64 [b, m]; 1 at padding and without births."""
        real = torch.arange(self.noisy.shape[1], device=self.noisy.device) < self.noisy_lengths[:, None]
        return torch.ones_like(real, dtype=torch.float64) if self.frequency is None else self.frequency.where(real, 1.0)


@torch.no_grad()
def log_likelihood(pairs: Pairs) -> Tensor:
    """Return log p(x | x0) of each pair by the forward algorithm of a pair hidden Markov model, in time O(n m).

    Args:
        pairs: Clean strings x0 and noisy strings x.

    Returns:
        Nats, float64 [b].
    """
    found = pairs.weights.log().sum(-1)
    for rows, sweep in _sweeps(pairs):
        found[rows] += sweep.forward()
    return found


@torch.no_grad()
def align(pairs: Pairs, *, symbols: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Alignment:
    """Return likelihoods, likelihood ratios and birth probabilities of pairs, summed over all their alignments.

    They are computed by the forward-backward algorithm of a pair hidden Markov model, in time O(n m).

    Args:
        pairs: Clean strings x0 and noisy strings x.
        symbols: int64 [b, n], groups of clean tokens over which :attr:`Alignment.missing` is summed: the number of each
            token's group, in [0, n). Copies of one token form a group if the numbers are indices of the distinct tokens
            of the string. None: each clean token is a group, numbered by its position.
        dtype: dtype of :attr:`Alignment.missing`.
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
    """Yield pairs of similar length as indices, int64, and a sweep; its table is valid until the next is yielded.

    All probabilities are divided by the frequencies of the noisy tokens: 1 for a born token, 1 / frequency for a
    survivor.
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
    """Return how many of the ``most`` pairs not yet aligned to align at once, so that batches have about equal size."""
    fit = max(1, min(_CHUNK // (min(n, m) + 1), _CELLS // ((n + 1) * (m + 1))))
    return math.ceil(most / max(1, round(most / fit)))
