"""Verification of noise schedules and token kernels by methods that do not use their closed forms.

A schedule is compared with finite differences; a kernel with matrix exponentials, sums over all states and Bayes' rule.
These comparisons are in float64. Losses and schedules are then also evaluated in float32 and compared with float64.

Notation: sigma total noise, Q rate matrix, P transition matrix. Q[z, y] is the rate from state y to state z, and
columns of Q sum to 0. Axes: b rows, l positions, n states, m = n - 1 other states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.verify.total_variation import total_variation

__all__ = ["check_kernel", "check_precision", "check_prior", "check_schedule", "final_sigma"]

LEVELS = (0.01, 0.5, 3.0)
"""Values of the total noise sigma at which transition probabilities and losses are verified."""
ALL_LEVELS = (*LEVELS, 1e-4, 9.0)
"""Values of the total noise sigma at which rates are verified."""
FLOAT32_LEVELS = (3e-8, 1e-6, 1e-3, 0.5, 5.0)
"""Values of the total noise sigma at which float32 is compared with float64. A naive float32 evaluation of
1 - exp(-sigma) gives 0 at the first value, and is off by 5 % at the second."""


@torch.no_grad()
def final_sigma(schedule: Schedule) -> float:
    """Return the total noise sigma(1) of a noise schedule, at the final time t = 1."""
    return float(schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))


@torch.no_grad()
def check_schedule(schedule: Schedule) -> list[Check]:
    """Verify a noise schedule: total noise sigma(t) and its rate d sigma / dt.

    The rate must equal the finite difference of sigma, sigma must be positive, finite and increasing on (0, 1], and
    float32 must agree with float64. (A published library has shipped a schedule whose rate is not the derivative.)

    Args:
        schedule: The noise schedule.

    Returns:
        The results of the three checks.
    """
    t = torch.linspace(0.0213, 0.9787, 97, dtype=torch.float64)
    step = 1e-5
    numeric = (schedule.sigma(t + step) - schedule.sigma(t - step)) / (2 * step)
    error = float(((schedule.dsigma(t) - numeric).abs() / numeric.abs().clamp(min=1e-9)).max())
    ends = schedule.sigma(torch.tensor([1e-6, 1.0]))
    grid = schedule.sigma(torch.linspace(1e-6, 1, 1001, dtype=torch.float64))
    finite = bool(torch.isfinite(torch.cat([ends, schedule.dsigma(torch.tensor([1e-6, 1.0]))])).all())
    single = torch.tensor([1e-6, 1e-5, 1e-3, 0.1, 0.49, 0.51, 0.9, 0.999, 1.0])
    found, exact = (
        torch.stack([s.double(), d.double(), (d / torch.expm1(s)).double()])
        for s, d in ((schedule.sigma(x), schedule.dsigma(x)) for x in (single, single.double()))
    )
    rounding = float(((found - exact).abs() / exact.abs().clamp(min=1e-300)).nan_to_num(nan=math.inf).max())
    claim = "the rate is the derivative of total noise"
    rate = Check.below("schedule.rate", claim, error, 1e-5, "central differences, relative")
    claim = "total noise is positive, finite and increasing on (0, 1], in float32 at both ends"
    holds = finite and bool((grid.diff() > 0).all()) and bool((grid > 0).all())
    increasing = Check("schedule.range", claim, holds, f"sigma(1) = {float(ends[1]):.3g}", "grid of 1,001 times")
    claim = "total noise, its rate and the weight of the cross-entropy are accurate in float32"
    how = "against float64 at nine times from 1e-6 to 1, relative"
    return [rate, increasing, Check.below("schedule.float32", claim, rounding, 1e-4, how)]


@torch.no_grad()
def check_kernel(kernel: Kernel, *, end: float) -> list[Check]:
    """Verify that rates, transition probabilities, draws, prior, losses and reverse steps of a kernel are consistent.

    Args:
        kernel: Kernel with few states, since every pair of states is evaluated.
        end: Total noise at t = 1.

    Returns:
        The results of the checks.
    """
    a, b = kernel.transition_matrix(0.3), kernel.transition_matrix(1.2, 0.3)
    semigroup = float((b @ a - kernel.transition_matrix(1.2)).abs().max())
    claim = "draws of x_t follow P"
    return [
        _rates(kernel),
        _transition(kernel),
        Check.below("kernel.semigroup", "P(t | s) P(s) = P(t)", semigroup, 1e-12, "Chapman-Kolmogorov at one pair"),
        Check.below("kernel.sample", claim, _draws(kernel), 0.02, "total variation, 20,000 draws", digits=".4f"),
        check_prior(kernel, end=end),
        *_losses(kernel),
        *_steps(kernel),
        *_rate_bound(kernel),
        check_precision(kernel),
    ]


def _rates(kernel: Kernel) -> Check:
    """Verify that columns of Q sum to 0, and that entries off the diagonal are non-negative."""
    columns, least = 0.0, math.inf
    for level in ALL_LEVELS:
        q = kernel.rate_matrix(level)
        off = q - torch.diag(q.diagonal())
        columns = max(columns, float(q.sum(0).abs().max() / q.abs().max()))
        least = min(least, float(off.min()))
    claim = "columns of Q sum to 0, and off the diagonal Q is not negative"
    value = f"{columns:.1e}, least {least:.1e}"
    return Check("kernel.rates", claim, columns < 1e-12 and least >= 0, value, "Q at five noise levels")


def _transition(kernel: Kernel) -> Check:
    """Verify the closed form of P by matrix exponentials if Q is constant, else by Kolmogorov's forward equation."""
    qs = [kernel.rate_matrix(level) for level in LEVELS]
    if all(torch.equal(q, qs[0]) for q in qs):
        error = max(float((torch.matrix_exp(s * qs[0]) - kernel.transition_matrix(s)).abs().max()) for s in LEVELS)
        claim, how = "the closed form of P is exp(sigma Q)", "matrix exponential at three noise levels"
        return Check.below("kernel.transition", claim, error, 1e-10, how)
    error = float((kernel.transition_matrix(1e-12) - torch.eye(kernel.states, dtype=torch.float64)).abs().max())
    holds = error < 1e-3
    for s, q in zip(LEVELS, qs, strict=True):
        h = 1e-3 * s
        near, far = (kernel.transition_matrix(s + k * h) - kernel.transition_matrix(s - k * h) for k in (1, 2))
        slope = (8 * near - far) / (12 * h)
        gap = float((slope - q @ kernel.transition_matrix(s)).abs().max() / q.abs().max())
        holds, error = holds and gap < 1e-8, max(gap, error)
    claim = "the closed form of P solves dP/dsigma = Q P from P = 1"
    how = "central differences of fourth order at three noise levels"
    return Check("kernel.transition", claim, holds, f"{error:.1e}", how)


def _draws(kernel: Kernel) -> float:
    """Return the largest total variation distance between draws of x_t and P, over up to four clean tokens."""
    draws, worst = 20_000, 0.0
    p = kernel.transition_matrix(0.7)
    for token in range(min(kernel.data_tokens, 4)):
        seen = _noised(kernel, torch.full((draws, 1), token), 0.7, torch.Generator().manual_seed(2 + token))
        worst = max(worst, total_variation(seen[:, 0], p[:, token]))
    return worst


def _noised(kernel: Kernel, x0: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Draw x_t, int64 [b, l], given ``x0``, int64 [b, l], with noise at every position."""
    every = torch.ones_like(x0, dtype=torch.bool)
    return kernel.sample(x0, torch.full((len(x0),), sigma), random=Randomness(generator), corrupt=every)


@torch.no_grad()
def check_prior(kernel: Kernel, *, end: float) -> Check:
    """Verify that noised tokens at t = 1 have the distribution of the prior, which sampling starts from.

    Args:
        kernel: Kernel with few states.
        end: Total noise at t = 1.
    """
    last = kernel.transition_matrix(end)[:, : kernel.data_tokens]
    rows = kernel.prior(4000, 2, generator=torch.Generator().manual_seed(1), allowed=None)
    prior = torch.bincount(rows.reshape(-1), minlength=kernel.states).double() / rows.numel()
    gap = float((last - prior[:, None]).abs().sum(0).max() / 2)
    chance = 0.0 if float(prior.max()) == 1 else math.sqrt(kernel.states / rows.numel())
    how = "total variation, the worst clean token"
    return Check.below("kernel.prior", "noise at t = 1 is the prior", gap, 0.01 + 3 * chance, how, digits=".4f")


def _cases(kernel: Kernel, sigma: float) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (z, x0, p(. | x0)) for each noisy state z and clean token x0 with p(z | x0) > 0; p is float64 [n]."""
    p = kernel.transition_matrix(sigma)
    for x0 in range(kernel.data_tokens):
        for z in range(kernel.states):
            if p[z, x0] > 1e-9:
                yield z, x0, p[:, x0]


def _score_entropy(score: Tensor, rate: Tensor, ratio: Tensor) -> float:
    """Return the score entropy at state z by definition 3.1 of SEDD (arXiv 2310.16834), nats per unit of sigma.

    Args:
        score: The model's scores of the other states y, float64 [m].
        rate: Rates Q[z, y], float64 [m]. Where the rate is 0, the score is ignored and may be infinite.
        ratio: The true scores p(y) / p(z), float64 [m].
    """
    terms = score - torch.xlogy(ratio, score) + torch.xlogy(ratio, ratio) - ratio
    return float(torch.where(rate > 0, rate * terms, 0.0).sum())


def _losses(kernel: Kernel) -> list[Check]:
    """Verify ``score_entropy`` by its definition, and ``nelbo`` by the score entropy of the implied score."""
    n, generator = kernel.states, torch.Generator().manual_seed(5)
    by_score = by_x0 = 0.0
    for sigma in LEVELS:
        level, q = torch.tensor([sigma], dtype=torch.float64), kernel.rate_matrix(sigma)
        p = kernel.transition_matrix(sigma)
        for z, x0, seen in _cases(kernel, sigma):
            x, clean = torch.tensor([[z]]), torch.tensor([[x0]])
            others = torch.arange(n) != z
            rate, ratio = q[z][others], (seen / seen[z])[others]
            score = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
            score[z] = 1.0
            found = float(kernel.score_entropy(score.log()[None, None], x, clean, level))
            expected = _score_entropy(score[others], rate, ratio)
            by_score = max(by_score, abs(found - expected) / (1 + abs(expected)))
            guess = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
            guess[kernel.data_tokens :] = 0
            guess = _carried(kernel, guess, z)
            guess = guess / guess.sum()
            mixed = p @ guess
            found = float(kernel.nelbo(guess.log().clamp(min=-1e6)[None, None], x, clean, level))
            expected = _score_entropy((mixed / mixed[z])[others], rate, ratio)
            by_x0 = max(by_x0, abs(found - expected) / (1 + abs(expected)))
    claim = "score entropy is the sum over y of Q[z, y] (s - r log s + r log r - r)"
    how = "every z and x0, random scores (SEDD, definition 3.1)"
    score_entropy = Check.below("kernel.score_entropy", claim, by_score, 1e-9, how)
    claim = "the loss of a prediction is the score entropy of the score that it implies"
    return [score_entropy, Check.below("kernel.nelbo", claim, by_x0, 1e-8, "every z and x0, random predictions")]


def _carried(kernel: Kernel, guess: Tensor, z: int) -> Tensor:
    """Return the prediction [n] at state ``z``: ``guess``, or one-hot z if visible data tokens are always clean."""
    if kernel.clamp_safe and z < kernel.data_tokens:
        return F.one_hot(torch.tensor(z), kernel.states).double()
    return guess


_STEP_CLAIMS = {
    "log_score": "the score that a prediction of the clean token implies is the score of its distribution",
    "reverse_rate": "the reverse rate from z to y is Q[z, y] times the score",
    "analytic": "for one token, Tweedie's step is Bayes' rule",
    "posterior": "for one token, the ancestral step is Bayes' rule",
}


def _steps(kernel: Kernel) -> list[Check]:
    """Verify scores, reverse rates and reverse steps for a single token with a known distribution."""
    n = kernel.states
    law = torch.zeros(n, dtype=torch.float64)
    law[: kernel.data_tokens] = (
        torch.rand(kernel.data_tokens, generator=torch.Generator().manual_seed(6)).double() + 0.1
    )
    law /= law.sum()
    worst = dict.fromkeys(_STEP_CLAIMS, 0.0)
    for now, below in ((1.1, 0.4), (0.3, 0.29), (0.7, 0.0)):
        level, next_ = (torch.tensor([s], dtype=torch.float64) for s in (now, below))
        seen = kernel.transition_matrix(now) @ law
        before = kernel.transition_matrix(below) @ law if below else law
        step, q = kernel.transition_matrix(now, below), kernel.rate_matrix(now)
        for z in range(n):
            if seen[z] < 1e-9:
                continue
            x = torch.tensor([[z]])
            score, guess = (seen / seen[z])[None, None], _carried(kernel, law, z)
            exact = step[z] * before / seen[z]
            moving = q[z] * (seen / seen[z])
            moving[z] = 0
            implied = kernel.log_score(guess.log().clamp(min=-1e6)[None, None], x, level)[0, 0].exp()
            read = (q[z] > 0) | (torch.arange(n) == z)  # scores count only where the rate is not 0
            for name, found, expected in (
                ("log_score", implied[read], (seen / seen[z])[read]),
                ("reverse_rate", kernel.reverse_rate(score, x, level)[0, 0], moving),
                ("analytic", kernel.analytic(score, x, level, next_)[0, 0], exact),
                ("posterior", kernel.posterior(guess[None, None], x, level, next_)[0, 0], exact),
            ):
                gap = float((found - expected).abs().max())
                worst[name] = max(worst[name], gap if math.isfinite(gap) else math.inf)
    how = "every z, three pairs of noise levels"
    return [Check.below(f"kernel.{name}", claim, worst[name], 1e-8, how) for name, claim in _STEP_CLAIMS.items()]


def _rate_bound(kernel: Kernel) -> list[Check]:
    """Verify the kernel's upper bound on reverse rates, if it has one.

    Rates are largest if the clean token is deterministic, so only these distributions are evaluated.
    """
    if kernel.rate_bound is None:
        return []
    fastest = 0.0
    for sigma in ALL_LEVELS:
        q = kernel.rate_matrix(sigma)
        for z, _, seen in _cases(kernel, sigma):
            moving = q[z] * seen / seen[z]
            fastest = max(fastest, float(moving.sum() - moving[z]) * -math.expm1(-sigma))
    claim = "no reverse rate exceeds the bound that uniformization uses"
    holds, value = fastest <= kernel.rate_bound * (1 + 1e-9), f"{fastest:.4g} of {kernel.rate_bound:.4g}"
    return [Check("kernel.rate_bound", claim, holds, value, "every z and x0 at five noise levels")]


@torch.no_grad()
def check_precision(kernel: Kernel) -> Check:
    """Verify that the losses of a token kernel in float32 agree with float64.

    This depends on the number of states: SEDD's published form of the loss for uniform noise is NaN in float32 with
    50,257 states at low noise.

    Args:
        kernel: Kernel with any number of states.
    """
    n, worst, generator = kernel.states, 0.0, torch.Generator().manual_seed(8)
    raw = torch.randn(1, 3, n, generator=generator)
    x0 = torch.tensor([[0, 1, kernel.data_tokens - 1]])
    xt = x0.clone()
    xt[0, 0] = _neighbour(kernel)
    for sigma in FLOAT32_LEVELS:
        for loss in (kernel.score_entropy, kernel.nelbo):
            values = []
            for dtype in (torch.float32, torch.float64):
                head = raw.to(dtype)
                if loss == kernel.nelbo:
                    head = head.masked_fill(torch.arange(n) >= kernel.data_tokens, -1e6).log_softmax(-1)
                values.append(loss(head, xt, x0, torch.tensor([sigma]).to(dtype)).double())
            gap = (values[0] - values[1]).abs() / (values[1].abs() + 1e-3)
            worst = max(worst, float(gap.nan_to_num(nan=math.inf).max()))
    least, most = min(FLOAT32_LEVELS), max(FLOAT32_LEVELS)
    how = f"against float64, {n:,} states, total noise from {least:g} to {most:g}"
    return Check.below("kernel.float32", "losses are accurate in float32, also at the least noise", worst, 1e-4, how)


def _neighbour(kernel: Kernel) -> int:
    """Return the state that token 0 most often changes to, at the lowest noise at which any of 4,096 draws changes."""
    clean = torch.zeros(1, 4096, dtype=torch.int64)
    generator = torch.Generator().manual_seed(9)
    for sigma in FLOAT32_LEVELS[2:]:
        seen = _noised(kernel, clean, sigma, generator)
        moved = seen[seen > 0]
        if len(moved):
            return int(moved.mode().values)
    return kernel.states - 1
