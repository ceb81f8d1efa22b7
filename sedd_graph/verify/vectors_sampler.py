"""Verification of samplers of vectors: one step from a known distribution, the law of samples, and conditions.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import posterior
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorWalk, VectorWalkSettings
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.vectors_toy import TOKENS, Toy, level
from sedd_graph.verify.worst import worst

__all__ = ["check_sampler"]

ROWS = {"full": 40_000, "quick": 10_000}
"""Number of sampled rows whose law is verified."""
STEPS = {"full": 100, "quick": 60}
"""Number of steps of these samples, limited to those of the process."""
POINTS = {"full": 2**13, "quick": 2**11}
"""Number of initial vectors of a sampler that draws no noise."""
LAST = {"full": 96, "quick": 48}
"""Largest number of steps of such a sampler."""
LEAST_ORDER = 1 / 3
"""Least order that is fitted over the whole road from few steps, as a share of the declared one, which is that of many steps."""
GRAIN = {"full": 0.006, "quick": 0.012}
"""Largest total variation distance that the finite number of initial vectors causes."""
BIAS = 0.5
"""Largest total variation distance of samples, times the number of steps to the power of the declared order."""
SIGMAS = 7.0
"""Number of standard errors that a mean or variance of draws may be off; sound draws never are."""


def check_sampler(parts: VectorParts, output: str, proof: Proof) -> list[Check]:
    """Verify the sampler of a process on vectors.

    Args:
        parts: Components of the process, with few tokens.
        output: Name of the network's output, ``x0`` or ``logits``.
        proof: Strength of the verification.
    """
    return [
        _check_variance(parts),
        _check_step(parts, output, ROWS[proof]),
        _check_law(parts, output, proof) if _draws_noise(parts, output) else _check_limit(parts, output, proof),
        _check_conditions(parts, output),
    ]


def _settings(parts: VectorParts, shape: tuple[int, int], seed: int, **more: object) -> VectorWalkSettings:
    free = torch.ones(shape, dtype=torch.bool)
    tokens = torch.zeros(shape, dtype=torch.int64)
    base = VectorWalkSettings(
        kernel=parts.kernel,
        schedule=parts.schedule,
        generator=torch.Generator().manual_seed(seed),
        tokens=tokens,
        free=free,
    )
    return VectorWalkSettings(**{**base.__dict__, **more})


@torch.no_grad()
def _check_variance(parts: VectorParts) -> Check:
    """Verify that the variance of the reverse step lies between that given x_0 and that of the forward step."""
    kernel, schedule = parts.kernel, parts.schedule
    total = kernel.steps or 1000
    t = torch.arange(2, total + 1, max(1, total // 200), dtype=torch.float64) / total
    lower, sigma = kernel.sigma(schedule, t - 1 / total), kernel.sigma(schedule, t)
    found = kernel.reverse_variance(lower, sigma, schedule)
    bar = torch.tensor([level(schedule, float(v)) for v in t], dtype=torch.float64)
    below = torch.tensor([level(schedule, float(v) - 1 / total) for v in t], dtype=torch.float64)
    most = 1 - bar / below
    least = most * (1 - below) / (1 - bar)
    error = float(torch.maximum(least - found, found - most).max())
    claim = "the variance of the reverse step is between that of q(x_s | x_t, x_0) and that of the forward step"
    return Check.below("vectors.variance", claim, max(error, 0.0), 1e-9, f"{len(t)} steps")


@torch.no_grad()
def _check_step(parts: VectorParts, output: str, count: int) -> Check:
    """Verify single steps with a network that is certain of the clean vector.

    From x_t of known distribution, x_s must be normal around sqrt(alpha_bar_s) times the vector, with variance 1 -
    alpha_bar_s, or more by what the kernel's reverse variance exceeds that of q(x_s | x_t, x_0).
    """
    kernel, sampler = parts.kernel, parts.sampler
    certain = kernel.embed(torch.tensor([[1]])).float()[0, 0]
    if output == "logits":
        chosen = torch.full((TOKENS,), -100.0)
        chosen[1] = 0.0

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        if output == "logits":
            return {"logits": chosen.expand(*x.shape[:2], -1)}
        return {"x0": certain.expand_as(x), "logits": torch.zeros(*x.shape[:2], TOKENS)}

    largest, where = 0.0, ""
    plain = _plain(sampler)
    for number, pair in enumerate(_pairs(parts, plain, _denoiser(run, parts, 1))):
        x, last = _one_step(parts, plain, run, pair, certain, count, 60 + number)
        score = _score(parts, plain.bias(float(pair[0] - pair[1])), pair, x, certain.double())
        if not (last - certain).abs().max() < 1e-4:
            score, where = math.inf, "the last step does not end at the estimate"
        if not score <= largest:
            largest, where = score, where or f"t = {float(pair[0]):.4g} to {float(pair[1]):.4g}"
    claim = "a step leads from the distribution at t to that at s where the network is certain of the clean vector"
    how = f"mean and variance of {count:,} draws, {where}, in standard errors"
    return Check.below("vectors.step", claim, largest, SIGMAS, how, digits=".2f")


def _pairs(parts: VectorParts, sampler: VectorSampler, denoise: Denoiser) -> list[Tensor]:
    """Return pairs of times (t, s), float64 [2]: of 4 and of 12 steps, and steps of the process itself."""
    walk, total = VectorWalk(denoise, _settings(parts, (1, 1), 50), clamp=False), parts.kernel.steps
    grids = [sampler.times(walk, min(steps, total or steps)) for steps in (4, 12)]
    pairs = [grid[i : i + 2] for grid in grids for i in range(len(grid) - 1)]
    if total is not None:
        own = (i for i in {2, 3, 5, total // 4, total} if 2 <= i <= total)
        pairs += [torch.tensor([i, i - 1], dtype=torch.float64) / total for i in own]
    return pairs


def _score(parts: VectorParts, bias: float, pair: Tensor, x: Tensor, certain: Tensor) -> float:
    """Return the error of mean and variance of x_s [b, d], float64, in standard errors."""
    kernel, schedule = parts.kernel, parts.schedule
    below, above = level(schedule, float(pair[1])), level(schedule, float(pair[0]))
    lower, sigma = (torch.tensor([-math.log(v)], dtype=torch.float64) for v in (below, above))
    extra = float(kernel.reverse_variance(lower, sigma, schedule) - posterior(lower, sigma).variance)
    scores = []
    for variance in {1 - below, 1 - below + extra}:
        z = (x - below**0.5 * certain) / variance**0.5
        mean = worst(0.0, float(z.mean(0).abs().max()) - bias) * math.sqrt(len(z))
        square = worst(0.0, abs(float(z.square().mean()) - 1) - bias) * math.sqrt(z.numel() / 2)
        scores.append(worst(mean, square))
    return min(scores) if math.isfinite(extra) else math.inf


def _denoiser(run: object, parts: VectorParts, count: int, length: int = 1) -> Denoiser:
    attend = torch.ones(count, length, dtype=torch.bool)
    return Denoiser(run, parts.kernel, parts.schedule, attend)  # type: ignore[arg-type]  # a function of the inputs


def _plain(sampler: VectorSampler, **changes: object) -> VectorSampler:
    """Return the sampler without clamping and conditions, or with the Config keys ``changes``."""
    known = {"clamp": False, "forbid": (), "allow": {}}
    return type(sampler)(sampler.config.model_copy(update={**known, **changes}), sampler.context)


def _one_step(
    parts: VectorParts, sampler: VectorSampler, run: object, pair: Tensor, certain: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return x_s [b, d], float64, after one step from x_t of known distribution, and the final vectors [b, 1, d]."""
    seen: list[Tensor] = []
    walks: list[VectorWalk] = []

    def on_step(number: int, rows: Tensor) -> None:
        if walks:
            seen.append(walks[0].x.clone())

    settings = _settings(parts, (count, 1), seed, on_step=on_step)
    walk = VectorWalk(_denoiser(run, parts, count), settings, clamp=False)
    bar = level(parts.schedule, float(pair[0]))
    walk.x = bar**0.5 * certain + (1 - bar) ** 0.5 * walk.normal()
    walks.append(walk)
    sampler.walk(walk, pair)
    return seen[0][:, 0].double(), walk.x


@torch.no_grad()
def _check_law(parts: VectorParts, output: str, proof: Proof) -> Check:
    """Verify that samples of rows of two dependent tokens have their probabilities, up to the error of the steps."""
    toy, count = Toy(parts, 2), ROWS[proof]
    steps = min(STEPS[proof], parts.kernel.steps or STEPS[proof])
    denoise = toy.denoiser(parts.objective, output, count)
    rows = _plain(parts.sampler).run(denoise, _settings(parts, (count, 2), 70), steps=steps)
    counts = torch.bincount(rows[:, 0] * TOKENS + rows[:, 1], minlength=TOKENS**2).double()
    away = 0.5 * float((counts / count - toy.chances).abs().sum())
    # the distance of sound draws: half the sum of |errors| of the cells, of mean sqrt(2 / pi) standard deviations
    deviations = (toy.chances * (1 - toy.chances) / count).sqrt()
    noise = 0.5 * float(deviations.sum()) * math.sqrt(2 / math.pi)
    allowed = BIAS / steps**parts.sampler.order + 4 * noise
    claim = "samples follow the distribution of the data with a perfect network, up to the error of the steps"
    how = f"total variation of {count:,} rows of 2 tokens after {steps} steps; the noise of sound draws is {noise:.4f}; limit {allowed:.4f}"
    return Check.below("vectors.law", claim, away, allowed, how, digits=".4f")


def _draws_noise(parts: VectorParts, output: str) -> bool:
    """Return whether a sampler draws random numbers after the initial noise."""
    toy, steps = Toy(parts, 2), min(4, parts.kernel.steps or 4)
    start = torch.randn(16, 2, parts.kernel.width, generator=torch.Generator().manual_seed(71))
    return not torch.equal(*(_run_from(toy, output, start, steps, seed)[0] for seed in (72, 73)))


def _run_from(toy: Toy, output: str, start: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the vectors [b, l, d] before the last evaluation, and the sampled rows int64 [b, l], from initial vectors."""
    sampler, seen, walks = _plain(toy.parts.sampler), list[Tensor](), list[VectorWalk]()

    def on_step(number: int, rows: Tensor) -> None:
        seen.extend(walk.x for walk in walks)

    settings = _settings(toy.parts, (len(start), 2), seed, start=start.float(), on_step=on_step)
    walk = VectorWalk(toy.denoiser(toy.parts.objective, output, len(start)), settings, clamp=False)
    walks.append(walk)
    seen.append(walk.x)
    sampler.walk(walk, sampler.times(walk, steps))
    return seen[-2].double(), walk.rounded()


@torch.no_grad()
def _check_limit(parts: VectorParts, output: str, proof: Proof) -> Check:
    """Verify the law of a sampler that draws no noise, against its own convergence.

    It runs in four numbers of steps from one set of initial vectors, the points of a Sobol sequence, whose frequencies have
    much less error than those of random draws. The slope of the differences between successive runs is the fitted order;
    by it follows how far the last run is from the limit of infinitely many steps. The normal start is not exactly the
    distribution at t = 1: its distance is added, since no function of the vectors increases it.
    """
    toy, most = Toy(parts, 2), min(LAST[proof], parts.kernel.steps or LAST[proof])
    start = _sobol(POINTS[proof], 2 * parts.kernel.width).view(POINTS[proof], 2, -1)
    steps, declared = [max(1, most // share) for share in (8, 4, 2, 1)], parts.sampler.order
    ends, laws = [], []
    for number in steps:
        x, rows = _run_from(toy, output, start, number, 70)
        ends.append(x)
        laws.append(torch.bincount(rows[:, 0] * TOKENS + rows[:, 1], minlength=TOKENS**2).double() / len(rows))
    errors = [float((a - b).abs().mean()) for a, b in itertools.pairwise(ends)]
    # differences as small as the rounding of float32 have no order
    order = math.log2(errors[0] / errors[-1]) / 2 if min(errors) > 1e-5 else declared
    gap = 0.5 * float((laws[-1] - laws[-2]).abs().sum())
    rest = gap / (2 ** min(max(order, LEAST_ORDER * declared), declared) - 1)
    away = 0.5 * float((laws[-1] - toy.chances).abs().sum())
    allowed = 2 * rest + _prior_distance(toy, start) + GRAIN[proof]
    claim = "samples follow the distribution of the data with a perfect network, up to the error of the steps"
    how = (
        f"total variation of {len(start):,} rows of 2 tokens after {most} steps; {gap:.4f} apart after half of them; limit {allowed:.4f}; "
        f"order {order:.2f} fitted to {', '.join(map(str, steps))} steps, at least {LEAST_ORDER * declared:.2f} (declared: {declared:g} for many)"
    )
    falls = order >= LEAST_ORDER * declared or away < 3 * GRAIN[proof]
    return Check("vectors.law", claim, away < allowed and falls, f"{away:.4f}", how)


def _sobol(count: int, width: int) -> Tensor:
    """Return normal points of a scrambled Sobol sequence, float64 [count, width]."""
    points = torch.quasirandom.SobolEngine(width, scramble=True, seed=74).draw(count, dtype=torch.float64)
    normal: Tensor = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9))
    return normal


def _prior_distance(toy: Toy, points: Tensor) -> float:
    """Return the total variation distance of x_t at t = 1 and the normal distribution, at normal points [b, l, d]."""
    signal, variance = (float(v) for v in toy.levels(torch.ones(1, dtype=torch.float64)))
    away = (points[:, None] - signal * toy.clean).square().sum((-2, -1)) / variance
    log = (toy.chances.log() - away / 2).logsumexp(-1) - points[0].numel() / 2 * math.log(variance)
    return 0.5 * float((log + points.square().sum((1, 2)) / 2).expm1().abs().mean())


@torch.no_grad()
def _check_conditions(parts: VectorParts, output: str) -> Check:
    """Verify given tokens, allowed tokens, callbacks, clamping and seeds of a short run."""
    toy, count, wrong = Toy(parts, 2), 64, []
    steps = min(5, parts.kernel.steps or 5)
    denoise = toy.denoiser(parts.objective, output, count)
    seen: list[Tensor] = []
    free = torch.ones(count, 2, dtype=torch.bool)
    free[:, 0] = torch.arange(count) % 2 == 0
    tokens = torch.full((count, 2), 2)
    allowed = torch.tensor([False, True, False])
    for renoise in (True, False):
        seen.clear()
        more = {"tokens": tokens, "free": free, "renoise": renoise, "allowed": allowed}
        before = generators_state()
        made = [
            _plain(parts.sampler, clamp=not parts.kernel.contextual).run(
                denoise, _settings(parts, (count, 2), 80, on_step=lambda _, r: seen.append(r), **more), steps=steps
            )
            for _ in range(2)
        ]
        if before != generators_state():
            wrong.append("a global generator is used")
        if not torch.equal(*made):
            wrong.append("the same seed gives other samples")
        if not bool((made[0][~free] == 2).all()):
            wrong.append("a given token is changed")
        if not bool((made[0][free] == 1).all()):
            wrong.append("a token that is not allowed is returned")
        if len(seen) != 2 * (steps + 1):
            wrong.append(f"{len(seen) // 2 - 1} steps are reported of {steps}")
    claim = "given tokens are kept, other tokens are allowed ones, and the seed determines the samples"
    return Check(
        "vectors.conditions", claim, not wrong, "; ".join(dict.fromkeys(wrong)) or "all", f"{count} rows, {steps} steps"
    )
