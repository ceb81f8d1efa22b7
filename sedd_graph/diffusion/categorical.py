"""Sampling from categorical distributions, in float64.

In float32, Gumbel-max and inverse-CDF sampling never draw rare classes, which silently lowers the temperature (arXiv
2409.02908, section 5). One step of a sampler has two stages
(:class:`sedd_graph.diffusion.draws.Draws`): it draws which positions change, and then new states at those positions only.
"""

import torch
from torch import Tensor

__all__ = ["categorical", "inverse_cdf", "pick", "sharpen"]

_CHUNK = 2**24  # float64 numbers held at a time


def inverse_cdf(cdf: Tensor, u: Tensor) -> Tensor:
    """Return the class that each uniform number selects by the inverse CDF; a class of weight zero is never selected.

    Args:
        cdf: Cumulative weights over n classes, float64 [..., n], not normalised. With shape [n], ``u`` may have any
            shape.
        u: Uniform numbers in [0, 1), float64 [..., d], for d draws from each distribution; the leading axes are those
            of ``cdf``.

    Returns:
        Classes in [0, n), int64 with the shape of ``u``.
    """
    # right=True: the first class whose cumulative weight exceeds u * total. The factor keeps u * total from rounding up to total
    return torch.searchsorted(cdf, u * cdf[..., -1:] * (1 - 2**-53), right=True)


def categorical(weights: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw one class from each row of weights.

    Args:
        weights: Non-negative [..., n], not normalised. A class of weight zero is never drawn.
        generator: Random number generator on the device of ``weights``.

    Returns:
        Classes in [0, n), int64 [...].

    Raises:
        ValueError: A row sums to zero or is not finite.
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
        out[start : start + rows] = inverse_cdf(cdf, u)[:, 0]
    return out.reshape(weights.shape[:-1])


def pick(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes that uniform numbers select, and whether the weights were invalid, without waiting for the device.

    Args:
        weights: Non-negative [k, n], not normalised. A class of weight zero is never drawn.
        u: Uniform numbers in [0, 1), float64 [k].

    Returns:
        Classes in [0, n), int64 [k]; and whether a row of weights sums to zero or is not finite, bool [].
    """
    cdf = weights.double().cumsum(-1)
    total = cdf[:, -1:]
    fault = ~((total > 0) & total.isfinite()).all()
    return inverse_cdf(cdf, u[:, None])[:, 0].clamp(max=weights.shape[-1] - 1), fault


def sharpen(weights: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Apply temperature and nucleus (top-p) truncation to weights, in this order.

    Args:
        weights: Non-negative [..., n], not normalised.
        temperature: Weights are raised to the power 1 / temperature; at 0 all but the largest become zero.
        top_p: Weights outside the nucleus become zero. The nucleus is the smallest set of largest weights whose share
            of the sum is at least ``top_p`` (arXiv 1904.09751).

    Returns:
        float64 [..., n], not normalised. Rows that sum to zero remain zero.
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
