"""Single edits of string samplers: sound samplers pass, other temperatures and rates are found."""

import pytest

from sedd_graph.component.check import Check
from sedd_graph.families.strings import make_parts
from sedd_graph.verify.string_objective import check_reverse
from sedd_graph.verify.string_steps import check_string_steps
from sedd_graph.verify.string_table import EnumeratedTable
from tests.verify.planted_strings import FAULTS, PROCESSES, temperature
from tests.verify.string_kernels import REGISTRY, failing


def steps(process: str, fault: str | None, proof: str = "quick") -> list[Check]:
    plan = PROCESSES[process]
    declared = make_parts(plan, REGISTRY, None).kernel
    parts = make_parts(plan, REGISTRY, 3 + declared.states - declared.data_tokens)
    if fault is not None:
        FAULTS[f"{fault}-{process}"].plant(parts)
    table = parts.kernel.table(one_length=parts.objective.one_length)
    return check_string_steps(table, parts, proof)  # type: ignore[arg-type]  # a literal


@pytest.mark.parametrize("process", ["dice", "indel", "flexmdm"])
def test_sound_samplers_pass(process: str) -> None:
    checks = steps(process, None)
    assert not failing(checks)
    one_length = process.startswith("dice")
    assert [c.name for c in checks] == ["sampler.tokens", "sampler.rates"][: 1 if one_length else 2]


@pytest.mark.parametrize("process", ["delete", "flexmdm"])
def test_a_temperature_is_found(process: str) -> None:
    assert failing(steps(process, temperature.__name__)) == {"sampler.tokens"}


@pytest.mark.slow
def test_missing_insertions_are_found() -> None:
    assert failing(steps("delete", "inserts_5_percent_less", "full")) == {"sampler.rates"}


def test_missing_deletions_are_found() -> None:
    assert "sampler.rates" in failing(steps("indel", "never_deletes"))


@pytest.mark.parametrize("fault", [None, "rates_sum_to_one_more"])
def test_what_samplers_get_is_the_rates(fault: str | None) -> None:
    parts = make_parts(PROCESSES["dice"], REGISTRY, 3)
    if fault is not None:
        FAULTS[f"{fault}-dice"].plant(parts)
    table = parts.kernel.table(one_length=True)
    assert isinstance(table, EnumeratedTable)
    assert check_reverse(table, parts.objective).holds is (fault is None)
