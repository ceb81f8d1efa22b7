"""Faults of the probability-flow ODE, its sampler and its proposal fail the check that names them; the sound process passes."""

import pytest
import torch
from sedd_graph_registry.vectors.ode import Ode
from sedd_graph_registry.vectors.reversible import ReversibleHeun

from sedd_graph.component.check import Check
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.verify.vectors_flow import check_fitted, check_flow, check_order
from sedd_graph.verify.vectors_inverse import check_inverse
from sedd_graph.verify.vectors_kernel import check_kernel
from sedd_graph.verify.vectors_objective import check_objective
from sedd_graph.verify.vectors_sampler import _check_law, _check_limit, check_sampler
from sedd_graph.verify.vectors_toy import Toy, placed
from tests.verify.planted_flow import FAULTS, FlowFault, parts

FAST = ("fitted", "order", "kernel", "inverse", "law")


def found(group: str, made: VectorParts) -> list[Check]:
    torch.manual_seed(0)
    small = placed(made)
    if group == "fitted":
        return check_fitted(small, "quick")
    if group == "flow":
        return check_flow(Toy(small, 2), "logits", "quick")
    if group == "order":
        return check_order(Toy(small, 2), "logits")
    if group == "inverse":
        return check_inverse(Toy(small, 2), "logits")
    if group == "law":
        return [_check_limit(small, "logits", "quick")]
    if group == "objective":
        return check_objective(Toy(small), "logits", "quick")
    return check_sampler(small, "logits", "quick") if group == "sampler" else check_kernel(small, small, "quick")


def is_caught(fault: FlowFault) -> bool:
    return f"vectors.{fault.caught}" in {c.name for c in found(fault.group, fault.parts()) if c.holds is False}


@pytest.mark.parametrize("group", FAST)
def test_the_sound_process_passes(group: str) -> None:
    checks = found(group, parts(sampler=ReversibleHeun if group in ("inverse", "law") else Ode))
    assert checks
    assert not [c for c in checks if not c.holds]


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.group in FAST], ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault: FlowFault) -> None:
    assert is_caught(fault)


def test_the_law_of_an_ode_is_verified_more_sharply_than_by_random_draws() -> None:
    fault = next(f for f in FAULTS if f.group == "law")
    torch.manual_seed(0)
    assert _check_law(
        placed(fault.parts()), "logits", "quick"
    ).holds  # the planted fault is below the error of the draws


def test_the_reversible_sampler_has_its_order() -> None:
    torch.manual_seed(0)
    (check,) = check_order(Toy(placed(parts(sampler=ReversibleHeun)), 2), "logits")
    assert check.holds


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.group not in FAST], ids=lambda fault: fault.name)
def test_every_planted_fault_is_caught_by_name(fault: FlowFault) -> None:
    assert is_caught(fault)


@pytest.mark.slow
def test_the_sound_likelihood_passes() -> None:
    checks = found("flow", parts())
    assert len(checks) == 2
    assert all(c.holds for c in checks)
