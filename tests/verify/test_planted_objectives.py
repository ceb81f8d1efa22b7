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


NOT_RUN = {
    "five percent too large": {"tight", "roles", "positions", "optimum"},
    "last position never noised": {"loss", "gradient", "tight", "roles", "positions", "optimum"},
    "raises an error on padding": {"roles", "positions", "optimum"},
}


@pytest.mark.parametrize("name", NOT_RUN)
def test_parts_that_were_not_run_do_not_hold(name: str) -> None:
    (fault,) = (f for f in FAULTS if f.name == name)
    checks = {c.name.removeprefix("objective."): c for c in found(fault, "quick")}
    assert {n for n, c in checks.items() if c.holds is None} == NOT_RUN[name] - {fault.caught}
    assert all(c.value == "not run" for c in checks.values() if c.holds is None)
    assert checks["draws"].holds is (fault.caught != "draws")
    assert checks["random"].holds


def test_a_part_that_was_not_run_on_one_of_the_data_sets_does_not_hold() -> None:
    (fault,) = (f for f in FAULTS if f.name == "right for two positions alone")
    checks = {c.name: c for c in found(fault, "full")}
    assert checks["objective.loss"].holds is False
    assert checks["objective.tight"].holds is None
    assert checks["objective.tight"].value.startswith("not run")


def test_errors_at_the_first_draw_leave_nothing_that_holds() -> None:
    def draw(self: Any, request: Any) -> Any:
        raise RuntimeError("never")

    methods = {"draw": draw, "evaluated": lambda self, kernel: self}
    checks = {c.name: c for c in found(Fault("raises", Nelbo, "absorb", "log_x0", "", methods), "quick")}
    assert checks.pop("objective.runs").holds is False
    assert {(c.holds, c.value) for c in checks.values()} == {(None, "not run")}
