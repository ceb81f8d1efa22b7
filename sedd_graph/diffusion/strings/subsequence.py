"""Counts and averages over the ways in which a noisy string is a subsequence of its clean string, in time O(n m).

Each way is called an embedding: it maps the noisy tokens in order to clean tokens that are equal; a mask in the noisy
string may map to any clean token. Counts are stored as logarithms, since n choose m embeddings are possible. Axes: b
rows, n clean tokens, m noisy tokens (both padded).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Embeddings", "embed"]

_CELLS = 2**25
"""Table cells in memory at a time, over all rows."""
NONE = -1e30
"""Finite substitute for log 0."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Counts and averages over all embeddings of each noisy string in its clean string.

    An embedding is a way in which the noisy string is a subsequence of the clean string; a mask matches any token.

    Attributes:
        log_count: float64 [b], the log of the number of embeddings.
        missing: float64 [b, m + 1]. Entry j is the mean over embeddings of the number of clean tokens that are missing
            behind the first j noisy tokens and before the next noisy token.
        stands: float32 [b, n, m]. Entry (i, j) is the fraction of embeddings that map noisy token j to clean token i.
    """

    log_count: Tensor
    missing: Tensor
    stands: Tensor


@torch.no_grad()
def embed(fits: Tensor, clean_lengths: Tensor, noisy_lengths: Tensor) -> Embeddings:
    """Return counts and averages over all embeddings of each noisy string in its clean string.

    An embedding is a way in which the noisy string is a subsequence of the clean string.

    Args:
        fits: bool [b, n, m]. Entry (i, j) is True where noisy token j can be clean token i: the tokens are equal, or
            noisy token j is a mask.
        clean_lengths: Number of clean tokens, int64 [b]; the rest is padding.
        noisy_lengths: Number of noisy tokens, int64 [b]; the rest is padding.
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
