"""Schedules against their published formulas in 50 digits: total noise, its derivative, and the weight of cross-entropy."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pydantic
import pytest
import torch
from mpmath import mpf
from sedd_graph_registry.noise.schedules import (
    Cosine,
    CosineSquared,
    Cubic,
    Geometric,
    Linear,
    LogLinear,
    MD4Cosine,
    MutualInformation,
    Polynomial,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_graph.component.base import Context
from sedd_graph.component.registry import installed as registry
from sedd_graph.diffusion.schedule import Schedule

mpmath.mp.dps = 50
PI = mpmath.pi


def keeping(alpha: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Total noise from the chance that a token is kept."""
    return lambda t: -mpmath.log(alpha(t))


def information(t: Any) -> Any:
    """The noise at which a uniform token keeps the share 1 - (1 - eps) t of its information, by root finding."""

    n, eps = 27, mpf("1e-6")

    def kept(log_sigma: Any) -> Any:
        alpha = mpmath.exp(-mpmath.exp(log_sigma))
        same, other = alpha + (1 - alpha) / n, (1 - alpha) / n
        entropy = -same * mpmath.log(same) - (n - 1) * other * mpmath.log(other)
        return entropy / mpmath.log(n) - (1 - eps) * t

    return mpmath.exp(
        mpmath.findroot(kept, (mpf(-40), mpf(4)), solver="bisect", tol=mpf("1e-80"), maxsteps=400, verify=False)
    )


E3 = mpf("0.001")
FORMULAS: list[tuple[Any, dict[str, float], Callable[[Any], Any]]] = [
    (LogLinear, {}, keeping(lambda t: 1 - (1 - E3) * t)),
    (Geometric, {}, lambda t: mpf("1e-4") ** (1 - t) * mpf(20) ** t),
    (Linear, {}, lambda t: mpf("0.1") * t + (20 - mpf("0.1")) * t**2 / 2),
    (Linear, {"rate_min": 10, "rate_max": 10}, lambda t: 10 * t),
    (Cosine, {}, keeping(lambda t: E3 + (1 - E3) * mpmath.cos(PI / 2 * t))),
    (
        Cosine,
        {"offset": 0.008},
        keeping(
            lambda t: (
                E3
                + (1 - E3)
                * mpmath.cos((t + mpf("0.008")) / mpf("1.008") * PI / 2)
                / mpmath.cos(mpf("0.008") / mpf("1.008") * PI / 2)
            )
        ),
    ),
    (CosineSquared, {}, keeping(lambda t: E3 + (1 - E3) * mpmath.cos(PI / 2 * t) ** 2)),
    (Cubic, {}, keeping(lambda t: E3 + (1 - E3) * (1 - t) ** 3)),
    (
        MD4Cosine,
        {},
        keeping(lambda t: (1 - 2 * mpf("1e-4")) * (1 - mpmath.cos(PI / 2 * (1 - t))) + mpf("1e-4")),
    ),
    (Polynomial, {}, keeping(lambda t: 1 - (1 - E3) * t**2)),
    (Polynomial, {"power": 0.5}, keeping(lambda t: 1 - (1 - E3) * mpmath.sqrt(t))),
    (MutualInformation, {}, information),
]


def made(cls: Any, **config: float) -> Any:
    return cls(cls.Config(**config), Context({"n": 27}))


@pytest.mark.parametrize(
    ("cls", "config", "formula"), FORMULAS, ids=[f"{c.__name__}{i}" for i, (c, *_) in enumerate(FORMULAS)]
)
@pytest.mark.parametrize("t", [1e-6, 1e-4, 0.01, 0.3, 0.49, 0.51, 0.9, 0.9999, 1 - 2**-20])
def test_float32_is_the_formula(cls: Any, config: dict[str, float], formula: Callable[[Any], Any], t: float) -> None:
    """In both precisions, at the number that float32 makes of t. Where rounding t itself moves the formula, that much is allowed."""
    s = made(cls, **config)
    single = torch.tensor([t])
    exact_t = mpf(single.item())
    sigma = formula(exact_t)
    dsigma = mpmath.diff(formula, exact_t, h=mpf("1e-18"))
    for at, tolerance in ((single, 2e-5), (single.double(), 1e-10)):
        found, rate = s.sigma(at), s.dsigma(at)
        assert found.dtype == rate.dtype == at.dtype
        assert found.item() == pytest.approx(float(sigma), rel=tolerance)
        assert rate.item() == pytest.approx(float(dsigma), rel=tolerance)
        weight = rate / torch.expm1(found)
        assert weight.item() == pytest.approx(float(dsigma / mpmath.expm1(sigma)), rel=tolerance)


@pytest.mark.parametrize(
    ("cls", "config", "formula"), FORMULAS, ids=[f"{c.__name__}{i}" for i, (c, *_) in enumerate(FORMULAS)]
)
def test_ends(cls: Any, config: dict[str, float], formula: Callable[[Any], Any]) -> None:
    s, ends = made(cls, **config), torch.tensor([0.0, 1.0])
    sigma, dsigma = s.sigma(ends), s.dsigma(ends[1:])
    assert 0 <= sigma[0].item() < 2e-4
    assert sigma[1].item() == pytest.approx(float(formula(mpf(1))), rel=2e-5)
    assert bool(dsigma.isfinite().all() & (dsigma >= 0).all())


def test_d3pms_cosine_in_steps() -> None:
    """Their code: alpha_bar = cos((t/T + 0.008) / 1.008 pi/2), beta = 1 - alpha_bar[t + 1] / alpha_bar[t]."""
    steps = np.arange(1001) / 1000
    alpha_bar = np.cos((steps + 0.008) / 1.008 * np.pi / 2)
    kept = np.cumprod(1 - np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))
    s = made(Cosine, offset=0.008, eps=1e-12)
    ours = torch.exp(-s.sigma(torch.from_numpy(steps[1:-1])))
    np.testing.assert_allclose(ours.numpy(), kept[:-1], rtol=1e-9, atol=1e-11)


def test_d3pms_linear_betas_are_the_linear_rate() -> None:
    """1,000 steps of beta from 1e-4 to 0.02: the product of 1 - beta, to the order of beta."""
    beta = np.linspace(1e-4, 0.02, 1000)
    s = made(Linear)
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert float((s.sigma(steps) + torch.from_numpy(np.log1p(-beta)).cumsum(0)).abs().max()) < 0.1


def test_d3pms_absorbing_betas_are_loglinear() -> None:
    """beta_t = 1 / (T - t + 1) keeps 1 - t/T."""
    steps, s = 10, made(LogLinear, eps=1e-12)
    kept = np.cumprod([1 - 1 / (steps - t + 1) for t in range(1, steps)])
    ours = torch.exp(-s.sigma(torch.arange(1, steps, dtype=torch.float64) / steps))
    np.testing.assert_allclose(ours.numpy(), kept, rtol=1e-9)


def test_information_falls_evenly_under_the_uniform_kernel() -> None:
    from sedd_graph_registry.noise.interpolating import Uniform

    n = 27
    s, kernel = made(MutualInformation, eps=1e-6), Uniform(Uniform.Config(), Context({"n": n}))
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    p = kernel.transition_matrix(s.sigma(t))
    told = math.log(n) + torch.xlogy(p, p).sum((1, 2)) / n  # I(x_t; x_0) for even tokens, from P itself
    torch.testing.assert_close(told / math.log(n), 1 - (1 - 1e-6) * t, rtol=1e-9, atol=1e-12)


def test_for_absorb_the_schedule_of_even_information_is_loglinear() -> None:
    """D3PM, section 3.3: whatever the law of the tokens, by the definition of mutual information over all states."""
    from sedd_graph_registry.noise.interpolating import Absorb

    law = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    s, kernel = made(LogLinear, eps=1e-9), Absorb(Absorb.Config(), Context({"n": 4}))
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    joint = kernel.transition_matrix(s.sigma(t))[:, :, :3] * law
    seen = joint.sum(-1, keepdim=True)
    told = (torch.xlogy(joint, joint) - torch.xlogy(joint, (seen * law))).sum((1, 2))
    torch.testing.assert_close(told / -(law * law.log()).sum(), 1 - t, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [(Linear, {"rate_max": 0}, "no token is ever noised"), (Geometric, {"sigma_min": 30}, "must be less than")],
)
def test_refused_as_written(cls: Any, config: dict[str, float], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        cls.Config(**config)


class Launches(TorchDispatchMode):
    """Number of operations that compute, as a device would launch kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "detach" in str(func) or "lift_fresh" in str(func))
        return func(*args, **(kwargs or {}))


def shipped() -> list[tuple[str, dict[str, Any]]]:
    """All schedules that train nothing, as declared by default and with further forms of the formula."""
    more: dict[str, list[dict[str, Any]]] = {
        "linear": [{}, {"rate_min": 0}, {"rate_min": 20, "rate_max": 0.1}, {"rate_min": 5, "rate_max": 5}],
        "cosine": [{}, {"offset": 0.008}, {"offset": 1.0}],
        "polynomial": [{}, {"power": 0.5}, {"power": 10}],
        "stepwise": [{"form": form, "steps": 100} for form in ("sqrt", "cosine", "trunc_cos")],
    }
    parts = {entry.name: entry.load() for entry in registry()}
    found = {op: cls for op, cls in parts.items() if issubclass(cls, Schedule) and not cls.learned}
    return [(op, {**getattr(cls, "example", {}), **c}) for op, cls in found.items() for c in more.get(op, [{}])]


@pytest.mark.parametrize(("name", "config"), shipped(), ids=str)
def test_time_is_a_closed_form_of_few_kernels(name: str, config: dict[str, Any]) -> None:
    """Against bisection of sigma, and in total noise to a few units in the last place of float64."""
    cls = registry().component(name)
    s = cls(cls.Config(**config), Context({"n": 27}))
    ends = torch.logspace(-12, -2, 40, dtype=torch.float64)
    t = torch.cat(
        [
            torch.zeros(1).double(),
            ends,
            torch.linspace(0.01, 0.99, 97).double(),
            1 - ends.flip(0),
            torch.ones(1).double(),
        ]
    )
    sigma = s.sigma(t)
    for given in (sigma, sigma.float()):
        with Launches() as launches:
            found = s.time(given)
        assert found.dtype == given.dtype
        assert launches.count <= 10
        assert bool(((found >= 0) & (found <= 1)).all())
    found, halved = s.time(sigma), Schedule.time(s, sigma)
    # what one rounding of sigma, of alpha and of t moves the noise
    unit = torch.finfo(torch.float64).eps * (sigma + torch.expm1(sigma.clamp(max=30)) + s.dsigma(t))
    apart = (s.sigma(found) - sigma).abs()
    assert float((apart / unit.clamp(min=1e-300)).nan_to_num(0.0).max()) < 32
    assert bool((apart <= (s.sigma(halved) - sigma).abs() + 32 * unit).all())
    outside = s.time(torch.tensor([0.0, float(sigma[0]) / 2, 2 * float(sigma[-1]) + 1, 1e4, 1e9], dtype=torch.float64))
    assert outside.tolist() == pytest.approx([0, 0, 1, 1, 1], abs=1e-11)


@pytest.mark.parametrize(
    ("cls", "config", "formula"), FORMULAS, ids=[f"{c.__name__}{i}" for i, (c, *_) in enumerate(FORMULAS)]
)
def test_time_inverts_the_published_formula(cls: Any, config: dict[str, float], formula: Callable[[Any], Any]) -> None:
    """The noise is computed in 50 digits, and rounded once."""
    s = made(cls, **config)
    for t in (1e-9, 1e-6, 1e-3, 0.3, 0.7, 0.999, 1 - 2**-20):
        exact = formula(mpf(t))
        found = s.time(torch.tensor([float(exact)], dtype=torch.float64)).item()
        slope = mpmath.diff(formula, mpf(t), h=mpf("1e-18"))
        assert abs(found - t) * float(slope) <= 32 * 2**-52 * float(exact + mpmath.expm1(exact) + slope)
