"""Samplers with planted faults fail the check that names the fault; sound ones pass."""

from typing import Any

import pytest

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import discover
from sedd_graph.verify.tokens import prove_sampler
from tests.plans import maker, token_plan
from tests.verify.parts import part
from tests.verify.planted_samplers import FAULTS, Fault

REGISTRY = discover()
FAST = ("temperature 0.8, one token at a time", "dependence ignored", "a mask is left", "prompt not given to the network", "global generator")  # fmt: skip


def found(fault: Fault, proof: Proof) -> list[Check]:
    schedule = "geometric" if fault.kernel == "uniform" else "loglinear"
    plan = token_plan(part(fault.kernel), part(schedule), part("nelbo"), part("analytic"), 4, "log_x0")
    make, cls = maker(plan, REGISTRY), fault.cls()
    planted = cls(cls.Config(**fault.config), Context({"n": 4}))

    def with_fault(states: int | None) -> Any:
        return make(states)._replace(sampler=planted)

    return prove_sampler(with_fault, "log_x0", proof)


def is_caught(fault: Fault) -> bool:
    failing = {check.name for check in found(fault, "full" if fault.full else "quick") if check.holds is False}
    return f"sampler.{fault.caught}" in failing


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in FAST], ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault: Fault) -> None:
    assert is_caught(fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name not in FAST], ids=lambda fault: fault.name)
def test_every_planted_fault_is_caught_by_name(fault: Fault) -> None:
    assert is_caught(fault)
