"""Sound schedules and kernels pass: shipped ones at their defaults, at the ends of their Configs, and at random."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sedd_graph_registry.noise.masking import Power
from sedd_graph_registry.noise.rate_matrix import Ordinal
from sedd_graph_registry.noise.schedules import LogLinear
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part
from sedd_graph.verify.noise import check_declared, check_kernel, check_schedule
from tests.plans import maker, token_plan

REGISTRY = discover()
SCHEDULES = [c.op for c in REGISTRY.contracts() if c.kind == "schedule"]
KERNELS = [c.op for c in REGISTRY.contracts() if c.kind == "kernel"]


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config or getattr(REGISTRY.component(op), "example", {})))


def failures(kernel: Part, schedule: Part, states: int, proof: Any) -> dict[str, str]:
    objective = part({"learned_power": "genmd4", "steps": "d3pm"}.get(kernel.name, "nelbo"))
    make = maker(token_plan(kernel, schedule, objective, part("ancestral"), states, "log_x0"), REGISTRY)
    few = make(3) if make(3).kernel.mask is None else make(4)
    return {c.name: c.value for c in check_declared(few, make, proof) if c.holds is False}


@pytest.mark.parametrize("beta", [1e-4, 1e-3, 100.0])
@pytest.mark.parametrize("states", [3, 28])
def test_ordinal_at_any_width(beta: float, states: int) -> None:
    kernel = Ordinal(Ordinal.Config(beta=beta), Context({"n": states}))
    assert {c.name: c.value for c in check_kernel(kernel, end=9.0, proof="quick") if not c.holds} == {}


@pytest.mark.parametrize("gamma", [-1.0, 0.9, 1.0])
def test_power_at_any_exponent(gamma: float) -> None:
    kernel = Power(Power.Config(gamma=gamma), Context({"n": 4}))
    assert {c.name: c.value for c in check_kernel(kernel, end=9.0, proof="quick") if not c.holds} == {}


class Piecewise(LogLinear, kind="schedule"):
    """Total noise is linear in two pieces, so that the rate jumps."""

    class Config(LogLinear.Config):
        pass

    time = Schedule.time

    def sigma(self, t: Tensor) -> Tensor:
        return 2 * t + 10 * (t - 0.4).clamp(min=0)

    def dsigma(self, t: Tensor) -> Tensor:
        return 2 + 10 * (t > 0.4).to(t.dtype)


def test_a_rate_may_jump() -> None:
    schedule = Piecewise(Piecewise.Config(), Context({"n": 4}))
    assert {c.name: c.value for c in check_schedule(schedule) if not c.holds} == {}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shipped_pair_passes(kernel: str, schedule: str) -> None:
    names = kernel.split(".")[0], schedule.split(".")[0]
    try:
        found = set(failures(part(kernel), part(schedule), 4, "full"))
    except BlueprintError:  # refused before the proof: no integral over time, or a schedule fitted to vectors
        assert names[1] in ("learned", "gumbel", "steps_taken")
        return
    own = names[0] == "steps" and names[1] != "steps_taken"  # a kernel in steps has a schedule of its own
    assert found == ({"kernel.schedule"} if own else set())


def _configs(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a random Config of each kernel and schedule, by name."""
    counts = {"smoothing": 10 ** draw.uniform(-4, -1)}
    eps = 10 ** draw.uniform(-4, -2.8)
    low = draw.uniform(0.0, 5.0)
    table = [[round(draw.uniform(0.05, 3), 3) for _ in range(4)] for _ in range(4)]
    kernels: dict[str, Any] = {
        "absorb": {},
        "uniform": {},
        "mixture": {"uniform": draw.uniform(0.01, 1), "decay": draw.choice([0.0, draw.uniform(0.7, 1), 1.0])},
        "unigram": counts,
        "power": {**counts, "gamma": draw.uniform(-1, 1)},
        "spindle": {**counts, "strength": draw.uniform(0.01, 1)},
        "learned_power": {**counts, "gamma": draw.uniform(-1, 1)},
        "ordinal": {"beta": 10 ** draw.uniform(-4, 2)},
        "rates": {"table": table},
        "neighbours": {"neighbours": draw.randint(4, 12), "seed": draw.randint(0, 99), "even": draw.choice([0.0, 0.1])},
    }
    schedules: dict[str, Any] = {
        "loglinear": {"eps": eps},
        "cosine": {"eps": eps, "offset": draw.choice([0.0, 0.008, draw.uniform(0, 1)])},
        "cosine_squared": {"eps": eps},
        "cubic": {"eps": eps},
        "polynomial": {"eps": eps, "power": draw.uniform(0.2, 6)},
        "md4_cosine": {"eps": eps},
        "learned": {"eps": eps, "pieces": draw.randint(2, 32)},
        "mutual_information": {"eps": 10 ** draw.uniform(-6, -5)},
        "geometric": {"sigma_min": 10 ** draw.uniform(-5, -2), "sigma_max": draw.uniform(8, 30)},
        "linear_rate": {"rate_min": low, "rate_max": draw.uniform(20 - low, 40)},
    }
    return kernels, schedules


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100))
def test_a_random_sound_pair_passes(number: int) -> None:
    draw = random.Random(number)
    kernels, schedules = _configs(draw)
    kernel, schedule = list(kernels)[number % 10], draw.choice(list(schedules))
    if kernel == "learned_power" and schedule == "learned":  # refused: its objective is no integral over time
        schedule = "loglinear"
    states = 4 if kernel == "rates" else draw.choice([5, 9, 28, 41, 64, 66, 130, 257])
    proof = draw.choice(["quick", "full"])
    found = failures(part(kernel, **kernels[kernel]), part(schedule, **schedules[schedule]), states, proof)
    assert found == {}, (kernel, kernels[kernel], schedule, schedules[schedule], states)
