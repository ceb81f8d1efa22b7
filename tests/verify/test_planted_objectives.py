"""Objectives with planted faults fail the check that names the fault; sound ones pass."""

from typing import Any

import pytest
from sedd_graph_registry.objectives.bounds import Nelbo

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import discover
from sedd_graph.verify.tokens import prove_objective
from tests.plans import maker, token_plan
from tests.verify.parts import part
from tests.verify.planted_objectives import FAULTS, Fault

REGISTRY = discover()


def found(fault: Fault, proof: Proof) -> list[Check]:
    schedule = "geometric" if fault.kernel == "uniform" else "loglinear"
    sampler = part("analytic")
    base = "score_entropy" if fault.output == "log_score" else "genmd4" if fault.kernel == "power" else "nelbo"
    make = maker(token_plan(part(fault.kernel), part(schedule), part(base), sampler, 4, fault.output), REGISTRY)
    cls = fault.cls()
    planted = cls(cls.Config(**fault.config), Context({"n": 4}))

    def with_fault(states: int | None) -> Any:
        return make(states)._replace(objective=planted)

    return prove_objective(with_fault, fault.output, proof)


def caught(fault: Fault, proof: Proof) -> set[str]:
    return {check.name for check in found(fault, proof) if check.holds is False}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault: Fault) -> None:
    assert f"objective.{fault.caught}" in caught(fault, "quick")


def test_without_a_fault_the_same_classes_pass() -> None:
    bases = {(f.base, f.kernel, f.output): f for f in FAULTS}
    for base, kernel, output in bases:
        config = {"block": 2} if "block" in base.Config.model_fields else {}
        assert not caught(Fault("none", base, kernel, output, "", {}, config), "quick"), (base, kernel)


def test_a_declared_difference_is_shown_and_only_its_optimum_is_verified() -> None:
    methods = {
        "loss": lambda self, *arguments: 2 * Nelbo.loss(self, *arguments),
        "differs": lambda self: "it is doubled",
        "bound": lambda self: Nelbo(Nelbo.Config(), self.context),
    }
    checks = {c.name: c for c in found(Fault("doubled", Nelbo, "absorb", "log_x0", "", methods), "quick")}
    assert all(c.holds is not False for c in checks.values())
    assert checks["objective.differs"].holds is None
    assert "it is doubled" in checks["objective.differs"].claim
    assert "objective.loss" not in checks
    assert checks["objective.bound"].holds
