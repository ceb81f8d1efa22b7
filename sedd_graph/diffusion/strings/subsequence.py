"""Ways in which a string with masks is a subsequence of the clean string: counts and averages over all of them, in O(n m).

A mask matches any token. Counts are kept as logarithms, since there are up to C(n, m) ways. Axes: b rows, n clean tokens, m noisy
tokens (both padded).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Embeddings", "embed"]

_CELLS = 2**25
"""Cells of the tables held in memory at a time, over all rows."""
NONE = -1e30
"""Finite stand-in for log 0."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Counts and averages over all ways in which a noisy string is a subsequence of the clean one.

    Attributes:
        log_count: float64 [b], the log of the number of ways.
        missing: float64 [b, m + 1], the mean number of clean tokens in each gap of the noisy string.
        stands: float32 [b, n, m], the share of ways in which clean token i is noisy token j.
    """

    log_count: Tensor
    missing: Tensor
    stands: Tensor


@torch.no_grad()
def embed(fits: Tensor, clean_lengths: Tensor, noisy_lengths: Tensor) -> Embeddings:
    """Count and average over all ways in which each noisy string is a subsequence of its clean string.

    Args:
        fits: bool [b, n, m], True where clean token i can be noisy token j.
        clean_lengths: int64 [b], the number of clean tokens; the rest is padding.
        noisy_lengths: int64 [b], the number of noisy tokens; the rest is padding.
    """
    b, n, m = fits.shape
    size = max(1, _CELLS // ((n + 1) * (m + 1)))
    parts = [
        _sweep(fits[i : i + size], clean_lengths[i : i + size], noisy_lengths[i : i + size]) for i in range(0, b, size)
    ]
    return Embeddings(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Embeddings)))


def _sweep(fits: Tensor, clean_lengths: Tensor, noisy_lengths: Tensor) -> Embeddings:
    b, n, m = fits.shape
    device = fits.device
    real = torch.arange(n, device=device) < clean_lengths[:, None]
    there = torch.arange(m, device=device) < noisy_lengths[:, None]
    # clean padding is skipped like a missing token
    step = torch.where(fits & real[..., None] & there[:, None], 0.0, NONE).double()
    before = torch.full((n + 1, b, m + 1), NONE, dtype=torch.float64, device=device)
    before[0, :, 0] = 0.0
    for i in range(n):
        torch.logaddexp(before[i, :, 1:], before[i, :, :-1] + step[:, i], out=before[i + 1, :, 1:])
        before[i + 1, :, 0] = before[i, :, 0]
    total = before[n].gather(1, noisy_lengths[:, None])
    after = F.one_hot(noisy_lengths, m + 1).double().log().clamp(min=NONE)
    missing = torch.zeros(b, m + 1, dtype=torch.float64, device=device)
    stands = torch.empty(b, n, m, device=device)
    for i in range(n - 1, -1, -1):
        missing += (before[i] + after - total).exp() * real[:, i : i + 1]
        taken = step[:, i] + after[:, 1:]
        stands[:, i] = (before[i, :, :-1] + taken - total).float().exp()
        after = torch.cat([torch.logaddexp(after[:, :-1], taken), after[:, -1:]], 1)
    return Embeddings(total[:, 0], missing, stands)
