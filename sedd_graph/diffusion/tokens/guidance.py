"""Guidance: wrappers of the network that make samples follow a prompt or a classifier more closely.

Each wrapper takes and returns a :class:`~sedd_graph.diffusion.tokens.walk.Denoise`. Under a kernel with carry-over
unmasking, guidance changes which token replaces a mask, and not the time at which the mask is replaced: the rate of
unmasking remains that of the schedule. Axes: b batch, r rows of it, l length, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise, begin
from sedd_graph.diffusion.tokens.walk import Denoise
from sedd_graph.errors import UserError

__all__ = ["Classifier", "classified", "lacks_scores", "renoised", "unprompted"]

FLOOR = -1e5
"""Logarithms at or below this value are treated as log 0."""
_NEVER = -1e30
MAX_CALLS = 2**24
"""Largest number of rows that a classifier with method ``exact`` evaluates in one step."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier p(c | x_t) of noisy rows for one fixed label c, and how guidance uses it.

    Attributes:
        log_prob: ``log_prob(x, t)`` returns log p(c | x_t), nats [r], of noisy rows ``x`` at times ``t`` [r]. ``x`` is
            int64 [r, l] with the method ``exact``, and one-hot float32 [r, l, n] with ``gradient``.
        method: How differences of log p between rows that differ in one token are computed. ``exact`` evaluates the
            classifier on each such row. ``gradient`` approximates them to first order by one gradient, exact if log p
            is linear in the one-hot rows.
        strength: Exponent of p(c | x) in guidance; 1 is Bayes' rule.
        rows: Largest number of rows in one call with the method ``exact``.
        changes: Optional function that computes the differences without ``log_prob``. For ``x`` int64 [r, l],
            ``changes(x, t)`` returns log p(c | x with state y at position i) - log p(c | x) for every position i and
            state y, nats, float32 [r, l, n]; or None, to leave the computation to ``log_prob``. None in place of the
            function (the default): always ``log_prob``.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    method: Literal["exact", "gradient"] = "exact"
    strength: float = 1.0
    rows: int = 4096
    changes: Callable[[Tensor, Tensor], Tensor | None] | None = None


def lacks_scores(kernel: Kernel, sampler: Sampler) -> str | None:
    """Return a description of the sampler that classifier guidance requires; None if ``sampler`` is suitable.

    Args:
        kernel: The kernel of the process.
        sampler: The sampler to check.
    """
    if kernel.carries_over or "log_score" in sampler.reads:
        return None
    return "a sampler that reads log_score, such as analytic: under a kernel that changes visible tokens, guidance multiplies scores"


def tilted(log: Tensor, by: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
    """Add log-weights to the network's output at masked positions, and renormalise over data tokens.

    The sum of the exponentials over data tokens is unchanged, so the rate of unmasking is unchanged as well.

    Args:
        log: ``log_score`` or ``log_x0``, [r, l, n].
        by: Log-weights to add, [r, l, n].
        x: Rows, int64 [r, l].
        kernel: A kernel with carry-over unmasking.

    Returns:
        float32 [r, l, n]. ``log`` is unchanged at unmasked positions, and where no token has positive weight in both
        ``log`` and ``by``.
    """
    mask = kernel.require_mask()
    log = log.float()
    data = torch.arange(log.shape[-1], device=log.device) != mask
    none = (log <= FLOOR) | (by <= FLOOR) | ~data
    mass = log.masked_fill(~data, -torch.inf).logsumexp(-1, keepdim=True)
    new = torch.where(none, -torch.inf, log + by)
    known = new.amax(-1, keepdim=True) > -torch.inf
    new = (new.where(known, 0.0).log_softmax(-1) + mass).clamp(min=10 * FLOOR)
    return torch.where((x == mask)[..., None] & known & data, new, log)


def unprompted(denoise: Denoise, free: Tensor, kernel: Kernel, guidance: float) -> Denoise:
    """Wrap the network in classifier-free guidance by the given text.

    The distribution of a masked token becomes
    ``p(token | row) ** g * p(token | row with the given text masked) ** (1 - g)``, normalised (arXiv 2406.01572,
    applied to log_x0; LLaDA, arXiv 2502.09992, whose scale is g - 1). The number of network evaluations doubles.

    Args:
        denoise: Evaluates the network.
        free: bool [b, l], positions without a given token.
        kernel: A kernel with carry-over unmasking.
        guidance: The scale g; 1 leaves the distribution unchanged.
    """
    mask = kernel.require_mask()

    def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
        hidden = torch.where(free[rows], x, mask)
        both = begin(denoise, torch.cat([x, hidden]), torch.cat([t, t]), torch.cat([rows, rows]))
        count, width = len(x), len(both.values)

        def finish(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
            given, alone = (both.finish(part, groups) for part in (values[:width], values[width:-1]))
            return _guided(given, alone, values[-1][groups.row[:, None], groups.place], kernel, guidance)

        ours = (v[:count] if by_row else v for v, by_row in zip(both.values, both.by_row, strict=True))
        others = (v[count:] if by_row else v for v, by_row in zip(both.values, both.by_row, strict=True))
        return Stage((*ours, *others, x), (*both.by_row, *both.by_row, True), finish)

    return StagedDenoise(first, random=isinstance(denoise, StagedDenoise) and denoise.random)


def _guided(
    given: Mapping[str, Tensor], alone: Mapping[str, Tensor], x: Tensor, kernel: Kernel, guidance: float
) -> dict[str, Tensor]:
    """Return the outputs with a prompt, moved away from those without it; arguments and result by name, [g, m, n]."""
    out = {}
    for name in given:
        with_it, without = given[name].float(), alone[name].float()
        none = (with_it <= FLOOR) | (without <= FLOOR)
        by = torch.where(none, -torch.inf, (guidance - 1) * (with_it - without))
        out[name] = tilted(with_it, by, x, kernel)
    return out


def classified(denoise: Denoise, kernel: Kernel, schedule: Schedule, classifier: Classifier, free: Tensor) -> Denoise:
    """Wrap the network in classifier guidance, which multiplies reverse rates (arXiv 2406.01572).

    The reverse rate R(x -> y) is multiplied by ``(p(c | y) / p(c | x)) ** strength`` for the classifier's label c.
    Under a kernel with carry-over unmasking, the factors are weights of the tokens that can replace a mask,
    renormalised so that the rate of unmasking is unchanged. With strength 1 and a classifier that is consistent over
    noise levels, the factors need no renormalisation. Under other kernels, scores are multiplied by the factors, after
    converting ``log_x0`` to ``log_score``.

    Args:
        denoise: Evaluates the network.
        kernel: The kernel of the process.
        schedule: Total noise as a function of time.
        classifier: The classifier and the strength.
        free: bool [b, l], positions without a given token.
    """
    carries_over = kernel.carries_over

    def guided(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        ((name, value),) = denoise(x, t, rows, at).items()
        here = free[rows] & (x == kernel.mask) if carries_over else free[rows]
        if at is not None:
            here = here & torch.zeros_like(here).scatter(1, at, True)
        by = classifier.strength * _differences(classifier, x, t, here, value.shape[-1])
        if at is not None:
            x, by = x.gather(1, at), by.gather(1, at[..., None].expand(-1, -1, by.shape[-1]))
        if carries_over:
            return {name: tilted(value, by, x, kernel)}
        if name == "log_x0":
            value = kernel.log_score(value.float(), x, schedule.sigma(t))
        return {"log_score": value.float() + by}

    return guided


def _differences(classifier: Classifier, x: Tensor, t: Tensor, here: Tensor, states: int) -> Tensor:
    """Return log p(c | x with state y at position i) - log p(c | x), nats, float32 [r, l, n].

    Entries outside ``here``, bool [r, l], are 0.
    """
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
            f"the exact classifier would evaluate {len(rows) * states:,} rows in one step, more than {MAX_CALLS:,}; "
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
        changed = x[rows[pair]].scatter(1, places[pair, None], token[:, None])
        found.append(classifier.log_prob(changed, t[rows[pair]]).float().clamp(min=_NEVER))
    out[rows, places] = torch.cat(found).reshape(len(rows), states) - before[rows, None]
    return out


def renoised(
    denoise: Denoise, prompt: Tensor, free: Tensor, kernel: Kernel, schedule: Schedule, generator: torch.Generator
) -> Denoise:
    """Wrap the network so that it observes the given text noised to the current noise level, afresh in each evaluation.

    Args:
        denoise: Evaluates the network.
        prompt: The given text, int64 [b, l].
        free: bool [b, l], positions without a given token.
        kernel: The kernel that noises the given text.
        schedule: Total noise as a function of time.
        generator: Random number generator of this noise.
    """

    def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
        given = ~free[rows]
        clean = torch.where(given, prompt[rows], x)
        seen = kernel.sample(clean, schedule.sigma(t), random=Randomness(generator), corrupt=given)
        return begin(denoise, seen, t, rows)

    return StagedDenoise(first, random=True)
