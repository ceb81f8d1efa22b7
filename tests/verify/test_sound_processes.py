"""No false alarm: shipped blueprints and random sound configurations of processes on token rows pass their proofs."""

import random
from typing import Any

import pytest

from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import discover
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.runs.check import check
from sedd_graph.verify.tokens import prove_objective, prove_sampler
from tests.conftest import BLUEPRINTS
from tests.plans import maker, token_plan
from tests.verify.parts import part

REGISTRY = discover()
KERNELS: dict[str, Any] = {
    "absorb": lambda r: {},
    "uniform": lambda r: {},
    "unigram": lambda r: {"frequencies": [r.uniform(1, 9) for _ in range(5)]},
    "mixture": lambda r: {"uniform": r.uniform(0.05, 1), "decay": r.choice([0.0, r.random(), 1.0])},
    "power": lambda r: {"gamma": r.uniform(-0.9, 0.9), "frequencies": [r.uniform(1, 9) for _ in range(5)]},
    "spindle": lambda r: {"strength": r.uniform(0.05, 1)},
}
OBJECTIVES: dict[str, Any] = {
    "nelbo": lambda r: {"times": r.choice(["low_discrepancy", "independent"]), "t_min": 10 ** r.uniform(-6, -3)},
    "score_entropy": lambda r: {"times": r.choice(["low_discrepancy", "independent"])},
    "masked_count": lambda r: {"counts": r.choice(["low_discrepancy", "independent"])},
    "d3pm": lambda r: {"steps": r.choice([1, 2, 7, 50, 1000, 5000]), "auxiliary": r.choice([0.0, 0.01])},
    "genmd4": lambda r: {},
    "block_nelbo": lambda r: {"block": r.choice([1, 2, 16]), "clip": r.choice([None, (0.3, 0.8)])},
}
SAMPLERS: dict[str, Any] = {
    "ancestral": lambda r: {"steps": r.choice([1, 16, 100, 400])},
    "analytic": lambda r: {"steps": r.choice([1, 16, 100, 400])},
    "euler": lambda r: {"steps": 200},
    "tau_leaping": lambda r: {"steps": 200},
    "predictor_corrector": lambda r: {"steps": 60, "corrections": r.choice([1, 3])},
    "psi": lambda r: {"steps": 100, "kappa": r.random()},
    "remdm": lambda r: {"steps": 100, "remask": r.choice(["cap", "rescale", "conf", "loop"]), "eta": r.random()},
    "first_hitting": lambda r: {},
    "uniformization": lambda r: {},
    "confidence": lambda r: {"by": r.choice(["probability", "random"])},
}
SCHEDULES = ("loglinear", "cosine", "polynomial", "geometric")


def configuration(seed: int) -> tuple[Any, str]:
    """Return the factory of a random sound process, and the name of its output."""
    r = random.Random(seed)
    while True:
        chosen = [
            (name, make(r)) for name, make in (r.choice(list(t.items())) for t in (KERNELS, OBJECTIVES, SAMPLERS))
        ]
        kernel, objective, sampler = (part(name, **config) for name, config in chosen)
        schedule, output = part(r.choice(SCHEDULES)), r.choice(["log_x0", "log_score"])
        make = maker(token_plan(kernel, schedule, objective, sampler, 6, output), REGISTRY)
        try:
            make(None)
        except BlueprintError:
            continue
        return make, output


def wrong(checks: list[Check]) -> list[tuple[str, str]]:
    return [(c.name, c.value) for c in checks if c.holds is False]


def both(make: Any, output: str, proof: Proof) -> list[tuple[str, str]]:
    return wrong([*prove_objective(make, output, proof), *prove_sampler(make, output, proof)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_sound_configurations_pass(seed: int) -> None:
    make, output = configuration(seed)
    assert not both(make, output, "full" if seed % 4 == 0 else "quick")


def plans() -> dict[str, ProcessPlan]:
    """Return the processes on token rows of the shipped blueprints, one for each that differs in more than its size."""
    found: dict[str, ProcessPlan] = {}
    for path in BLUEPRINTS:
        plan = check(path).plan
        if isinstance(plan, ProcessPlan) and plan.family == "tokens":
            found.setdefault(repr([p.record() for p in own(plan)]), plan)
    return found


def own(plan: ProcessPlan) -> tuple[Part, ...]:
    return plan.kernel, plan.schedule, plan.objective, plan.sampler


@pytest.mark.slow
def test_shipped_blueprints_pass() -> None:
    for plan in plans().values():
        assert not both(maker(plan, REGISTRY), plan.output, "full"), plan.describe()
