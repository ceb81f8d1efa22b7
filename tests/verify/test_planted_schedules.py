"""Planted faults of schedules: each is caught, by the name of the check that is made for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.schedules import Cosine, CosineSquared, Geometric, Linear, LogLinear, Polynomial
from sedd_graph_registry.noise.schedules_learned import Learned
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.verify.noise import check_declared
from sedd_graph.verify.schedules import check_schedule
from tests.verify.planted import Fault, after, before
from tests.verify.test_tokens import processes

RATE, RANGE = ("schedule.rate",), ("schedule.range",)
FLOAT32, TIME, POINTWISE = ("schedule.float32",), ("schedule.time",), ("schedule.pointwise",)


def times(by: float, where: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Multiply the result where ``where(t)`` holds."""
    return lambda self, found, t: torch.where(where(t), by * found, found)


def plus(by: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, found, t: found + by(t).to(found.dtype)


def in_float32(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, found, t: change(found) if t.dtype == torch.float32 else found


def frozen(low: float, high: float) -> Callable[..., tuple[Any, ...]]:
    """Time stands still between two times, and sigma with it."""
    return lambda self, t: (torch.where((t > low) & (t < high), low, t),)


def stateful(self: Any, found: Tensor, t: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return found * (1 + 1e-5 * self.calls)


def jittered(self: Any, found: Tensor, t: Tensor) -> Tensor:
    return found * (1 + 1e-7 * torch.rand(()).to(found))


def in_place(self: Any, found: Tensor, t: Tensor) -> Tensor:
    t.clamp_(min=1e-3)
    return found


def moving_ends(self: Any, found: Tensor, t: Tensor) -> Tensor:
    """Total noise at t = 1 depends on the parameters."""
    return found * (1 + 0.01 * self.raw.detach()[0].to(found))


def stuck_rate(self: Any, found: Tensor, t: Tensor) -> Tensor:
    """The rate is that of the first parameters."""
    return ((1 - self.config.eps) / (1 - (1 - self.config.eps) * t)).to(found.dtype)


class OneDtype(LogLinear, kind="schedule"):
    """float64 in, float32 out."""

    class Config(LogLinear.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t).float()


class Bisected(Schedule, kind="schedule"):
    """Its own inverse, right but between two levels of noise."""

    class Config(ComponentConfig):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        return 8 * t

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 8.0)

    def time(self, sigma: Tensor) -> Tensor:
        found = (sigma / 8).clamp(0, 1)
        return torch.where((found > 0.5) & (found < 0.5003), 0.5, found)


class Sided(Bisected, kind="schedule"):
    """Its own inverse, without limits."""

    class Config(ComponentConfig):
        pass

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / 8


class Swapped(Bisected, kind="schedule"):
    """Its own inverse is that of another schedule."""

    class Config(ComponentConfig):
        pass

    def time(self, sigma: Tensor) -> Tensor:
        return (1 - torch.exp(-sigma)).clamp(0, 1)


class Undeclared(Learned, kind="schedule"):
    """Trained parameters that are neither trained nor saved."""

    learned = False

    class Config(Learned.Config):
        pass


def wave(t: Tensor) -> Tensor:
    """A small wave of high frequency."""
    return 1e-3 * torch.sin(2e4 * t)


FAULTS: list[Fault] = [
    Fault("rate 0.1 % off", LogLinear, after(LogLinear, "dsigma", times(1.001, lambda t: t >= 0)), RATE),
    Fault("rate off in a narrow stretch", LogLinear, after(LogLinear, "dsigma", times(1.01, lambda t: (t > 0.5) & (t < 0.5003))), RATE),
    Fault("rate off near 0", Linear, after(Linear, "dsigma", times(1.1, lambda t: t < 1e-5)), RATE),
    Fault("rate off near 1", Geometric, after(Geometric, "dsigma", times(1.1, lambda t: t > 1 - 1e-4)), RATE),
    Fault("rate off by a wave", Linear, after(Linear, "dsigma", plus(wave)), RATE),
    Fault("sigma off by a wave", Cosine, after(Cosine, "sigma", plus(lambda t: 1e-2 * wave(t))), (*RATE, *RANGE)),
    Fault("sigma jumps", LogLinear, after(LogLinear, "sigma", plus(lambda t: 0.05 * (t > 0.7))), RATE),
    Fault("sigma falls in a narrow stretch", LogLinear, after(LogLinear, "sigma", times(0.99, lambda t: (t > 0.8) & (t < 0.8005))), RANGE),
    Fault("sigma stands still, its rate does not", Cosine, before(Cosine, "sigma", frozen(0.3, 0.3004)), RATE),
    Fault("sigma and rate stand still", Linear, {**before(Linear, "sigma", frozen(0.3, 0.302)), **after(Linear, "dsigma", times(0.0, lambda t: (t > 0.3) & (t < 0.302)))}, RANGE),
    Fault("sigma is 0 early", Polynomial, after(Polynomial, "sigma", times(0.0, lambda t: t < 1e-4)), RANGE),
    Fault("sigma is negative early", Linear, after(Linear, "sigma", plus(lambda t: -1e-6 * (t < 1e-6))), RANGE),
    Fault("rate is negative at the end", CosineSquared, after(CosineSquared, "dsigma", lambda self, found, t: found - 1e-9), RANGE),
    Fault("infinite at t = 1", LogLinear, after(LogLinear, "sigma", lambda self, found, t: torch.where(t == 1, math.inf, found)), RANGE),
    Fault("infinite rate at t = 1 in float32", Geometric, after(Geometric, "dsigma", lambda self, found, t: torch.where((t == 1) & torch.tensor(t.dtype == torch.float32), math.inf, found)), RANGE),
    Fault("float32 rounded to bfloat16", Cosine, after(Cosine, "sigma", in_float32(lambda x: x.bfloat16().float())), FLOAT32),
    Fault("float32 times clamped at 1e-3", Linear, before(Linear, "sigma", lambda self, t: (t.clamp(min=1e-3) if t.dtype == torch.float32 else t,)), FLOAT32),
    Fault("float32 times clamped at 1 - 1e-3", LogLinear, before(LogLinear, "dsigma", lambda self, t: (t.clamp(max=1 - 1e-3) if t.dtype == torch.float32 else t,)), FLOAT32),
    Fault("float32 rate off in a stretch", Geometric, after(Geometric, "dsigma", lambda self, found, t: torch.where((t > 0.2) & (t < 0.21), 1.001 * found, found) if t.dtype == torch.float32 else found), FLOAT32),
    Fault("its own inverse is off in a narrow stretch", Bisected, {}, TIME),
    Fault("its own inverse has no limits", Sided, {}, TIME),
    Fault("its own inverse is another's", Swapped, {}, TIME),
    Fault("depends on the batch", LogLinear, after(LogLinear, "sigma", lambda self, found, t: found * t.max()), POINTWISE),
    Fault("keeps state", LogLinear, after(LogLinear, "dsigma", stateful), POINTWISE),
    Fault("draws from the global generator", LogLinear, after(LogLinear, "sigma", jittered), POINTWISE),
    Fault("changes its input", Linear, after(Linear, "dsigma", in_place), POINTWISE),
    Fault("has one dtype", OneDtype, {}, POINTWISE),
    Fault("learned ends move", Learned, after(Learned, "sigma", moving_ends), ("schedule.learned",)),
    Fault("learned rate is that of the start", Learned, after(Learned, "dsigma", stuck_rate), ("schedule.learned",)),
    Fault("learned, and not declared so", Undeclared, {}, ("schedule.learned",)),
    Fault("right for four states alone", Geometric, after(Geometric, "dsigma", lambda self, found, t: found * (1.01 if self.axis("n") > 4 else 1.0)), RATE, states=28),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_is_caught_by_name(fault: Fault) -> None:
    if fault.states > 4:
        sound = processes()

        def make(states: int | None) -> TokenParts:
            return sound(4)._replace(schedule=fault.of(states))

        checks = check_declared(make(4), make, "quick")
    else:
        checks = check_schedule(fault.of())
    found = {c.name for c in checks if c.holds is False}
    assert found & set(fault.caught), found
