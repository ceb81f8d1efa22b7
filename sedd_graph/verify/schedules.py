"""Verification of noise schedules at random times that are dense at both ends of [0, 1].

Comparisons are in float64, then float32 is compared with float64. Notation: t time, sigma total noise. Axes: k times.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.worst import worst

__all__ = ["check_schedule", "final_sigma"]

TIMES = {"full": 200_000, "quick": 20_000}
"""Number of random times at which total noise and its rate are verified."""
FEW = 200
"""Number of random times at which the inherited bisection of ``Schedule.time`` is verified, and each value by itself."""
APART = 1e-3
"""Distance of two times between which total noise must increase by more than rounding."""
NEAREST = 1e-8
"""Distance of the first and last random time from 0 and from 1."""
SPARSE = 10
"""Every tenth time is also verified in float32."""
NEAREST_FLOAT32 = 1e-6
"""Least time at which float32 is verified; samplers and objectives do not go below 1e-5."""
_EPS = 2.0**-52


@torch.no_grad()
def final_sigma(schedule: Schedule) -> float:
    """Return the total noise sigma(1) of a noise schedule, at the final time t = 1."""
    return float(schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))


@torch.no_grad()
def check_schedule(schedule: Schedule, proof: Proof = "full") -> list[Check]:
    """Verify a noise schedule: total noise sigma(t), its rate d sigma / dt, and the inverse t(sigma).

    The rate must be the derivative of sigma at all times, narrow stretches of time included; sigma must be positive,
    finite and increasing on (0, 1]; ``time`` must invert it; and float32 must agree with float64. (A published library
    has shipped a schedule whose rate is not the derivative.)

    Args:
        schedule: The noise schedule.
        proof: Strength of the verification: ``quick`` takes fewer times.

    Returns:
        The results of the checks.
    """
    t = _times(TIMES[proof])
    sigma, rate = schedule.sigma(t), schedule.dsigma(t)
    checks = [
        _check_rate(t, sigma, rate),
        _check_range(schedule, t, sigma, rate),
        _check_float32(schedule, t),
        _check_time(schedule, t, sigma, rate),
        _check_pointwise(schedule, t, sigma, rate),
    ]
    return [*checks, *_check_learned(schedule)]


def _times(count: int) -> Tensor:
    """Return ``count`` times in order, float64 [k]: a third each uniform, and dense towards 0 and towards 1.

    Neighbouring distances differ little, and each time is random within a fifth of them.
    """
    near = np.geomspace(NEAREST, 0.5, 4_000)
    knots = np.concatenate([near, 1 - near[::-1]])
    scale = math.log(1 / NEAREST)
    share = (knots + 1 + np.log(knots) / scale + np.log(1 - knots) / -scale) / 3
    u = torch.rand(count, generator=torch.Generator().manual_seed(11), dtype=torch.float64).numpy()
    places = share[0] + (share[-1] - share[0]) * (np.arange(count) + 0.4 + 0.2 * u) / count
    last = 1 - NEAREST * torch.linspace(0, 1, 32, dtype=torch.float64)
    times: Tensor = torch.cat([torch.from_numpy(np.interp(places, share, knots)), last]).unique()
    return times


def _check_rate(t: Tensor, sigma: Tensor, rate: Tensor) -> Check:
    """Verify that the increase of sigma between neighbouring times is the integral of the rate (trapezoidal rule).

    The tolerance at each pair of times is the error of the rule itself, estimated by leaving out every second time, and
    the rounding of sigma. So a rate that jumps, as that of a piecewise linear schedule, is accepted.
    """
    step, rise = t.diff(), sigma.diff()
    area = step * (rate[1:] + rate[:-1]) / 2
    coarse = (step[1:] + step[:-1]) * (rate[2:] + rate[:-2]) / 2
    doubt = (coarse - area[1:] - area[:-1]).abs()
    rule = torch.maximum(torch.nn.functional.pad(doubt, (0, 1)), torch.nn.functional.pad(doubt, (1, 0)))
    rounding = _rounding(sigma, rate)
    excess = ((rise - area).abs() - 2 * rule - rounding).clamp(min=0) / torch.maximum(rise.abs(), area.abs()).clamp(
        1e-300
    )
    error = float(excess.nan_to_num(nan=math.inf).max())
    claim = "the rate is the derivative of total noise"
    how = f"integral of the rate between each two of {len(t):,} random times, dense at both ends, relative"
    return Check.below("schedule.rate", claim, error, 1e-5, how)


def _rounding(sigma: Tensor, rate: Tensor) -> Tensor:
    """Return the rounding error of the differences of sigma [k], [k - 1], if sigma and t are each off by a few ulp."""
    return 16 * _EPS * (1 + (sigma[1:] + sigma[:-1] + rate[1:] + rate[:-1]).abs())


def _check_range(schedule: Schedule, t: Tensor, sigma: Tensor, rate: Tensor) -> Check:
    """Verify that sigma is positive, finite and increasing, and its rate finite and not negative."""
    ends = torch.tensor([1e-6, 1.0])
    values = torch.cat([v.double() for v in (sigma, rate, schedule.sigma(ends), schedule.dsigma(ends))])
    before = t <= 1 - APART
    later = torch.searchsorted(t, t[before] + APART).clamp(max=len(t) - 1)
    rises = bool((sigma.diff() >= -_rounding(sigma, rate)).all()) and bool((sigma[later] > sigma[before]).all())
    holds = bool(values.isfinite().all()) and bool((sigma > 0).all()) and bool((rate >= 0).all()) and rises
    claim = "total noise is positive, finite and increasing on (0, 1], in float32 at both ends"
    value = f"sigma(1) = {float(schedule.sigma(ends)[1]):.3g}"
    return Check("schedule.range", claim, holds, value, f"{len(t):,} random times, dense at both ends")


def _check_float32(schedule: Schedule, t: Tensor) -> Check:
    """Verify sigma, its rate and the weight of the cross-entropy in float32."""
    single = torch.cat(
        [t[t >= NEAREST_FLOAT32][::SPARSE].float(), torch.tensor([NEAREST_FLOAT32, 1e-3, 0.5, 1.0])]
    ).unique()
    found, exact = (
        torch.stack([s.double(), d.double(), (d / torch.expm1(s)).double()])
        for s, d in ((schedule.sigma(x), schedule.dsigma(x)) for x in (single, single.double()))
    )
    # numbers that underflow in float32 are compared as if they were 1e-30
    error = float(((found - exact).abs() / exact.abs().clamp(min=1e-30)).nan_to_num(nan=math.inf).max())
    claim = "total noise, its rate and the weight of the cross-entropy are accurate in float32"
    how = f"against float64 at {len(single):,} times from {NEAREST_FLOAT32:g} to 1, relative"
    return Check.below("schedule.float32", claim, error, 1e-4, how)


def _check_time(schedule: Schedule, t: Tensor, sigma: Tensor, rate: Tensor) -> Check:
    """Verify that ``time`` inverts sigma, and is 0 or 1 outside its range.

    The error is measured in total noise, since t is not determined where the rate is 0.
    """
    if type(schedule).time is Schedule.time:  # bisection fails only where sigma does not increase
        some = torch.randperm(len(t), generator=torch.Generator().manual_seed(12))[:FEW]
        t, sigma, rate = t[some], sigma[some], rate[some]
    back = schedule.time(sigma)
    error = (schedule.sigma(back) - sigma).abs() / (sigma + 1e-3)
    error = torch.where((back >= 0) & (back <= 1), error, math.inf)
    single = schedule.time(sigma.float())
    # float32 times are multiples of about 1e-7, so that sigma is known to its rate times that
    apart = (schedule.sigma(single.double()) - sigma).abs() / (1e-5 * sigma + 1e-6 * (1 + rate) + 1e-6)
    low, high = schedule.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    outside = schedule.time(torch.tensor([low / 2, 2 * high + 1], dtype=torch.float64))
    ends = (outside - torch.tensor([0.0, 1.0], dtype=torch.float64)).abs().max()
    largest = torch.stack([error.max(), (apart.max() / 1e8).to(error), ends]).nan_to_num(nan=math.inf)
    claim = "the time at total noise sigma(t) is t, in float32 too, and 0 or 1 outside the range of sigma"
    return Check.below("schedule.time", claim, float(largest.max()), 1e-8, f"{len(t):,} random times, in total noise")


def _check_pointwise(schedule: Schedule, t: Tensor, sigma: Tensor, rate: Tensor) -> Check:
    """Verify that each time has a value of its own: alone, in another order, in another shape, and asked again."""
    generator = torch.Generator().manual_seed(13)
    order = torch.randperm(len(t), generator=generator)[:FEW]
    some = order[:16]
    before, asked = generators_state(), t.clone()
    error = 0.0
    for method, known in ((schedule.sigma, sigma), (schedule.dsigma, rate)):
        table = method(t[some].view(4, 4)).reshape(-1)
        alone = torch.cat([method(t[i : i + 1]) for i in some[:8].tolist()])
        for found, expected in ((method(t[order]), known[order]), (table, known[some]), (alone, known[some[:8]])):
            error = worst(error, float(((found - expected).abs() / (expected.abs() + 1e-12)).max()))
        error = worst(error, 0.0 if method(t[some].float()).dtype == torch.float32 else math.inf)
    clean = torch.equal(asked, t) and generators_state() == before
    error = error if clean and math.isfinite(error) and sigma.dtype == rate.dtype == torch.float64 else math.inf
    claim = "the values at a time depend on that time alone, and have its dtype"
    how = "in another order and shape, one by one, and again; inputs and global generators unchanged"
    return Check.below("schedule.pointwise", claim, error, 1e-9, how)


def _check_learned(schedule: Schedule) -> list[Check]:
    """Verify a schedule with trained parameters at other values of its parameters."""
    trained = [p for p in schedule.parameters() if p.requires_grad]
    if not trained and not schedule.learned:
        return []
    claim = "with other parameters the schedule is sound too, and its noise at t = 0 and t = 1 is the same"
    if not schedule.learned or not trained:
        value = "trained parameters, but 'learned' is False" if trained else "'learned' without trained parameters"
        return [Check("schedule.learned", claim, False, value, "declarations")]
    other, generator = copy.deepcopy(schedule), torch.Generator().manual_seed(14)
    for parameter in other.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    t = _times(TIMES["quick"])
    sigma, rate = other.sigma(t), other.dsigma(t)
    failing = [c for c in (_check_rate(t, sigma, rate), _check_range(other, t, sigma, rate)) if not c.holds]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gap = float(((other.sigma(ends) - schedule.sigma(ends)).abs() / (1e-3 + schedule.sigma(ends))).max())
    value = "; ".join([f"{gap:.1e} at the ends", *(f"{c.name}: {c.value}" for c in failing)])
    return [Check("schedule.learned", claim, gap < 1e-6 and not failing, value, "one random change of the parameters")]
