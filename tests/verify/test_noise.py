"""Verification of kernels and schedules: sound ones pass, and each defect fails the checks that name it."""

import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Interpolating, Mixture, Uniform, Unigram
from sedd_graph_registry.noise.masking import LearnedPower, Power, Spindle
from sedd_graph_registry.noise.neighbours import Neighbours
from sedd_graph_registry.noise.rate_matrix import Ordinal, Rates
from sedd_graph_registry.noise.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.verify.noise import check_kernel, check_precision, check_schedule

RING = ((0, 1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 1), (3, 0, 0.1, 0))
KERNELS: list[Any] = [Absorb, Uniform, Unigram, Mixture, Power, Spindle, LearnedPower, Ordinal, Rates, Neighbours]


def config(cls: Any) -> Any:
    if issubclass(cls, Neighbours):
        return cls.Config(neighbours=2)
    return cls.Config(table=RING) if issubclass(cls, Rates) else cls.Config()


def failing(kernel: Any, proof: Any = "quick") -> set[str]:
    return {c.name for c in check_kernel(kernel, end=9.0, proof=proof) if not c.holds}


def broken(cls: Any, **methods: Any) -> Any:
    """Return a kernel of four states, with some methods of ``cls`` replaced."""
    return type(f"Broken{cls.__name__}", (cls,), methods)(config(cls), Context({"n": 4}))


def rates_transposed(cls: Any) -> dict[str, Any]:
    """Q is transposed: SEDD's text and code differ in this."""
    return {"rate_matrix": lambda self, sigma: cls.rate_matrix(self, sigma).T}


def rates_doubled(cls: Any) -> dict[str, Any]:
    """All rates are doubled; the uniform rates of SEDD's text are n times those of its code."""
    return {"rate_matrix": lambda self, sigma: 2 * cls.rate_matrix(self, sigma)}


def without_k(cls: Any) -> dict[str, Any]:
    """The constant K(r) is missing: the loss has the same gradient, and is not a bound."""

    def score_entropy(self: Any, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        p = torch.stack([self.transition_matrix(float(s)) for s in sigma])
        q = torch.stack([self.rate_matrix(float(s)) for s in sigma])
        seen = p.transpose(1, 2).gather(1, x0[..., None].expand(-1, -1, self.states))
        ratio = seen / seen.gather(-1, xt[..., None])
        into = q.gather(1, xt[..., None].expand(-1, -1, self.states)).scatter(-1, xt[..., None], 0.0)
        k = into * (torch.xlogy(ratio, ratio) - ratio)
        whole: Tensor = cls.score_entropy(self, log_score, xt, x0, sigma)
        return whole - k.sum(-1).to(whole.dtype)

    return {"score_entropy": score_entropy}


def losses_over_n(cls: Any) -> dict[str, Any]:
    """Both losses have a factor n / (n - 1), as if the new token were never the old one."""

    def score_entropy(self: Any, *args: Tensor) -> Tensor:
        return torch.as_tensor(cls.score_entropy(self, *args)) * self.states / (self.states - 1)

    def nelbo(self: Any, *args: Tensor) -> Tensor:
        return torch.as_tensor(cls.nelbo(self, *args)) * self.states / (self.states - 1)

    return {"score_entropy": score_entropy, "nelbo": nelbo}


def reverse_rates_too_fast(cls: Any) -> dict[str, Any]:
    """Reverse rates are 1.5 times what they should be."""
    return {"reverse_rate": lambda self, score, x, sigma: 1.5 * cls.reverse_rate(self, score, x, sigma)}


def reverse_rates_without_score(cls: Any) -> dict[str, Any]:
    """Forward rates are used as reverse rates."""
    return {"reverse_rate": lambda self, score, x, sigma: cls.reverse_rate(self, torch.ones_like(score), x, sigma)}


def steps_too_long(cls: Any) -> dict[str, Any]:
    """Both steps go to half the noise that they should leave."""
    return {
        name: lambda self, a, x, now, below, name=name: getattr(cls, name)(self, a, x, now, below / 2)
        for name in ("analytic", "posterior")
    }


def half_noise(cls: Any) -> dict[str, Any]:
    """Draws are made at half the noise."""
    return {
        "sample": lambda self, x0, sigma, *, random, corrupt: cls.sample(
            self, x0, sigma / 2, random=random, corrupt=corrupt
        )
    }


def one_token_prior(cls: Any) -> dict[str, Any]:
    """The prior is one token."""

    def prior(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        return torch.zeros(rows, length, dtype=torch.int64)

    return {"prior": prior}


def steps_from_clean(cls: Any) -> dict[str, Any]:
    """Transitions ignore the noise that they start from."""
    return {"transition_matrix": lambda self, sigma, start=0.0: cls.transition_matrix(self, sigma)}


def rate_bound_too_low(cls: Any) -> dict[str, Any]:
    """The bound on reverse rates is too low, so that uniformization would miss moves."""

    def rate_bound(self: Any) -> float | None:
        bound: float | None = super(type(self), self).rate_bound
        return None if bound is None else 0.3 * bound

    return {"rate_bound": property(rate_bound)}


def inverted_score(cls: Any) -> dict[str, Any]:
    """The implied score is inverted."""
    return {"log_score": lambda self, log_x0, xt, sigma: -cls.log_score(self, log_x0, xt, sigma)}


BROKEN = {
    rates_transposed: {"kernel.rates", "kernel.transition", "kernel.score_entropy"},
    rates_doubled: {"kernel.transition", "kernel.score_entropy", "kernel.nelbo", "kernel.reverse_rate"},
    without_k: {"kernel.score_entropy"},
    losses_over_n: {"kernel.score_entropy", "kernel.nelbo"},
    reverse_rates_too_fast: {"kernel.reverse_rate"},
    reverse_rates_without_score: {"kernel.reverse_rate"},
    steps_too_long: {"kernel.analytic", "kernel.posterior"},
    half_noise: {"kernel.sample"},
    one_token_prior: {"kernel.prior"},
    steps_from_clean: {"kernel.semigroup"},
    inverted_score: {"kernel.log_score"},
    rate_bound_too_low: {"kernel.rate_bound"},
}
"""Defects, and the checks that must fail; others may fail as well."""


@pytest.mark.parametrize("cls", KERNELS)
@pytest.mark.parametrize("wrong", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_kernel_is_caught_by_name(wrong: Any, cls: Any) -> None:
    expected = BROKEN[wrong]
    if wrong is rates_transposed and cls in (Uniform, Ordinal, Neighbours):
        assert failing(broken(cls, **wrong(cls))) == set()  # Q is symmetric
        return
    if wrong is rates_transposed and cls is Rates:
        expected = {"kernel.rates"}
    if wrong is rate_bound_too_low and cls in (Rates, Ordinal, Neighbours):
        expected = set()  # no bound is declared
    assert expected <= failing(broken(cls, **wrong(cls)))


@pytest.mark.parametrize("cls", KERNELS)
def test_a_sound_kernel_passes(cls: Any) -> None:
    assert failing(broken(cls), "full") == set()


class Overshooting(Interpolating, kind="kernel"):
    """A mixture whose uniform share falls faster than exp(-sigma), for which a rate would have to be negative."""

    class Config(ComponentConfig):
        pass

    @property
    def mask(self) -> int:
        return self.states - 1

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        share = 0.5 * torch.exp(-3 * sigma)[:, None]
        masked = torch.arange(self.states) == self.mask
        even = share / self.data_tokens
        return torch.where(masked, 1 - share, even), torch.where(masked, 3 * share, -3 * even)


class WrongSlope(Mixture, kind="kernel"):
    """A target that depends on sigma, declared to be constant."""

    class Config(Mixture.Config):
        pass

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return super().target(sigma)[0], torch.zeros(1, 1, dtype=sigma.dtype)


def test_targets_of_no_process_are_caught() -> None:
    assert "kernel.rates" in failing(Overshooting(Overshooting.Config(), Context({"n": 4})))
    assert {"kernel.transition"} <= failing(WrongSlope(WrongSlope.Config(), Context({"n": 4})))


class NaiveUniform(Uniform, kind="kernel"):
    """The ratio is 1 - n / (e + n), as in SEDD's code, which is 0 in float32 at little noise."""

    class Config(ComponentConfig):
        pass

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        n, e = self.states, torch.expm1(sigma)[:, None]
        ratio = 1 - n / (e + n)
        log_score = log_score.scatter(-1, xt[..., None], 0.0)
        positive, logs = (log_score.exp().sum(-1) - 1) / n, log_score.sum(-1) / n
        same = positive - ratio * logs + (n - 1) / n * ratio * (ratio.log() - 1)
        at = log_score.gather(-1, x0[..., None])[..., 0]
        moved = positive - logs - at / e + ((-ratio.log() - 1) / ratio - (n - 2)) / n
        return torch.where(xt == x0, same, moved)


class NaiveAbsorb(Absorb, kind="kernel"):
    """The probability of a mask is 1 - exp(-sigma), 5 % off at 1e-6 in float32."""

    class Config(ComponentConfig):
        pass

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        alpha = torch.exp(-sigma)[:, None]
        entropy = -log_x0.gather(-1, x0[..., None])[..., 0]
        return torch.where(xt == self.mask, alpha / (1 - alpha) * entropy, 0.0)


@pytest.mark.parametrize("cls", [NaiveUniform, NaiveAbsorb])
def test_defects_in_float32_alone_are_caught(cls: Any) -> None:
    assert failing(cls(cls.Config(), Context({"n": 4}))) == {"kernel.float32"}
    assert not check_precision(cls(cls.Config(), Context({"n": 50257}))).holds


class WrongRate(LogLinear, kind="schedule"):
    """The rate is that of another schedule, as in one published library."""

    class Config(LogLinear.Config):
        pass

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -math.log(self.config.eps))


class NaiveLogLinear(LogLinear, kind="schedule"):
    """Total noise is log(1 - t) without log1p."""

    class Config(LogLinear.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(1 - (1 - self.config.eps) * t)


class NaiveCosine(Cosine, kind="schedule"):
    """cos(pi t / 2) is evaluated near t = 1, where it loses its digits in float32."""

    class Config(Cosine.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(self.config.eps + (1 - self.config.eps) * torch.cos(math.pi / 2 * t))


class Falling(Geometric, kind="schedule"):
    """Time runs from noise to data, as in flow papers."""

    class Config(Geometric.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(1 - t)

    def dsigma(self, t: Tensor) -> Tensor:
        return -super().dsigma(1 - t)


class Endless(Polynomial, kind="schedule"):
    """Total noise is infinite at t = 1."""

    class Config(Polynomial.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-t.square())

    def dsigma(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t.square())


class HalfRate(Linear, kind="schedule"):
    """The rate lacks one of two terms."""

    class Config(Linear.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t) + t.square()


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (WrongRate, "schedule.rate"),
        (HalfRate, "schedule.rate"),
        (NaiveLogLinear, "schedule.float32"),
        (NaiveCosine, "schedule.float32"),
        (Falling, "schedule.range"),
        (Endless, "schedule.range"),
    ],
)
def test_a_broken_schedule_is_caught_by_name(cls: Any, name: str) -> None:
    assert name in {c.name for c in check_schedule(cls(cls.Config(), Context({"n": 4}))) if not c.holds}
