"""The order in which samplers of masking kernels unmask positions: measures of confidence, and ties.

Axes: b batch, l length, k positions, n states.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.tokens.walk import Walk

Measure = Callable[[Tensor, Tensor], Tensor]
"""Type of functions from the predicted distributions of k positions, [k, n], and tokens drawn from them, int64 [k], to [k]."""


def _rest(clean: Tensor, tokens: Tensor) -> Tensor:
    """Return the sum of the probabilities of all tokens but one, [k], which float32 resolves where 1 - p is tiny."""
    return clean.scatter(-1, tokens[:, None], 0.0).sum(-1, dtype=torch.float64)


def _confidence(clean: Tensor, tokens: Tensor) -> Tensor:
    return -log_of(_rest(clean, tokens))


def _margin(clean: Tensor, tokens: Tensor) -> Tensor:
    best = clean.topk(2, dim=-1)
    return -log_of(_rest(clean, best.indices[:, 0]) + best.values[:, 1])


def _order(clean: Tensor, tokens: Tensor) -> Tensor:
    return -log_of(entropy_of(clean, tokens))


def entropy_of(clean: Tensor, tokens: Tensor) -> Tensor:
    """Return the entropy of each distribution, nats, [k], with a relative error of rounding also where it is tiny."""
    best = clean.argmax(-1)
    rest = _rest(clean, best).clamp(max=1 - 1e-9)
    others = torch.xlogy(clean, clean).scatter(-1, best[:, None], 0.0).sum(-1, dtype=torch.float64)
    return -others - (1 - rest) * torch.log1p(-rest)


def log_of(x: Tensor) -> Tensor:
    """Return the logarithm of ``x``, at least that of 1e-30, below which sums of float32 probabilities are rounding."""
    return x.clamp(min=1e-30).log()


TIED = 2.0**-16
"""Measures of confidence (minus the logarithm of 1 - probability, of 1 - margin, or of the entropy) are tied within this.

It is above what rounding changes in them. Positions with the same prediction, such as masks without context, would
otherwise be ordered by rounding, which differs between batches of another size."""


def in_order(rank: Tensor) -> Tensor:
    """Replace ranks by those of groups of ties: values that differ from the next lower one by at most :data:`TIED`.

    Args:
        rank: float64 [b, l]; infinite entries form a group.

    Returns:
        Number of each group in the order of its values, float64 [b, l].
    """
    ordered = rank.sort(-1)
    apart = (ordered.values[:, 1:] - ordered.values[:, :-1]) > TIED  # inf - inf is NaN, and not above
    group = torch.cat([torch.zeros_like(rank[:, :1], dtype=torch.bool), apart], -1).cumsum(-1)
    return torch.zeros_like(rank).scatter(-1, ordered.indices, group.double())


def commit(walk: Walk, drawn: Tensor, rank: Tensor, count: Tensor) -> None:
    """Unmask the masked positions of lowest rank in each row, the first of those of equal rank; the other masks stay.

    Args:
        walk: State of the sampling run, whose rows are updated.
        drawn: New tokens, int64 [b, l]; used at the positions that are unmasked.
        rank: Order of unmasking, lowest first, [b, l].
        count: Number of positions to unmask in each row, [b].
    """
    place = rank.masked_fill(~walk.masked, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    walk.put(torch.where((place < count[:, None]) & walk.masked, drawn, walk.x))


MEASURES: dict[str, Measure] = {"probability": _confidence, "margin": _margin, "entropy": _order}
"""Measures of confidence by name: increasing functions of what the name says, which rounding changes by less than :data:`TIED`."""
