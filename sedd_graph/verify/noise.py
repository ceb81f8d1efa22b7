"""A schedule and a kernel, each held to what it claims to be, by means that are independent of its formulas.

Finite differences, matrix exponentials, sums over all states and Bayes' rule, in float64; then float32 beside float64.
Axes: b rows, l positions, n states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["check_kernel", "check_precision", "check_prior", "check_schedule"]

LEVELS = (0.01, 0.5, 3.0)
LITTLE = (3e-8, 1e-6, 1e-3, 0.5, 5.0)
"""Total noise at which float32 is held to float64: where 1 - exp(-sigma) is 0, or 5% off, among them."""


@torch.no_grad()
def check_schedule(schedule: Schedule) -> list[Check]:
    """Total noise grows, the rate is its derivative (the field has shipped schedules where it is not), and float32 will do."""
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
    return [
        Check(
            "schedule.rate",
            "the rate is the derivative of total noise",
            error < 1e-5,
            f"{error:.1e}",
            "central differences, relative",
        ),
        Check(
            "schedule.range",
            "total noise is positive, finite and increasing on (0, 1], in float32 at both ends",
            finite and bool((grid.diff() > 0).all()) and bool((grid > 0).all()),
            f"sigma(1) = {float(ends[1]):.3g}",
            "grid of 1,001 times",
        ),
        Check(
            "schedule.float32",
            "total noise, its rate and the weight of cross-entropy are as good in float32",
            rounding < 1e-4,
            f"{rounding:.1e}",
            "against float64 at nine times from 1e-6 to 1, relative",
        ),
    ]


def _rates(kernel: Kernel) -> tuple[float, float]:
    """How far columns of Q are from summing to 0, and the least of its other entries."""
    columns, least = 0.0, math.inf
    for level in (*LEVELS, 1e-4, 9.0):
        q = kernel.rate_matrix(level)
        off = q - torch.diag(q.diagonal())
        columns = max(columns, float(q.sum(0).abs().max() / q.abs().max()))
        least = min(least, float(off.min()))
    return columns, least


def _transition(kernel: Kernel) -> Check:
    qs = [kernel.rate_matrix(level) for level in LEVELS]
    if all(torch.equal(q, qs[0]) for q in qs):
        error = max(float((torch.matrix_exp(s * qs[0]) - kernel.transition_matrix(s)).abs().max()) for s in LEVELS)
        return Check(
            "kernel.transition",
            "the closed form of P is exp(sigma Q)",
            error < 1e-10,
            f"{error:.1e}",
            "matrix exponential at three noise levels",
        )
    error = float((kernel.transition_matrix(1e-12) - torch.eye(kernel.states, dtype=torch.float64)).abs().max())
    holds = error < 1e-3
    for s, q in zip(LEVELS, qs, strict=True):
        h = 1e-3 * s
        near, far = (kernel.transition_matrix(s + k * h) - kernel.transition_matrix(s - k * h) for k in (1, 2))
        slope = (8 * near - far) / (12 * h)
        gap = float((slope - q @ kernel.transition_matrix(s)).abs().max() / q.abs().max())
        holds, error = holds and gap < 1e-8, max(gap, error)
    return Check(
        "kernel.transition",
        "the closed form of P solves dP/dsigma = Q P from P = 1",
        holds,
        f"{error:.1e}",
        "central differences of fourth order at three noise levels",
    )


def _cases(kernel: Kernel, sigma: float) -> Iterator[tuple[int, int, Tensor]]:
    """Every (z, x0) that can be, and the law of z given x0 at ``sigma``."""
    p = kernel.transition_matrix(sigma)
    for x0 in range(kernel.data_tokens):
        for z in range(kernel.states):
            if p[z, x0] > 1e-9:
                yield z, x0, p[:, x0]


def _losses(kernel: Kernel) -> tuple[float, float]:
    """Score entropy against its definition, and the form for predictions against the score entropy of what they say."""
    n, generator = kernel.states, torch.Generator().manual_seed(5)
    by_score = by_x0 = 0.0
    for sigma in LEVELS:
        level, q = torch.tensor([sigma], dtype=torch.float64), kernel.rate_matrix(sigma)
        p = kernel.transition_matrix(sigma)
        for z, x0, seen in _cases(kernel, sigma):
            x, clean = torch.tensor([[z]]), torch.tensor([[x0]])
            others = torch.arange(n) != z
            rate, ratio = q[z][others], (seen / seen[z])[others]

            def entropy(score: Tensor, rate: Tensor = rate, ratio: Tensor = ratio, others: Tensor = others) -> float:
                s = score[others]
                # where the rate is 0 nothing is asked of the score, not even that it be finite
                terms = s - torch.xlogy(ratio, s) + torch.xlogy(ratio, ratio) - ratio
                return float(torch.where(rate > 0, rate * terms, 0.0).sum())

            score = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
            score[z] = 1.0
            found = float(kernel.score_entropy(score.log()[None, None], x, clean, level))
            by_score = max(by_score, abs(found - (expected := entropy(score))) / (1 + abs(expected)))
            guess = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
            guess[kernel.data_tokens :] = 0
            if kernel.clamp_safe and z < kernel.data_tokens:
                guess = torch.nn.functional.one_hot(x[0, 0], n).double()
            guess = guess / guess.sum()
            mixed = p @ guess
            found = float(kernel.nelbo(guess.log().clamp(min=-1e6)[None, None], x, clean, level))
            by_x0 = max(by_x0, abs(found - (expected := entropy(mixed / mixed[z]))) / (1 + abs(expected)))
    return by_score, by_x0


def _steps(kernel: Kernel) -> dict[str, float]:
    """Scores, rates and steps back for one token of known law, against Bayes' rule."""
    n = kernel.states
    law = torch.zeros(n, dtype=torch.float64)
    law[: kernel.data_tokens] = (
        torch.rand(kernel.data_tokens, generator=torch.Generator().manual_seed(6)).double() + 0.1
    )
    law /= law.sum()
    worst = dict.fromkeys(("log_score", "reverse_rate", "analytic", "posterior"), 0.0)
    for now, below in ((1.1, 0.4), (0.3, 0.29), (0.7, 0.0)):
        level, next_ = (torch.tensor([s], dtype=torch.float64) for s in (now, below))
        seen = kernel.transition_matrix(now) @ law
        before = kernel.transition_matrix(below) @ law if below else law
        step, q = kernel.transition_matrix(now, below), kernel.rate_matrix(now)
        for z in range(n):
            if seen[z] < 1e-9:
                continue
            x = torch.tensor([[z]])
            score, guess = (seen / seen[z])[None, None], law
            if kernel.clamp_safe and z < kernel.data_tokens:
                guess = torch.nn.functional.one_hot(x[0, 0], n).double()
            exact = step[z] * before / seen[z]
            moving = q[z] * (seen / seen[z])
            moving[z] = 0
            told = kernel.log_score(guess.log().clamp(min=-1e6)[None, None], x, level)[0, 0].exp()
            read = (q[z] > 0) | (torch.arange(n) == z)  # where the rate is 0 no one asks for the score
            for name, found, wanted in (
                ("log_score", told[read], (seen / seen[z])[read]),
                ("reverse_rate", kernel.reverse_rate(score, x, level)[0, 0], moving),
                ("analytic", kernel.analytic(score, x, level, next_)[0, 0], exact),
                ("posterior", kernel.posterior(guess[None, None], x, level, next_)[0, 0], exact),
            ):
                gap = float((found - wanted).abs().max())
                worst[name] = max(worst[name], gap if math.isfinite(gap) else math.inf)
    return worst


def _draws(kernel: Kernel) -> float:
    """Total variation between draws of x_t and P, for the worst of up to four clean tokens."""
    draws, worst = 20_000, 0.0
    p = kernel.transition_matrix(0.7)
    for token in range(min(kernel.data_tokens, 4)):
        x0 = torch.full((draws, 1), token)
        drawn = kernel.sample(
            x0,
            torch.full((draws,), 0.7),
            random=Randomness(torch.Generator().manual_seed(2 + token)),
            corrupt=torch.ones_like(x0, dtype=torch.bool),
        )
        found = torch.bincount(drawn[:, 0], minlength=kernel.states).double() / draws
        worst = max(worst, float((found - p[:, token]).abs().sum() / 2))
    return worst


@torch.no_grad()
def check_kernel(kernel: Kernel, *, end: float) -> list[Check]:
    """Rates, transitions, draws, prior, losses and steps fit together; ``end`` is the total noise at t = 1."""
    columns, least = _rates(kernel)
    a, b = kernel.transition_matrix(0.3), kernel.transition_matrix(1.2, 0.3)
    semigroup = float((b @ a - kernel.transition_matrix(1.2)).abs().max())
    sampled = _draws(kernel)
    by_score, by_x0 = _losses(kernel)
    steps = _steps(kernel)
    told = {
        "log_score": "the score that a prediction of the clean token stands for is that of its law",
        "reverse_rate": "the rate back from z to y is Q[z, y] times the score",
        "analytic": "Tweedie's step for one token is Bayes' rule",
        "posterior": "the ancestral step for one token is Bayes' rule",
    }
    return [
        Check(
            "kernel.rates",
            "columns of Q sum to 0 and its other entries are not negative",
            columns < 1e-12 and least >= 0,
            f"{columns:.1e}, least {least:.1e}",
            "Q written out at five noise levels",
        ),
        _transition(kernel),
        Check(
            "kernel.semigroup",
            "P(t | s) P(s) = P(t)",
            semigroup < 1e-12,
            f"{semigroup:.1e}",
            "Chapman-Kolmogorov at one pair",
        ),
        Check(
            "kernel.sample", "draws of x_t follow P", sampled < 0.02, f"{sampled:.4f}", "total variation, 20,000 draws"
        ),
        check_prior(kernel, end=end),
        Check(
            "kernel.score_entropy",
            "score entropy is sum over y of Q[z, y] (s - r log s + r log r - r)",
            by_score < 1e-9,
            f"{by_score:.1e}",
            "every z and x0, arbitrary scores (SEDD, definition 3.1)",
        ),
        Check(
            "kernel.nelbo",
            "the loss of a prediction is the score entropy of its score",
            by_x0 < 1e-8,
            f"{by_x0:.1e}",
            "every z and x0, arbitrary predictions",
        ),
        *(
            Check(f"kernel.{name}", claim, steps[name] < 1e-8, f"{steps[name]:.1e}", "every z, three pairs of levels")
            for name, claim in told.items()
        ),
        *_rate_bound(kernel),
        check_precision(kernel),
    ]


@torch.no_grad()
def check_prior(kernel: Kernel, *, end: float) -> Check:
    """Sampling starts where noise ends: at total noise ``end``."""
    last = kernel.transition_matrix(end)[:, : kernel.data_tokens]
    rows = kernel.prior(4000, 2, generator=torch.Generator().manual_seed(1), allowed=None)
    prior = torch.bincount(rows.reshape(-1), minlength=kernel.states).double() / rows.numel()
    gap = float((last - prior[:, None]).abs().sum(0).max() / 2)
    floor = 0.0 if float(prior.max()) == 1 else math.sqrt(kernel.states / rows.numel())
    return Check(
        "kernel.prior",
        "noise at t = 1 is the prior",
        gap < 0.01 + 3 * floor,
        f"{gap:.4f}",
        "total variation from the worst token",
    )


def _rate_bound(kernel: Kernel) -> list[Check]:
    """The bound on reverse rates, where the kernel has one: among laws of the clean token the worst is a certain one."""
    if kernel.rate_bound is None:
        return []
    fastest = 0.0
    for sigma in (*LEVELS, 1e-4, 9.0):
        q = kernel.rate_matrix(sigma)
        for z, _, seen in _cases(kernel, sigma):
            moving = q[z] * seen / seen[z]
            fastest = max(fastest, float(moving.sum() - moving[z]) * -math.expm1(-sigma))
    return [
        Check(
            "kernel.rate_bound",
            "no reverse rate is above the bound that uniformization draws by",
            fastest <= kernel.rate_bound * (1 + 1e-9),
            f"{fastest:.4g} of {kernel.rate_bound:.4g}",
            "every z and x0 at five noise levels",
        )
    ]


def _neighbour(kernel: Kernel) -> int:
    """Where token 0 goes first, which is a state that it can be seen as at the least noise."""
    clean = torch.zeros(1, 4096, dtype=torch.int64)
    random = Randomness(torch.Generator().manual_seed(9))
    for sigma in LITTLE[2:]:
        seen = kernel.sample(
            clean, torch.tensor([sigma]), random=random, corrupt=torch.ones_like(clean, dtype=torch.bool)
        )
        moved = seen[seen > 0]
        if len(moved):
            return int(moved.mode().values)
    return kernel.states - 1


@torch.no_grad()
def check_precision(kernel: Kernel) -> Check:
    """Losses in float32 beside float64, at the kernel's own number of states: SEDD's uniform loss is NaN there."""
    n, worst, generator = kernel.states, 0.0, torch.Generator().manual_seed(8)
    raw = torch.randn(1, 3, n, generator=generator)
    x0 = torch.tensor([[0, 1, kernel.data_tokens - 1]])
    xt = x0.clone()
    xt[0, 0] = _neighbour(kernel)
    for sigma in LITTLE:
        for form in ("score_entropy", "nelbo"):
            values = []
            for dtype in (torch.float32, torch.float64):
                head = raw.to(dtype)
                if form == "nelbo":
                    head = head.masked_fill(torch.arange(n) >= kernel.data_tokens, -1e6).log_softmax(-1)
                values.append(getattr(kernel, form)(head, xt, x0, torch.tensor([sigma]).to(dtype)).double())
            gap = (values[0] - values[1]).abs() / (values[1].abs() + 1e-3)
            worst = max(worst, float(gap.nan_to_num(nan=math.inf).max()))
    return Check(
        "kernel.float32",
        "losses are as good in float32, at the least noise too",
        worst < 1e-4,
        f"{worst:.1e}",
        f"against float64, {n:,} states, total noise from {min(LITTLE):g} to {max(LITTLE):g}",
    )
