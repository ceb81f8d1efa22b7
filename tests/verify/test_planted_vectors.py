"""Processes on vectors with planted faults fail the check that names the fault; sound ones pass."""

from typing import Any

import pytest
import torch

from sedd_graph.component.check import Check
from sedd_graph.verify import vectors_kernel
from sedd_graph.verify.vectors_kernel import check_kernel
from sedd_graph.verify.vectors_objective import check_objective
from sedd_graph.verify.vectors_sampler import check_sampler
from sedd_graph.verify.vectors_toy import Toy, placed
from tests.verify.planted_vectors import FAULTS, GAUSSIAN, Fault, parts

FAST = ("missing anchor", "missing tT term", "sign of the drift", "posterior of t + 1")


def found(fault: Fault) -> list[Check]:
    torch.manual_seed(0)
    small = placed(fault.parts())
    if fault.part == "objective":
        return check_objective(Toy(small), "x0", "quick")
    if fault.part == "sampler" or fault.caught == "variance":
        return check_sampler(small, "x0", "quick")
    return check_kernel(small, fault.parts(16, 4), "quick")


def is_caught(fault: Fault) -> bool:
    return f"vectors.{fault.caught}" in {check.name for check in found(fault) if check.holds is False}


def is_fast(fault: Fault) -> bool:
    return fault.name in FAST or (fault.part == "kernel" and fault.caught != "variance")


@pytest.mark.parametrize("fault", [f for f in FAULTS if is_fast(f)], ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault: Fault) -> None:
    assert is_caught(fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if not is_fast(f)], ids=lambda fault: fault.name)
def test_every_planted_fault_is_caught_by_name(fault: Fault) -> None:
    assert is_caught(fault)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_faults_of_the_algebra_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_kernel, "posterior", GAUSSIAN[name])
    checks: list[Any] = check_kernel(placed(parts()), parts(16, 4), "quick")
    assert [c.name for c in checks if c.holds is False] == ["vectors.posterior"]
