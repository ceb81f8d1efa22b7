"""Verification of a token kernel's losses and reverse steps, by their definitions over all states.

Notation: sigma total noise, Q rate matrix, P transition matrix. Axes: k noise levels, c pairs of a noisy state z and a
clean token x0, n states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.verify.kernel_cases import LIKELY, Cases, row_of

__all__ = ["check_losses", "check_steps"]

ROUNDED = 1e-6
"""Share of the largest rate that a loss is relative to, at least: where all terms are less, as for masks at total noise
20, closed forms round terms of order 1, to 1e-16, which is within the tolerance of 1e-9 of this share."""
AMPLIFIED = 1e5
"""Largest norm of P^-1 of a Tweedie step that is verified: rounding errors grow by this factor."""


@torch.enable_grad()
def check_losses(cases: Cases) -> list[Check]:
    """Verify ``score_entropy`` by its definition, and ``nelbo`` by the score entropy of the implied score.

    Gradients are verified too: a loss with the right value may have a term without its gradient.
    """
    kernel, z, x0, rates, ratio = cases.kernel, cases.z, cases.x0, cases.rates, cases.ratio
    raw = cases.scores(31).requires_grad_()
    found = kernel.score_entropy(raw, z, x0, cases.sigma)
    by_score = _apart(found, *_score_entropy(raw.exp(), rates, ratio), raw, except_at=z)
    logits = _plausible(cases, cases.predictions(z, 32)).requires_grad_()
    log_x0 = cases.carried(logits.log_softmax(-1), z)
    mixed = _mixed(cases.p, log_x0)
    implied = (mixed / mixed.gather(-1, z[..., None])).clamp(min=1e-300)
    found = kernel.nelbo(log_x0.clamp(min=-1e6), z, x0, cases.sigma)
    by_x0 = _apart(found, *_score_entropy(implied, rates, ratio), logits)
    how = f"value and gradient at {z.numel():,} pairs of z and x0, {len(cases.sigma)} noise levels"
    claim = "score entropy is the sum over y of Q[z, y] (s - r log s + r log r - r)"
    score_entropy = Check.below(
        "kernel.score_entropy", claim, by_score, 1e-9, f"{how}, scores from e^-9 to e^9 (SEDD, definition 3.1)"
    )
    claim = "the loss of a prediction is the score entropy of the score that it implies"
    return [score_entropy, Check.below("kernel.nelbo", claim, by_x0, 1e-8, f"{how}, predictions to 1e-9 and below")]


def _mixed(p: Tensor, log_x0: Tensor) -> Tensor:
    """Return the distribution of noisy states under predictions ``log_x0`` [k, c, n] of the clean token, [k, c, n]."""
    return torch.einsum("kzy,kcy->kcz", p, log_x0.exp())


@torch.no_grad()
def _plausible(cases: Cases, logits: Tensor) -> Tensor:
    """Return ``logits`` [k, c, n], even over data tokens where they make the noisy state itself all but impossible.

    The implied scores are then quotients of rounding errors.
    """
    here = _mixed(cases.p, logits.log_softmax(-1)).gather(-1, cases.z[..., None])
    return torch.where((here > LIKELY) | (logits < -1e5), logits, 0.0)


def _score_entropy(score: Tensor, rates: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score entropy by definition 3.1 of SEDD (arXiv 2310.16834), nats per unit of sigma, and its scale.

    Args:
        score: The model's scores of the other states y, float64 [k, c, n].
        rates: Rates Q[z, y], float64 [k, c, n]. Where the rate is 0, the score is ignored.
        ratio: The true scores p(y) / p(z), float64 [k, c, n].

    Returns:
        The score entropy, and the sum of the absolute values of its terms, plus a share of the largest rate, [k, c] each.
    """
    score = torch.where(rates > 0, score, 1.0)
    terms = score - ratio * score.log() + torch.xlogy(ratio, ratio) - ratio
    size = score + ratio * score.log().abs() + torch.xlogy(ratio, ratio).abs() + ratio
    return (rates * terms).sum(-1), ((rates * size).sum(-1) + ROUNDED * rates.amax(-1)).detach()


def _apart(found: Tensor, exact: Tensor, scale: Tensor, leaf: Tensor, *, except_at: Tensor | None = None) -> float:
    """Return the largest difference of two losses [k, c] and of their gradients in ``leaf`` [k, c, n], over their scale.

    Entries of the gradient ``except_at`` [k, c] are not compared.
    """
    scale = scale + 1e-12
    worst = ((found - exact).abs() / scale).detach()
    slope, true = (_gradient(loss, leaf) for loss in (found, exact))
    gap = (slope - true).abs()
    if except_at is not None:
        gap = gap.scatter(-1, except_at[..., None], 0.0)
    return float(torch.maximum(worst, gap.amax(-1) / scale).nan_to_num(nan=math.inf).max())


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    if not loss.requires_grad:  # as of a loss that detaches its input
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(loss.sum(), leaf, allow_unused=True, retain_graph=True)[0]
    return torch.zeros_like(leaf) if found is None else found


_STEP_CLAIMS = {
    "log_score": "the score that a prediction of the clean token implies is the score of its distribution",
    "reverse_rate": "the reverse rate from z to y is Q[z, y] times the score",
    "analytic": "Tweedie's step is (P^-1 s)[y] P[z, y], which is Bayes' rule for one token",
    "posterior": "for one token, the ancestral step is Bayes' rule",
}


def check_steps(cases: Cases) -> list[Check]:
    """Verify scores, reverse rates and reverse steps at every noisy state, for random predictions and scores."""
    kernel, sigma, levels, n = cases.kernel, cases.sigma, len(cases.sigma), cases.kernel.states
    below = _below(sigma)
    step = torch.stack([kernel.transition_matrix(a, b) for a, b in zip(sigma.tolist(), below.tolist(), strict=True)])
    z = torch.arange(n).expand(levels, -1)
    guess = cases.carried(_laws(cases, z), z).exp()
    log_guess = guess.log().clamp(min=-1e6)
    seen = _mixed(cases.p, log_guess)
    before = _mixed(_matrices(cases, below), log_guess)
    here = seen.gather(-1, z[..., None])
    likely, rates = here > LIKELY, row_of(cases.q, z).scatter(-1, z[..., None], 0.0)
    true = seen / here
    score = torch.where((torch.arange(levels) % 2 == 0)[:, None, None], true, _random_scores(cases, z))
    worst: dict[str, float] = {}

    def compare(name: str, found: Tensor, exact: Tensor, scale: Tensor | float, valid: Tensor) -> None:
        gap = ((found - exact).abs() / scale).nan_to_num(nan=math.inf)
        worst[name] = float(torch.where(valid, gap, 0.0).max())

    read = (rates > 0) | (torch.arange(n) == z[..., None])  # scores count only where the rate is not 0
    compare("log_score", kernel.log_score(log_guess, z, sigma).exp(), true, true + 0.01 + 1e-7 / here, read & likely)
    moving = rates * score
    compare("reverse_rate", kernel.reverse_rate(score, z, sigma), moving, 1 + moving, likely | (here >= 0))
    back, singular = torch.linalg.inv_ex(step)
    amplified = back.abs().sum(1).amax(-1).masked_fill(singular > 0, math.inf)[:, None, None]
    exact = torch.einsum("kyx,kcx->kcy", back, score) * row_of(step, z)
    # P is known to about 1e-15, and its inverse to as much times its norm and condition
    doubt = 1e-7 * amplified.square() * score.amax(-1, keepdim=True) * row_of(step, z)
    scale = 1 + torch.einsum("kyx,kcx->kcy", back.abs(), score) * (row_of(step, z) + 1e-7) + doubt
    compare("analytic", kernel.analytic(score, z, sigma, below), exact, scale, (amplified < AMPLIFIED) & (score >= 0))
    joint = row_of(step, z) * before
    exact = joint / joint.sum(-1, keepdim=True)
    compare("posterior", kernel.posterior(guess, z, sigma, below), exact, 1.0, likely)
    how = f"every z, {levels} pairs of noise levels, random predictions and scores"
    return [Check.below(f"kernel.{name}", claim, worst[name], 1e-8, how) for name, claim in _STEP_CLAIMS.items()]


def _below(sigma: Tensor) -> Tensor:
    """Return a lower level for each of ``sigma`` [k]: 0, a random share, or a level close by, in turn."""
    u = torch.rand(len(sigma), generator=torch.Generator().manual_seed(33), dtype=torch.float64)
    turn = torch.arange(len(sigma)) % 4
    return sigma * torch.where(turn == 0, 0.0, torch.where(turn == 3, 1 - 10 ** (-1 - 3 * u), u))


def _matrices(cases: Cases, sigma: Tensor) -> Tensor:
    """Return transition matrices at ``sigma`` [k], the identity at 0, float64 [k, n, n]."""
    found = cases.kernel.transition_matrix(sigma.clamp(min=1e-12))
    return torch.where((sigma > 0)[:, None, None], found, torch.eye(cases.kernel.states, dtype=torch.float64))


def _laws(cases: Cases, z: Tensor) -> Tensor:
    """Return random log-predictions at ``z`` [k, c], float64 [k, c, n]; at every fourth level the first or last token."""
    log_x0 = cases.predictions(z, 34).log_softmax(-1)
    levels, token = torch.arange(len(z)), torch.arange(cases.kernel.states)
    only = torch.where(levels % 8 == 1, 0, cases.kernel.data_tokens - 1)
    one = torch.where(token == only[:, None], 0.0, -1e6).double()[:, None]
    return torch.where((levels % 4 == 1)[:, None, None], one, log_x0)


def _random_scores(cases: Cases, z: Tensor) -> Tensor:
    """Return random scores from e^-9 to e^9 at ``z`` [k, c], float64 [k, c, n]; 1 at ``z`` itself."""
    u = torch.rand(*z.shape, cases.kernel.states, generator=torch.Generator().manual_seed(35), dtype=torch.float64)
    return torch.exp(18 * u - 9).scatter(-1, z[..., None], 1.0)
