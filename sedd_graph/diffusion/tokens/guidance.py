"""Guidance: what a network is asked beside the rows themselves, and how its answers are put together.

Each function here makes a ``denoise`` (see :data:`sedd_graph.diffusion.tokens.walk.Denoise`) out of another. Where a kernel has a
mask under which tokens that are seen stay, guidance reweighs which token a mask becomes and leaves when it falls alone: the
schedule stays what it is. Axes: r rows, l length, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Denoise
from sedd_graph.errors import UserError

__all__ = ["Classifier", "classified", "lacks_scores", "renoised", "unprompted"]

FLOOR = -1e5
"""Logarithms below stand for 0."""
_NEVER = -1e30
MAX_CALLS = 2**24
"""Rows that an exact classifier is asked about for one step."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What text is to be drawn towards: ``log_prob(x, t)`` gives log p(c | x_t), nats [r], of noised rows at times t [r].

    ``method`` ``exact``: x is int64 [r, l], asked once for each other token at each position. ``gradient``: x is float32
    [r, l, n], one-hot, and its gradient (one pass) stands for the differences: exact where log p is linear in it.
    ``strength`` raises p(c | x) to a power; 1 is Bayes' rule.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    method: Literal["exact", "gradient"] = "exact"
    strength: float = 1.0
    rows: int = 4096
    """Rows given to an exact classifier at a time."""
    changes: Callable[[Tensor, Tensor], Tensor | None] | None = None
    """A quicker way to log p(c | x with state y at i) - log p(c | x), float32 [r, l, n], of x int64 [r, l] at times t [r]; or None."""


def lacks_scores(kernel: Kernel, sampler: Sampler) -> str | None:
    """What guidance by a classifier needs and ``sampler`` does not have, where the kernel moves seen tokens: None if nothing."""
    if kernel.carries_over or "log_score" in sampler.reads:
        return None
    return "a sampler that reads log_score, such as analytic: where seen tokens move, it gives factors for scores"


def tilted(name: str, log: Tensor, by: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
    """``log`` [r, l, n] (a ``log_score`` or ``log_x0``) with ``by`` [r, l, n] added where x is masked, the sum over data tokens
    kept, so that masks fall when they did."""
    mask = kernel.mask
    assert mask is not None
    log = log.float()
    data = torch.arange(log.shape[-1], device=log.device) != mask
    none = (log <= FLOOR) | (by <= FLOOR) | ~data
    mass = log.masked_fill(~data, -torch.inf).logsumexp(-1, keepdim=True)
    new = torch.where(none, -torch.inf, log + by)
    known = new.amax(-1, keepdim=True) > -torch.inf  # or the two leave no token between them, and log stays
    new = (new.where(known, 0.0).log_softmax(-1) + mass).clamp(min=10 * FLOOR)
    return torch.where((x == mask)[..., None] & known & data, new, log)


def unprompted(denoise: Denoise, free: Tensor, kernel: Kernel, guidance: float) -> Denoise:
    """Classifier-free guidance by the given text: positions that are not ``free`` bool [b, l].

    p(token | all) ** g p(token | given text masked) ** (1 - g), normalised (arXiv 2406.01572 in its x0 form; LLaDA, arXiv
    2502.09992, whose weight is g - 1). Twice the evaluations.
    """
    mask = kernel.mask
    assert mask is not None

    def guided(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        blind, places = torch.where(free[rows], x, mask), None if at is None else torch.cat([at, at])
        both = denoise(torch.cat([x, blind]), torch.cat([t, t]), torch.cat([rows, rows]), places)
        x = x if at is None else x.gather(1, at)
        out = {}
        for name, value in both.items():
            with_it, without = value.float().chunk(2)
            none = (with_it <= FLOOR) | (without <= FLOOR)
            by = torch.where(none, -torch.inf, (guidance - 1) * (with_it - without))
            out[name] = tilted(name, with_it, by, x, kernel)
        return out

    return guided


def classified(denoise: Denoise, kernel: Kernel, schedule: Schedule, classifier: Classifier, free: Tensor) -> Denoise:
    """Guidance by a classifier: rates R(x -> y) (p(c | y) / p(c | x)) ** strength (arXiv 2406.01572).

    With a mask these are weights of tokens, normalised, which for a classifier that is one (of noised rows) changes nothing.
    Elsewhere scores take the factor, and ``log_x0`` becomes ``log_score``.
    """
    still = kernel.carries_over

    def guided(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        ((name, value),) = denoise(x, t, rows, at).items()
        here = free[rows] & (x == kernel.mask) if still else free[rows]
        if at is not None:
            here = here & torch.zeros_like(here).scatter(1, at, True)
        by = classifier.strength * _differences(classifier, x, t, here, value.shape[-1])
        if at is not None:
            x, by = x.gather(1, at), by.gather(1, at[..., None].expand(-1, -1, by.shape[-1]))
        if still:
            return {name: tilted(name, value, by, x, kernel)}
        if name == "log_x0":
            value = kernel.log_score(value.float(), x, schedule.sigma(t))
        return {"log_score": value.float() + by}

    return guided


def _differences(classifier: Classifier, x: Tensor, t: Tensor, here: Tensor, states: int) -> Tensor:
    """log p(c | x with y at i) - log p(c | x), float32 [r, l, n], at the positions ``here`` bool [r, l]; 0 elsewhere."""
    quick = None if classifier.changes is None else classifier.changes(x, t)
    if quick is not None:
        return torch.where(here[..., None], quick.float().clamp(min=_NEVER), 0.0)
    if classifier.method == "gradient":
        with torch.enable_grad():
            hot = torch.nn.functional.one_hot(x, states).float().requires_grad_()
            (slope,) = torch.autograd.grad(classifier.log_prob(hot, t).sum(), hot)
        return (slope - slope.gather(-1, x[..., None])) * here[..., None]
    rows, places = here.nonzero().unbind(1)
    if len(rows) * states > MAX_CALLS:
        raise UserError(
            f"the exact classifier would be asked about {len(rows) * states:,} rows for one step, more than {MAX_CALLS:,}; "
            "use method='gradient', or fewer or shorter rows"
        )
    out = torch.zeros(*x.shape, states, device=x.device)
    if not len(rows):
        return out
    before = classifier.log_prob(x, t).float().clamp(min=_NEVER)
    pairs = torch.cartesian_prod(torch.arange(len(rows), device=x.device), torch.arange(states, device=x.device))
    found = []
    for chunk in pairs.split(classifier.rows):
        pair, token = chunk.unbind(1)
        asked = x[rows[pair]].scatter(1, places[pair, None], token[:, None])
        found.append(classifier.log_prob(asked, t[rows[pair]]).float().clamp(min=_NEVER))
    out[rows, places] = torch.cat(found).reshape(len(rows), states) - before[rows, None]
    return out


def renoised(
    denoise: Denoise, prompt: Tensor, free: Tensor, kernel: Kernel, schedule: Schedule, generator: torch.Generator
) -> Denoise:
    """The given text ``prompt`` [b, l], where not ``free``, is noised to the rows' own level each time the network looks at it."""

    def noised(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        given = ~free[rows]
        clean = torch.where(given, prompt[rows], x)
        return denoise(
            kernel.sample(clean, schedule.sigma(t), random=Randomness(generator), corrupt=given), t, rows, at
        )

    return noised
