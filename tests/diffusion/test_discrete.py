"""D3PM: beside its own matrices, written out step by step, and by enumeration of the bound."""

import itertools
import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.objectives.discrete_time import D3PM, END, END_OF_MODES, divergence
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Draw, Randomness

DOUBLE = torch.float64
WEIGHTS = torch.rand(3, 3, generator=torch.Generator().manual_seed(7), dtype=DOUBLE) + 0.05
LAW = WEIGHTS / WEIGHTS.sum()


def world(cls: Any) -> tuple[Any, LogLinear]:
    n = 3 + (cls is Absorb)
    return cls(cls.Config(), Context({"n": n})), LogLinear(LogLinear.Config(eps=1e-6), Context({}))


def objective(**config: Any) -> D3PM:
    return D3PM(D3PM.Config(**config), Context({"n": 4}))


def matrices(cls: Any, steps: int) -> list[Tensor]:
    """Q_t in D3PM's row convention, t = 1 to T, with beta_t = 1 / (T - t + 1)."""
    n = 3 + (cls is Absorb)
    found = []
    for t in range(1, steps + 1):
        beta = 1 / (steps - t + 1)
        into = torch.zeros(n, n, dtype=DOUBLE)
        if cls is Absorb:
            into[:, 3] = 1
        else:
            into += 1 / n
        found.append((1 - beta) * torch.eye(n, dtype=DOUBLE) + beta * into)
    return found


def exact(cls: Any, x: tuple[int, ...], i: int, bar: Tensor) -> Tensor:
    """The clean token at ``i`` given the other position's state, [n]; one that is seen is carried under a mask."""
    n = bar.shape[0]
    joint = torch.zeros(n, n, dtype=DOUBLE)
    joint[:3, :3] = LAW
    if cls is Absorb and x[i] < 3:
        return torch.eye(n, dtype=DOUBLE)[x[i]]
    guess = joint @ bar[:, x[1]] if i == 0 else bar[:, x[0]] @ joint
    return guess / guess.sum()


def published(cls: Any, steps: int) -> float:
    """E over x_0 of L_vb on two tokens with the exact leave-one-out prediction, all states enumerated (their eq. 2 to 4)."""
    q = matrices(cls, steps)
    n = q[0].shape[0]
    bars = [torch.eye(n, dtype=DOUBLE)]
    for step in q:
        bars.append(bars[-1] @ step)
    total = 0.0
    for t in range(1, steps + 1):
        for x in itertools.product(range(n), repeat=2):
            told = []
            for i in (0, 1):
                guess = exact(cls, x, i, bars[t])
                law = q[t - 1][:, x[i]] * (guess @ bars[t - 1])
                told.append(law / law.sum())
            for x0 in itertools.product(range(3), repeat=2):
                chance = float(LAW[x0] * bars[t][x0[0], x[0]] * bars[t][x0[1], x[1]])
                if chance == 0:
                    continue
                for i in (0, 1):
                    true = q[t - 1][:, x[i]] * bars[t - 1][x0[i]] / bars[t][x0[i], x[i]]
                    total += chance * float((torch.xlogy(true, true) - torch.xlogy(true, told[i]))[true > 0].sum())
    return total


def ours(cls: Any, steps: int, **config: Any) -> float:
    """The same by the objective, all states and steps enumerated, float32 as in training."""
    k, s = world(cls)
    n, loss = k.states, objective(steps=steps, **config)
    rows = list(itertools.product(range(1, steps + 1), itertools.product(range(n), repeat=2), itertools.product(range(3), repeat=2)))  # fmt: skip
    step = torch.tensor([r[0] for r in rows])
    xt, x0 = torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])
    sigma = loss.levels(step, s, k)
    p = k.transition_matrix(sigma.double())
    every = torch.arange(len(rows))
    chance = LAW[x0[:, 0], x0[:, 1]] * p[every, xt[:, 0], x0[:, 0]] * p[every, xt[:, 1], x0[:, 1]]
    guess = torch.stack([torch.stack([exact(cls, r[1], i, p[j].T) for i in (0, 1)]) for j, r in enumerate(rows)])
    ones = torch.ones(len(rows))
    draw = Draw(xt, (step / steps).float(), sigma, ones, ones)
    log_x0 = guess.clamp(min=1e-300).log().clamp(min=-1e6).float()
    nats = loss.loss({"log_x0": log_x0}, draw, Batch.of(x0), k, s).double()
    return float((chance * torch.where(chance > 0, nats, 0.0)).sum())


@pytest.mark.parametrize("cls", [Absorb, Uniform])
def test_the_bound_is_the_published_one_and_comes_down_to_the_entropy(cls: Any) -> None:
    entropy = -float((LAW * LAW.log()).sum())
    gaps = []
    for steps in (1, 3, 12):
        found = ours(cls, steps)
        assert found == pytest.approx(published(cls, steps), abs=2e-4)
        gaps.append(found - entropy)
    # what is left is what steps that treat positions apart must lose
    assert gaps[0] > gaps[1] > gaps[2] > -1e-4
    assert gaps[2] < gaps[0] / 6


@pytest.mark.parametrize("cls", [Absorb, Uniform])
def test_steps_of_the_kernel_are_d3pms_matrices(cls: Any) -> None:
    k, s = world(cls)
    steps, loss = 10, objective(steps=10)
    levels = loss.levels(torch.arange(steps + 1), s, k).double().tolist()
    assert levels[0] == 0
    assert levels[-1] == (END if k.mask is not None else max(END_OF_MODES, s.sigma(torch.ones(1)).item()))
    bar = torch.eye(k.states, dtype=DOUBLE)
    for t, q in enumerate(matrices(cls, steps), start=1):
        bar = bar @ q
        torch.testing.assert_close(k.transition_matrix(levels[t], levels[t - 1]).T, q, atol=2e-5, rtol=0)
        torch.testing.assert_close(k.transition_matrix(levels[t]).T, bar, atol=2e-5, rtol=0)


def test_the_auxiliary_term_is_cross_entropy_and_is_not_reported() -> None:
    k, s = world(Absorb)
    x0 = torch.randint(0, 3, (64, 5), generator=torch.Generator().manual_seed(0))
    log_x0 = torch.randn(64, 5, 4, generator=torch.Generator().manual_seed(1)).index_fill(-1, torch.tensor([3]), -1e6)
    plain, hybrid = objective(steps=20), objective(steps=20, auxiliary=0.1)
    draw = plain.corrupt(Batch.of(x0), k, s, random=Randomness(torch.Generator().manual_seed(2)))
    carried = torch.nn.functional.one_hot(draw.xt, 4).float().log().clamp(min=-1e6)
    log_x0 = torch.where((draw.xt == 3)[..., None], log_x0.log_softmax(-1), carried)
    less, more = (o.loss({"log_x0": log_x0}, draw, Batch.of(x0), k, s) for o in (plain, hybrid))
    entropy = torch.where(draw.xt == 3, -log_x0.gather(-1, x0[..., None])[..., 0], 0.0).sum(-1)
    torch.testing.assert_close(more - less, 0.1 * 20 * entropy, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(hybrid.bound().loss({"log_x0": log_x0}, draw, Batch.of(x0), k, s), less)
    # under a mask each step's KL is cross-entropy with the share that it reveals
    share = torch.tensor([1 / round(t * 20) for t in draw.t.tolist()])
    torch.testing.assert_close(less, 20 * share * entropy, rtol=1e-3, atol=1e-3)


def test_divergence_is_precise_where_laws_are_nearly_one() -> None:
    true, told = (torch.tensor([1 - e, e], dtype=DOUBLE) for e in (1e-5, 2e-5))
    wanted = float((true * (true / told).log()).sum())
    assert float(divergence(true.float(), told.float())) == pytest.approx(wanted, rel=1e-2)
    assert math.isfinite(float(divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))))
