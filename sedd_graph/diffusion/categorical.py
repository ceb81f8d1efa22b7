"""Drawing states: the one place where categorical draws are made.

32-bit Gumbel races (and 32-bit inverse CDFs) lose rare classes and so lower the temperature silently (arXiv
2409.02908, section 5). Draws here are made in two stages: whether a position moves at all, then where to, each with
64-bit uniforms; the second only for positions that move.
"""

import torch
from torch import Tensor

__all__ = ["categorical", "jump"]

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


def jump(x: Tensor, move: Tensor, weights: Tensor, *, generator: torch.Generator) -> Tensor:
    """Move each position of ``x`` [b, l] with chance ``move`` [b, l] to a state drawn from ``weights`` [b, l, n].

    ``weights`` are used only where a position moves, and need not sum to 1.
    """
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
    going = u < move.double()
    if not bool(going.any()):
        return x
    out = x.clone()
    out[going] = categorical(weights[going], generator=generator)
    return out
