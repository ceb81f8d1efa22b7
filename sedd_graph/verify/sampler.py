"""Verification of samplers of token rows with a perfect network: the distribution of samples, and the conditions.

Axes: b rows, l positions, n states, v data tokens, s sequences.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.sampler_chain import check_chain
from sedd_graph.verify.sampler_conditions import check_conditions, check_random
from sedd_graph.verify.statistics import chi_distance
from sedd_graph.verify.toy import ALONE, PAIR, TRIPLE, Make, Toy, make_toy, toy_parts
from sedd_graph.verify.worst import worst

__all__ = ["check_sampler", "prove_sampler"]

LEAST_ORDER = 0.3
"""Least order of convergence that samples are extrapolated with; with a lower one nothing would be left to verify."""
CONDITIONED = 4000
"""Number of samples given prompts, whose distribution is verified; fewer if the sampler takes many evaluations."""
MOST_STEPS = 512
"""Largest declared number of steps that a sampler is verified with."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of samples and of sampler steps in the verification of a sampler: ``quick`` has one set, ``full`` another.

    Attributes:
        rows: Number of samples, for each number of steps, on the toy with dependent tokens.
        alone: Number of samples, for each number of steps, on the toy with two independent tokens.
        steps: A smaller and a larger number of steps, from which samples are extrapolated to infinitely many steps.
        few: Small numbers of steps, for a sampler that declares that independent tokens are exact at any number.
        budget: Limit on the entries of all network outputs of a run (rows * evaluations per row * l * n), which reduces
            the number of rows of a sampler that chooses its number of steps itself.
    """

    rows: int
    alone: int
    steps: tuple[int, int]
    few: tuple[int, ...]
    budget: int


SIZES = {
    "full": Sizes(20_000, 100_000, (64, 256), (1, 2, 5), 20_000_000),
    "quick": Sizes(6000, 25_000, (16, 64), (2,), 2_000_000),
}


@torch.no_grad()
def prove_sampler(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify that samples drawn with a perfect network follow the distribution of the data, and the conditions on them.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that the sampler reads: ``log_score`` or ``log_x0``.
        proof: Strength of the verification; ``quick`` draws fewer samples with fewer steps.

    Returns:
        The results of the checks.
    """

    def run() -> list[Check]:
        toy = make_toy(make, TRIPLE if make(None).objective.block is None else PAIR)
        return check_sampler(toy, Toy(toy_parts(make, ALONE.tokens), ALONE, whole=True), output, proof)

    return guarded("sampler", run)


@torch.no_grad()
def check_sampler(toy: Toy, alone: Toy, output: str, proof: Proof = "full") -> list[Check]:
    """Verify a sampler with a perfect network on two small data sets with known distributions.

    The checks are:

    - ``sampler.clean``: samples consist of data tokens.
    - ``sampler.law``: samples follow the data distribution. For a sampler that is declared heuristic,
      ``sampler.heuristic`` reports the deviation instead, without a verdict.
    - ``sampler.bound``, only for an exact sampler: the probability of every move is in range.
    - ``sampler.alone``, not for a heuristic sampler: independent tokens follow the data distribution.
    - ``sampler.conditions``: prompts are kept, and only allowed tokens are drawn.
    - ``sampler.random``: samples depend on the seed and the initial noise alone.
    - ``sampler.runs``: reported alone, as failed, if the sampler raises an error.

    Args:
        toy: Data set whose tokens depend on each other.
        alone: Data set of independent tokens.
        output: Kind of network output that the sampler reads: ``log_score`` or ``log_x0``.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer samples.

    Returns:
        The results of the checks.
    """
    return guarded("sampler", lambda: _checks(toy, alone, output, SIZES[proof]))


def _checks(toy: Toy, alone: Toy, output: str, sizes: Sizes) -> list[Check]:
    sampler = toy.parts.sampler
    reason = sampler.heuristic()
    if toy.parts.kernel.steps is not None and reason is None:
        law = _chain_law(toy, output, sizes, toy.parts.kernel.steps)
    elif sampler.exact or sampler.steps is None or reason is not None:
        law = _one_law(toy, output, sizes, reason)
    else:
        law = _limit(toy, output, sizes)
    found = [law.clean, law.check]
    if sampler.exact:
        claim, how = "every probability of a move is in range", f"{sampler.evaluations:,} evaluations"
        found.append(Check("sampler.bound", claim, law.clamped == 0, f"{law.clamped} out of range", how))
    if reason is None:
        found.append(_check_alone(alone, output, sizes))
    rows = min(CONDITIONED, law.rows)
    return [*found, check_conditions(toy, alone, output, law.bias, rows), check_random(alone, output)]


@dataclasses.dataclass(frozen=True)
class _Law:
    """Verdicts on the distribution of samples of dependent tokens.

    Attributes:
        clean: The check that samples hold data tokens only.
        check: The check of their distribution.
        clamped: Number of probabilities out of range.
        bias: Estimated chi-distance from the data distribution at the fewer steps, beyond chance.
        rows: Number of samples that the distribution was verified with, for each number of steps.
    """

    clean: Check
    check: Check
    rows: int
    clamped: int = 0
    bias: float = 0.0


def draw_rows(toy: Toy, output: str, rows: int, steps: int | None, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Return initial noise and the samples that it gives, int64 [b, l] each."""
    kernel, generator = toy.parts.kernel, torch.Generator().manual_seed(seed)
    x = kernel.prior(rows, toy.length, generator=generator, allowed=None)
    free = torch.ones_like(x, dtype=torch.bool)
    settings = WalkSettings(free=free, kernel=kernel, schedule=toy.parts.schedule, generator=generator)
    return x, toy.sample(x, output, settings, steps)


def affordable(toy: Toy, output: str, rows: int, budget: int) -> int:
    """Return ``rows``, or fewer for a sampler without a number of steps that evaluates the network often."""
    if toy.parts.sampler.steps is not None:
        return rows
    draw_rows(toy, output, 50, None)
    each = toy.parts.sampler.evaluations / 50 * toy.states * toy.length
    return max(500, min(rows, round(budget / max(1.0, each))))


def _cleanness(toy: Toy, runs: list[Tensor]) -> Check:
    wrong = sum(int(((rows < 0) | (rows >= toy.tokens)).sum()) for rows in runs)
    claim = "samples hold no mask"
    value = f"{wrong} masks" if wrong else "0 masks"
    return Check("sampler.clean", claim, wrong == 0, value, f"{sum(map(len, runs)):,} rows")


def _frequencies(toy: Toy, rows: Tensor) -> Tensor:
    """Return the shares of all sequences among samples, float64 [s]."""
    return toy.counts(rows.clamp(0, toy.tokens - 1)) / len(rows)


def _variation(found: Tensor, law: Tensor) -> float:
    return float((found - law).abs().sum() / 2)


def _one_law(toy: Toy, output: str, sizes: Sizes, reason: str | None) -> _Law:
    """Verify a sampler that is exact, at two steps, or has no number of steps; or measure a heuristic one."""
    sampler = toy.parts.sampler
    steps = None if sampler.steps is None else 2 if reason is None else sizes.steps[0]
    rows = affordable(toy, output, sizes.rows, sizes.budget)
    _, out = draw_rows(toy, output, rows, steps)
    found, clamped = _frequencies(toy, out), sampler.clamped
    taken = f"{steps} steps" if steps else f"{sampler.evaluations / rows:.1f} evaluations a row"
    distance, chance, _ = chi_distance(found, toy.law, rows=rows)
    how = f"{taken}, {rows:,} rows of {toy.length} dependent tokens"
    value = f"total variation {_variation(found, toy.law):.4f}"
    clean = _cleanness(toy, [out])
    if reason is not None:
        return _Law(clean, Check("sampler.heuristic", sampler.claim(), None, value, how), rows)
    value = f"{value}, chi {distance:.4f} (chance alone: up to {chance:.4f})"
    return _Law(clean, Check("sampler.law", sampler.claim(), distance < chance, value, how), rows, clamped)


def _limit(toy: Toy, output: str, sizes: Sizes) -> _Law:
    """Verify a sampler whose samples converge with more steps: at two numbers of steps, their limit, and as declared."""
    found, runs = extrapolate(toy, output, sizes.rows, sizes.steps)
    value = f"chi {found.distance:.4f} in the limit (chance alone: up to {found.limit:.4f}), {found.bias:.4f} at {found.steps[0]} steps"
    holds, few = found.distance < found.limit and found.bias < most_bias(toy, found.steps[0]), found.steps[0]
    steps = toy.parts.sampler.steps
    how = f"{found.steps[0]} and {found.steps[1]} steps, {sizes.rows:,} rows of {toy.length} dependent tokens each"
    if steps is not None and 8 <= steps <= MOST_STEPS and steps not in found.steps:
        _, out = draw_rows(toy, output, sizes.rows, None, seed=14)
        runs.append(out)
        share = (few / steps) ** order_of(toy)
        expected = toy.law + share * found.off
        gap, chance, _ = chi_distance(
            _frequencies(toy, out) - expected + toy.law, toy.law, rows=sizes.rows / (1 + found.noise * share**2)
        )
        chance += 2 * (share * found.bias) ** 2
        value += f", {gap:.4f} from what they predict at the declared {steps} steps (up to {chance:.4f})"
        holds = holds and gap < chance
    check = Check("sampler.law", toy.parts.sampler.claim(), holds, value, how)
    return _Law(_cleanness(toy, runs), check, sizes.rows, bias=found.bias)


def _chain_law(toy: Toy, output: str, sizes: Sizes, total: int) -> _Law:
    """Verify a sampler of a kernel in discrete time: samples follow the law of its chain, at any number of steps."""
    declared = toy.parts.sampler.steps or total
    counts = sorted({min(v, total) for v in (2, declared if declared <= MOST_STEPS else sizes.steps[1])})
    runs = {steps: draw_rows(toy, output, sizes.rows, steps, seed=4 + steps)[1] for steps in counts}
    check, bias = check_chain({steps: _frequencies(toy, out) for steps, out in runs.items()}, toy, total, sizes.rows)
    return _Law(_cleanness(toy, list(runs.values())), check, sizes.rows, bias=bias)


def order_of(toy: Toy) -> float:
    """Return the declared order of convergence, at least :data:`LEAST_ORDER`."""
    return max(LEAST_ORDER, min(1.0, toy.parts.sampler.order))


def most_bias(toy: Toy, steps: int) -> float:
    """Return the largest accepted chi-distance between samples of ``steps`` steps and their limit of infinitely many.

    The chi-distance between frequencies f and probabilities p is the square root of the sum of (f - p)^2 / p.
    """
    return 0.15 + 40.0 / steps


@dataclasses.dataclass(frozen=True)
class Limit:
    """Richardson extrapolation of the frequencies of samples to infinitely many steps.

    It combines a run with fewer and a run with more steps by the order of convergence that the sampler declares. The
    chi-distance between frequencies f and probabilities p is the square root of the sum of (f - p)^2 / p.

    Attributes:
        distance: Chi-distance between the extrapolated frequencies and the data distribution.
        limit: Tolerance of ``distance``: what chance gives, plus an estimate of the next order of the error in the
            step size.
        bias: Estimated chi-distance between the run with fewer steps and the extrapolation, without the part that
            chance explains.
        off: Frequency of each sequence in the run with fewer steps minus the extrapolated one, float64 [s].
        noise: Variance of ``off`` divided by the variance of the frequencies of one run.
        steps: The smaller and the larger number of steps.
    """

    distance: float
    limit: float
    bias: float
    off: Tensor
    noise: float
    steps: tuple[int, int]


def extrapolate(toy: Toy, output: str, rows: int, steps: tuple[int, int]) -> tuple[Limit, list[Tensor]]:
    """Draw samples at two numbers of steps, and extrapolate their frequencies to infinitely many steps.

    If the sampler refuses a number of steps as too small (:class:`~sedd_graph.errors.UserError`), both are multiplied
    by 4, repeatedly if necessary.

    Args:
        toy: Data set with a known distribution, and a perfect network for it.
        output: Kind of network output that the sampler reads: ``log_score`` or ``log_x0``.
        rows: Number of samples b at each number of steps.
        steps: The smaller and the larger number of steps.

    Returns:
        The extrapolation; and the samples at the smaller and the larger number of steps, int64 [b, l] each.

    Raises:
        UserError: The sampler still refuses after the larger number of steps has exceeded :data:`MOST_STEPS`.
    """
    try:
        runs = [draw_rows(toy, output, rows, count, seed=4 + i)[1] for i, count in enumerate(steps)]
    except UserError:
        if steps[1] > MOST_STEPS:
            raise
        return extrapolate(toy, output, rows, (4 * steps[0], 4 * steps[1]))
    fewer, more = (_frequencies(toy, run) for run in runs)
    ratio = (steps[1] / steps[0]) ** order_of(toy)
    limit = (ratio * more - fewer) / (ratio - 1)
    off, noise = (fewer - more) * ratio / (ratio - 1), 2 * (ratio / (ratio - 1)) ** 2
    apart = chi_distance(toy.law + off, toy.law, rows=rows)
    bias = math.sqrt(worst(0.0, apart.value**2 - noise * apart.cells / rows))
    own = rows * (ratio - 1) ** 2 / (ratio**2 + 1)
    distance, chance, _ = chi_distance(limit, toy.law, rows=own)
    return Limit(distance, chance + 2 * bias**2 / ratio, bias, off, noise, steps), runs


def _check_alone(toy: Toy, output: str, sizes: Sizes) -> Check:
    """Verify that independent tokens have the distribution of the data, at any number of steps if that is declared."""
    sampler, claim = toy.parts.sampler, "independent tokens follow the distribution of the data"
    if not sampler.alone(toy.parts.kernel):
        rows = sizes.alone // 2
        found, _ = extrapolate(toy, output, rows, sizes.steps)
        value = f"chi {found.distance:.4f} in the limit (chance alone: up to {found.limit:.4f})"
        how = f"{found.steps[0]} and {found.steps[1]} steps, {2 * rows:,} tokens each"
        holds = found.distance < found.limit and found.bias < most_bias(toy, found.steps[0])
        return Check("sampler.alone", claim, holds, value, how)
    every: list[int | None] = [None] if sampler.steps is None else [*sizes.few, min(sampler.steps, MOST_STEPS)]
    rows = affordable(toy, output, sizes.alone, sizes.budget)
    largest, at = -math.inf, ""
    taken = []
    for steps in every:
        count = rows if steps is None else max(2000, min(rows, rows * 20 // steps))
        try:
            x, out = draw_rows(toy, output, count, steps, seed=31)
        except UserError:  # steps that are too long for the kernel are refused, which is no wrong sample
            if steps is None or steps == every[-1]:
                raise
            continue
        distance, chance, _ = chi_distance(_frequencies(toy, out), reachable(toy, x), rows=count)
        taken.append("its own" if steps is None else str(steps))
        ratio = worst(distance / chance) if chance > 0 else math.inf  # no chance: a state of probability 0 was drawn
        if ratio > largest:
            largest, at = ratio, f"chi {distance:.4f} (chance alone: up to {chance:.4f}) at {taken[-1]} steps"
    how = f"{' and '.join(taken)} steps, up to {2 * rows:,} tokens each"
    return Check("sampler.alone", f"{claim}, at any number of steps", largest < 1, at, how)


def reachable(toy: Toy, x: Tensor) -> Tensor:
    """Return the distribution of clean rows given initial noise at t = 1, for independent tokens, float64 [s].

    Args:
        toy: Independent tokens.
        x: Initial noise, int64 [b, l].
    """
    codes, counts = torch.unique(toy.code(x, toy.states), return_counts=True)
    first = torch.stack([codes // toy.states**i % toy.states for i in reversed(range(toy.length))], 1)
    end = toy.parts.schedule.sigma(torch.ones(len(first), dtype=torch.float64))
    share = toy.law.reshape(toy.tokens, -1).sum(1)
    each = toy.likelihood(first, end) * share
    each = each / each.sum(-1, keepdim=True)
    joint = torch.ones(len(first), len(toy.law), dtype=torch.float64)
    for i in range(toy.length):
        joint = joint * each[:, i][:, toy.sequences[:, i]]
    law: Tensor = (joint * (counts / len(x))[:, None]).sum(0)
    return law
