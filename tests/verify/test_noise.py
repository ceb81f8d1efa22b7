"""The proof of a noise process catches what is broken, by name, and lets nothing sound fail."""

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


def failing(kernel: Any) -> set[str]:
    return {c.name for c in check_kernel(kernel, end=9.0) if not c.holds}


def broken(cls: Any, **methods: Any) -> Any:
    """``cls`` with some of its methods put in its place by wrong ones."""
    return type(f"Broken{cls.__name__}", (cls,), methods)(config(cls), Context({"n": 4}))


def rates_transposed(cls: Any) -> dict[str, Any]:
    """Q turned over: SEDD's text and code differ in it."""
    return {"rate_matrix": lambda self, sigma: cls.rate_matrix(self, sigma).T}


def rates_doubled(cls: Any) -> dict[str, Any]:
    """A clock twice as fast, as the paper's uniform rates are n times the code's."""
    return {"rate_matrix": lambda self, sigma: 2 * cls.rate_matrix(self, sigma)}


def without_k(cls: Any) -> dict[str, Any]:
    """No K(r): a loss that trains as well and bounds nothing."""

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
    """A factor n / (n - 1): an even draw from the *other* tokens."""

    def score_entropy(self: Any, *args: Tensor) -> Tensor:
        return torch.as_tensor(cls.score_entropy(self, *args)) * self.states / (self.states - 1)

    def nelbo(self: Any, *args: Tensor) -> Tensor:
        return torch.as_tensor(cls.nelbo(self, *args)) * self.states / (self.states - 1)

    return {"score_entropy": score_entropy, "nelbo": nelbo}


def back_at_the_wrong_pace(cls: Any) -> dict[str, Any]:
    return {"reverse_rate": lambda self, score, x, sigma: 1.5 * cls.reverse_rate(self, score, x, sigma)}


def back_without_score(cls: Any) -> dict[str, Any]:
    """Rates forward taken for rates back."""
    return {"reverse_rate": lambda self, score, x, sigma: cls.reverse_rate(self, torch.ones_like(score), x, sigma)}


def steps_too_far(cls: Any) -> dict[str, Any]:
    """To the end of the step after, or to less than half the noise."""
    return {
        name: lambda self, a, x, now, below, name=name: getattr(cls, name)(self, a, x, now, below / 2)
        for name in ("analytic", "posterior")
    }


def draws_too_little(cls: Any) -> dict[str, Any]:
    return {
        "sample": lambda self, x0, sigma, *, random, corrupt: cls.sample(
            self, x0, sigma / 2, random=random, corrupt=corrupt
        )
    }


def prior_of_one_token(cls: Any) -> dict[str, Any]:
    def prior(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        return torch.zeros(rows, length, dtype=torch.int64)

    return {"prior": prior}


def forgets_where_it_started(cls: Any) -> dict[str, Any]:
    return {"transition_matrix": lambda self, sigma, start=0.0: cls.transition_matrix(self, sigma)}


def bound_too_low(cls: Any) -> dict[str, Any]:
    """Uniformization would leave out moves."""

    def rate_bound(self: Any) -> float | None:
        bound: float | None = super(type(self), self).rate_bound
        return None if bound is None else 0.3 * bound

    return {"rate_bound": property(rate_bound)}


def score_upside_down(cls: Any) -> dict[str, Any]:
    return {"log_score": lambda self, log_x0, xt, sigma: -cls.log_score(self, log_x0, xt, sigma)}


BROKEN = {
    rates_transposed: {"kernel.rates", "kernel.transition", "kernel.score_entropy"},
    rates_doubled: {"kernel.transition", "kernel.score_entropy", "kernel.nelbo", "kernel.reverse_rate"},
    without_k: {"kernel.score_entropy"},
    losses_over_n: {"kernel.score_entropy", "kernel.nelbo"},
    back_at_the_wrong_pace: {"kernel.reverse_rate"},
    back_without_score: {"kernel.reverse_rate"},
    steps_too_far: {"kernel.analytic", "kernel.posterior"},
    draws_too_little: {"kernel.sample"},
    prior_of_one_token: {"kernel.prior"},
    forgets_where_it_started: {"kernel.semigroup"},
    score_upside_down: {"kernel.log_score"},
    bound_too_low: {"kernel.rate_bound"},
}
"""What is wrong, and the checks that must say so; others may fail as well."""


@pytest.mark.parametrize("cls", KERNELS)
@pytest.mark.parametrize("wrong", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_kernel_is_caught_by_name(wrong: Any, cls: Any) -> None:
    expected = BROKEN[wrong]
    if wrong is rates_transposed and cls in (Uniform, Ordinal, Neighbours):
        assert failing(broken(cls, **wrong(cls))) == set()  # symmetric: nothing is broken
        return
    if wrong is rates_transposed and cls is Rates:
        expected = {"kernel.rates"}
    if wrong is bound_too_low and cls in (Rates, Ordinal, Neighbours):
        expected = set()  # no bound is claimed
    assert expected <= failing(broken(cls, **wrong(cls)))


@pytest.mark.parametrize("cls", KERNELS)
def test_a_sound_kernel_is_let_through(cls: Any) -> None:
    assert failing(broken(cls)) == set()


class Overshooting(Interpolating, kind="kernel"):
    """A mixture whose even share dies faster than exp(-sigma): its rate would have to be negative."""

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
    """A target that moves, said to stand still."""

    class Config(Mixture.Config):
        pass

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return super().target(sigma)[0], torch.zeros(1, 1, dtype=sigma.dtype)


def test_targets_that_no_process_follows() -> None:
    assert "kernel.rates" in failing(Overshooting(Overshooting.Config(), Context({"n": 4})))
    assert {"kernel.transition"} <= failing(WrongSlope(WrongSlope.Config(), Context({"n": 4})))


class NaiveUniform(Uniform, kind="kernel"):
    """The ratio as SEDD's code writes it, 1 - n / (e + n): its logarithm is that of 0 in float32."""

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
    """1 - exp(-sigma) for the chance of a mask: 5% off at 1e-6 in float32."""

    class Config(ComponentConfig):
        pass

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        alpha = torch.exp(-sigma)[:, None]
        entropy = -log_x0.gather(-1, x0[..., None])[..., 0]
        return torch.where(xt == self.mask, alpha / (1 - alpha) * entropy, 0.0)


@pytest.mark.parametrize("cls", [NaiveUniform, NaiveAbsorb])
def test_what_only_float32_shows(cls: Any) -> None:
    assert failing(cls(cls.Config(), Context({"n": 4}))) == {"kernel.float32"}
    assert not check_precision(cls(cls.Config(), Context({"n": 50257}))).holds


class WrongRate(LogLinear, kind="schedule"):
    """Its rate is that of another schedule, as one published library has it."""

    class Config(LogLinear.Config):
        pass

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -math.log(self.config.eps))


class NaiveLogLinear(LogLinear, kind="schedule"):
    """log(1 - t) without log1p."""

    class Config(LogLinear.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(1 - (1 - self.config.eps) * t)


class NaiveCosine(Cosine, kind="schedule"):
    class Config(Cosine.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(self.config.eps + (1 - self.config.eps) * torch.cos(math.pi / 2 * t))


class Falling(Geometric, kind="schedule"):
    """Time runs the wrong way, as in flow papers."""

    class Config(Geometric.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(1 - t)

    def dsigma(self, t: Tensor) -> Tensor:
        return -super().dsigma(1 - t)


class Endless(Polynomial, kind="schedule"):
    """alpha reaches 0."""

    class Config(Polynomial.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-t.square())

    def dsigma(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t.square())


class HalfRate(Linear, kind="schedule"):
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
