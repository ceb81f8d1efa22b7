"""Faults of contextual vectors and of their objective fail the check that names them; the sound process passes."""

import pytest
import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.verify.vectors_context import check_context, check_decoding
from sedd_graph.verify.vectors_objective import check_objective
from sedd_graph.verify.vectors_toy import Toy, placed
from tests.verify.planted_context import FAULTS, ContextFault, parts


def found(group: str, made: VectorParts) -> list[Check]:
    torch.manual_seed(0)
    if group == "kernel":
        return [check_context(made), check_decoding(placed(made))]
    return check_objective(Toy(placed(made)), "x0", "quick")


@pytest.mark.parametrize("group", ["kernel", pytest.param("objective", marks=pytest.mark.slow)])
def test_the_sound_process_passes(group: str) -> None:
    checks = found(group, parts())
    assert checks
    assert not [c for c in checks if not c.holds]


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] if f.part == "objective" else [], id=f.name) for f in FAULTS],
)
def test_a_planted_fault_is_caught_by_name(fault: ContextFault) -> None:
    checks = found(fault.part, fault.parts())
    assert f"vectors.{fault.caught}" in {c.name for c in checks if c.holds is False}
