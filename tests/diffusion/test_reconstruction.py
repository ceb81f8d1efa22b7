"""The part of a bound below ``t_min``, by enumeration: three tokens at two positions, a perfect network, any kernel."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.masking import Power, Spindle
from sedd_graph_registry.noise.schedules import Geometric, LogLinear
from sedd_graph_registry.objectives.block_diffusion import BlockNelbo
from sedd_graph_registry.objectives.bounds import MaskedCount, Nelbo, ScoreEntropy
from sedd_graph_registry.objectives.discrete_time import D3PM
from sedd_graph_registry.objectives.learned import GenMD4
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.objective import DrawRequest

V, L = 3, 2
CLEAN = torch.tensor(list(itertools.product(range(V), repeat=L)))
WEIGHTS = torch.rand(V**L, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 2 + 0.01
LAW = WEIGHTS / WEIGHTS.sum()
ENTROPY = float(-(LAW * LAW.log()).sum())
LOGLINEAR = LogLinear(LogLinear.Config(eps=1e-7), Context({}))


def every(kernel: Any, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of clean and noisy rows with their probability, and p(x0_i | x_t) [pairs, l, v] and given the other alone."""
    noisy = torch.tensor(list(itertools.product(range(kernel.states), repeat=L)))
    p = kernel.transition_matrix(sigma)[:, :V]
    joint = LAW.reshape(V, V)
    both = joint[None] * p[noisy[:, 0]][:, :, None] * p[noisy[:, 1]][:, None, :]  # [noisy, v, v]
    chance = both.reshape(len(noisy), -1)
    full = torch.stack([both.sum(2), both.sum(1)], 1) / chance.sum(1)[:, None, None].clamp(min=1e-300)
    other = torch.stack([p[noisy[:, 1]] @ joint.T, p[noisy[:, 0]] @ joint], 1)
    other = other / other.sum(-1, keepdim=True)
    z, x = (i.reshape(-1) for i in torch.meshgrid(torch.arange(len(noisy)), torch.arange(V**L), indexing="ij"))
    return CLEAN[x], noisy[z], chance[z, x], torch.stack([full[z], other[z]])


def outputs(name: str, kernel: Any, x: Tensor, other: Tensor, sigma: float) -> dict[str, Tensor]:
    law = torch.nn.functional.pad(other, (0, kernel.states - V))
    if kernel.mask is not None:
        law = torch.where((x == kernel.mask)[..., None], law, torch.nn.functional.one_hot(x, kernel.states).double())
    log = law.clamp(min=1e-300).log().clamp(min=-1e6).float()
    return {name: log if name == "log_x0" else kernel.log_score(log, x, torch.full((len(x),), sigma))}


CASES = [
    (Power, {"gamma": 0.9, "frequencies": (0.9, 0.09, 0.01)}, Nelbo, "log_x0", LOGLINEAR, 1e-4),
    (Power, {"gamma": 0.9, "frequencies": (0.9, 0.09, 0.01)}, ScoreEntropy, "log_score", LOGLINEAR, 1e-4),
    (Spindle, {"frequencies": (0.9, 0.09, 0.01)}, Nelbo, "log_x0", LOGLINEAR, 0.05),
    (Uniform, {}, Nelbo, "log_x0", LOGLINEAR, 0.05),
    (Uniform, {}, ScoreEntropy, "log_score", Geometric(Geometric.Config(sigma_min=0.02), Context({})), 1e-4),
    (Absorb, {}, ScoreEntropy, "log_x0", LOGLINEAR, 0.05),
    (Absorb, {}, ScoreEntropy, "log_score", LOGLINEAR, 0.05),
]


@pytest.mark.parametrize(("op", "config", "cls", "name", "schedule", "t_min"), CASES)
def test_the_bound_counts_what_lies_below_t_min(op: Any, config: dict[str, Any], cls: Any, name: str, schedule: Any, t_min: float) -> None:  # fmt: skip
    n = V if op is Uniform else V + 1
    kernel = op(op.Config(**config), Context({"n": n}))
    objective = cls(cls.Config(t_min=t_min), Context({"n": n})).bound()

    def mean(t: float, weight: float, *, below: bool) -> float:
        at = torch.tensor([t], dtype=torch.float64)
        sigma = float(schedule.sigma(at))
        x0, xt, chance, (full, other) = every(kernel, sigma)
        one = torch.ones(len(x0))
        draw = Draw(xt, one * t, one * sigma, one * float(schedule.dsigma(at)), one * weight)
        call = objective.reconstruction if below else objective.loss
        nats = call(outputs(name, kernel, xt, other, sigma), draw, Batch.of(x0), kernel, schedule)
        if below:
            exact = -full.gather(-1, x0[..., None])[..., 0].log().where(chance[:, None] > 0, 0.0).sum(1)
            torch.testing.assert_close(nats.double()[chance > 0], exact[chance > 0], rtol=2e-4, atol=2e-6)
        return float((chance * nats.double()).sum())

    # Gauss-Legendre over log t
    nodes, weights = np.polynomial.legendre.leggauss(48)
    half = -math.log(t_min) / 2
    times = np.exp(half * (nodes - 1))
    loss = sum(half * w * t * mean(t, 1.0, below=False) for t, w in zip(times, weights, strict=True))
    whole = loss + mean(t_min, 1.0, below=True)
    assert loss < 0.985 * ENTROPY
    assert ENTROPY * (1 - 2e-4) < whole < ENTROPY * 1.01


def test_objectives_that_count_all_noise_have_no_rest() -> None:
    """And those with a rest draw it at the lowest noise, with the rows of the request."""
    absorb = Absorb(Absorb.Config(), Context({"n": V + 1}))
    request = DrawRequest(Batch.of(CLEAN), absorb, LOGLINEAR, Randomness(torch.Generator().manual_seed(0)))
    for cls in (MaskedCount, D3PM, BlockNelbo, GenMD4):
        objective = cls(cls.Config(), Context({"n": V + 1}))
        assert objective.evaluated(absorb).reconstruction_draw(request) is None
    nelbo = Nelbo(Nelbo.Config(t_min=0.03), Context({"n": V + 1}))
    assert nelbo.evaluated(absorb).reconstruction_draw(request) is None  # counts masks
    draw = nelbo.reconstruction_draw(request)
    assert draw is not None
    assert draw.t.tolist() == pytest.approx([0.03] * len(CLEAN))
    assert draw.sigma.tolist() == pytest.approx([float(LOGLINEAR.sigma(torch.tensor(0.03)))] * len(CLEAN))
