"""Drawing states: the one place where categorical draws are made.

32-bit Gumbel races (and 32-bit inverse CDFs) lose rare classes and so lower the temperature silently (arXiv
2409.02908, section 5). Draws here are made in two stages: whether a position moves at all, then where to, each with
64-bit uniforms; the second only for positions that move.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["categorical", "going", "jump", "sharpen"]

_CHUNK = 2**24  # numbers held in float64 at a time


def categorical(weights: Tensor, *, generator: torch.Generator) -> Tensor:
    """int64 [...]: one draw from each row of non-negative ``weights`` [..., n], which need not sum to 1.

    A class of weight zero never comes out. A row that sums to zero or is not finite raises :class:`ValueError`.
    """
    flat = weights.reshape(-1, weights.shape[-1])
    out = torch.empty(flat.shape[0], dtype=torch.int64, device=weights.device)
    rows = max(1, _CHUNK // flat.shape[-1])
    for start in range(0, flat.shape[0], rows):
        cdf = flat[start : start + rows].double().cumsum(-1)
        total = cdf[:, -1:]
        if not bool(((total > 0) & total.isfinite()).all()):
            raise ValueError("categorical: a row of weights sums to zero or is not finite")
        u = torch.rand(cdf.shape[0], 1, generator=generator, device=cdf.device, dtype=torch.float64)
        # right=True: the first class whose cumulative weight exceeds u * total, so zero-weight classes are passed over
        out[start : start + rows] = torch.searchsorted(cdf, u * total * (1 - 2**-53), right=True)[:, 0]
    return out.reshape(weights.shape[:-1])


def going(move: Tensor, *, generator: torch.Generator) -> Tensor:
    """bool like ``move``: which positions move, each with its chance."""
    return torch.rand(move.shape, generator=generator, device=move.device, dtype=torch.float64) < move.double()


def jump(x: Tensor, move: Tensor, weights: Callable[[Tensor], Tensor], *, generator: torch.Generator) -> Tensor:
    """Move each position of ``x`` [b, l] with chance ``move`` [b, l] to a state drawn from its row of weights.

    ``weights`` is asked once, with the positions that move (bool [b, l]), for their rows [moving, n], which need not sum
    to 1.
    """
    moving = going(move, generator=generator)
    if not bool(moving.any()):
        return x
    out = x.clone()
    out[moving] = categorical(weights(moving), generator=generator)
    return out


def sharpen(weights: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """``weights`` [..., n] to the power 1/temperature (0: the greatest alone), then cut to the nucleus ``top_p``.

    The nucleus is the fewest greatest weights that hold ``top_p`` of the sum (arXiv 1904.09751). Rows that sum to zero
    stay so. Float64, not normalised.
    """
    weights = weights.double()
    if temperature == 0:
        best = weights.argmax(-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, best, weights.gather(-1, best))
    if temperature != 1:
        peak = weights.amax(-1, keepdim=True)
        weights = (weights / peak.clamp(min=1e-300)).pow(1 / temperature)
    if top_p < 1:
        ordered, order = weights.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < top_p * ordered.sum(-1, keepdim=True)
        weights = weights * torch.zeros_like(kept).scatter(-1, order, kept)
    return weights
