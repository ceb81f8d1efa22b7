"""The order of convergence that samplers declare, against the distribution after every step by enumeration."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb
from sedd_graph_registry.sampling.masked import ReMDM
from sedd_graph_registry.sampling.steps import Ancestral, Psi
from torch import Tensor

from sedd_graph.diffusion.tokens.walk import Walk, WalkSettings
from tests.diffusion.test_samplers import LAW, chain, make, world


def error(sampler: Any, steps: int) -> float:
    """Total variation between the data and the samples, exactly."""
    k, s = world(Absorb)
    settings = WalkSettings(free=torch.ones(1, 1).bool(), kernel=k, schedule=s, generator=torch.Generator())
    walk = Walk(lambda *_: {}, torch.zeros(1, 1).long(), settings, sampler.config)
    if isinstance(sampler, ReMDM):
        levels = sampler.levels(walk, steps)
    else:
        times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
        levels = [(a, b, 0.0) for a, b in itertools.pairwise([*torch.exp(-s.sigma(times)).tolist(), 1.0])]
    left = iter(levels)

    def step(states: Tensor, now: float, below: float) -> Tensor:
        now, below, eta = next(left)
        bound = min(1.0, (1 - below) / now)
        if isinstance(sampler, Psi):
            again = (1 - sampler.config.kappa) * (1 - below)
        elif isinstance(sampler, ReMDM):
            again = eta * bound if sampler.config.remask == "rescale" else min(eta, bound)
        else:
            again = 0.0
        shown = 1.0 if below == 1 else (below - (1 - again) * now) / (1 - now)
        return torch.tensor([shown, again], dtype=torch.float64).expand(*states.shape, 2)

    law = chain(step, [levels[0][0], *(below for _, below, _ in levels)])
    return float((law - LAW).abs().sum() / 2)


@pytest.mark.parametrize(
    "made",
    [
        lambda: make(Ancestral),
        lambda: make(Psi, kappa=0.6),
        lambda: make(ReMDM, eta=0.2),
        lambda: make(ReMDM, remask="rescale", eta=0.5),
    ],
    ids=["ancestral", "psi", "cap", "rescale"],
)
def test_the_error_falls_with_the_declared_order(made: Callable[[], Any]) -> None:
    sampler = made()
    few, many = error(sampler, 64), error(sampler, 256)
    assert math.log(few / many) / math.log(4) == pytest.approx(sampler.order, abs=0.1)
    assert sampler.heuristic() is None


def test_the_error_of_the_loop_has_a_limit_that_is_not_zero() -> None:
    sampler = make(ReMDM, remask="loop", eta=1.0, alpha_on=0.5)
    assert error(sampler, 64) > error(sampler, 256) > 0.12
    assert sampler.heuristic() is not None
