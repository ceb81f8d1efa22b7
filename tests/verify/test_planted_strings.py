"""Faults planted in string processes are found by the right check; sound processes pass."""

import pytest

from tests.verify.planted_strings import FAULTS, prove_faulty
from tests.verify.string_kernels import failing

FAST = (
    "bound_2_percent_high-flexmdm",
    "right_at_the_truth_alone-edit_flow",
    "wrong_in_a_narrow_stretch-delete",
    "prior_5_percent_long-indel",
    "inserts_one_gap_later-delete",
    "shut_gaps_are_open-flexmdm",
)
"""Faults that are planted in every run of the suite; the others are marked slow."""


def found(name: str) -> set[str]:
    """Return the checks that fail for a fault, by the quick proof, or else by the full one."""
    fault = FAULTS[name]
    quick = failing(prove_faulty(fault.process, fault.plant, "quick"))
    return quick if quick & fault.names else failing(prove_faulty(fault.process, fault.plant, "full"))


@pytest.mark.parametrize("name", FAST)
def test_a_planted_fault_is_found(name: str) -> None:
    assert found(name) & FAULTS[name].names


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAULTS) - set(FAST)))
def test_every_planted_fault_is_found(name: str) -> None:
    assert found(name) & FAULTS[name].names
