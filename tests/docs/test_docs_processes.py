"""The reference pages of processes and checks name every kernel, schedule and check that there is, and no other."""

import re
from typing import Any

import pytest
import yaml

from sedd_graph.component.outputs import TOKEN_LOGITS
from sedd_graph.component.registry import discover
from sedd_graph.families import vectors
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.strings import prove as prove_strings
from sedd_graph.families.tokens import make_parts, prove
from tests.conftest import BLUEPRINTS, ROOT
from tests.plans import string_plan, token_plan

TEXT, CHECKS, PROOFS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("reference/processes", "reference/checks", "explanation/proofs")
)
REGISTRY = discover()
OF_PARTS = "check of string objectives and samplers"


def first_column(heading: str) -> list[str]:
    """The names in the first column of the table whose first heading is ``heading``."""
    found = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT + CHECKS, flags=re.MULTILINE)
    assert found is not None, heading
    return re.findall(r"^\| `([\w.]+)` \|", found[1], flags=re.MULTILINE)


@pytest.mark.parametrize(
    "kind", ["kernel", "schedule", "objective", "string kernel", "string objective", "string sampler"]
)
def test_every_one_stands_there(kind: str) -> None:
    own = [e.name for e in REGISTRY if e.distribution.replace("-", "_").startswith("sedd_graph ")]
    assert sorted(first_column(kind)) == sorted(n for n in own if REGISTRY.component(n).kind == kind.replace(" ", "_"))


@pytest.mark.parametrize("kind", ["kernel", "objective", "sampler"])
def test_every_one_of_vectors_stands_there(kind: str) -> None:
    own = [e.name for e in REGISTRY if e.distribution.replace("-", "_").startswith("sedd_graph ")]
    known = [n for n in own if REGISTRY.component(n).kind == f"vector_{kind}"]
    assert sorted(first_column(f"{kind} of vectors")) == sorted(known)


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


def test_every_check_stands_there_in_order() -> None:
    plan = token_plan(part("absorb"), part("loglinear"), part("nelbo"), part("ancestral"), 4, "log_x0")
    assert first_column("check") == [c.name for c in prove(plan, REGISTRY)]


def test_every_check_in_discrete_time_stands_there() -> None:
    plan = token_plan(part("steps", steps=8), part("steps_taken", steps=8), part("d3pm", steps=8), part("ancestral", steps=8), 4, "log_x0")  # fmt: skip
    named = [c.name for c in prove(plan, REGISTRY, "quick")]
    known = {*first_column("check"), *first_column("further check")}
    assert [n for n in named if n not in known] == first_column("check in discrete time")


def of_strings(named: list[str]) -> list[str]:
    """The checks of the kernel but for those of fates, which come in order of the documentation where there are any."""
    fates = first_column("check of fates")
    assert [n for n in named if n in fates] in ([], fates)
    return [n for n in named if n.startswith("strings.") and n not in fates]


def test_every_check_of_strings_stands_there_in_order() -> None:
    plan = string_plan(part("delete"), part("loglinear"), part("dise"), part("string_tau"), 4)
    named = [c.name for c in prove_strings(plan, REGISTRY, "quick")]
    assert first_column("check of delete and indel") == of_strings(named)
    assert {n for n in named if not n.startswith(("strings.", "schedule."))} <= set(first_column(OF_PARTS))


def test_every_check_of_vectors_stands_there_in_order() -> None:
    kernel = part("gaussian", vocab=4, width=1)
    outputs = REGISTRY.component("gaussian").parametrizations(kernel.config)[0]
    plan = ProcessPlan("vectors", kernel, part("stepwise"), part("diffusion_lm"), part("ddpm"), 4, outputs)
    named = [c.name for c in vectors.prove(plan, REGISTRY, "quick")]
    own = [n for n in named if n.startswith("vectors.")]
    assert first_column("check of vectors") == [*own, "vectors.output", "vectors.runs"]


@pytest.mark.parametrize("sampler", [part("ode", method="euler"), part("reversible_heun")], ids=lambda p: p.name)
def test_every_check_of_a_flow_stands_there_in_order(sampler: Part) -> None:
    kernel = part("normalized_gaussian", vocab=4, width=128)
    schedule, objective = part("gumbel", location=3.0), part("langflow")
    plan = ProcessPlan("vectors", kernel, schedule, objective, sampler, 4, (TOKEN_LOGITS,))
    own = [c.name for c in vectors.prove(plan, REGISTRY, "quick") if c.name.startswith("vectors.")]
    known = [*first_column("check of vectors")[:-2], *first_column("check of a flow of vectors")]
    assert own == [name for name in known if sampler.name != "ode" or name != "vectors.inverse"]


def test_every_check_of_contextual_vectors_stands_there_in_order() -> None:
    kernel = part("encoded_gaussian", vocab=4, width=2)
    outputs = REGISTRY.component("encoded_gaussian").parametrizations(kernel.config)[0]
    sampler = part("ode", method="euler", spacing="both")
    plan = ProcessPlan("vectors", kernel, part("logit_normal"), part("elf"), sampler, 4, outputs)
    found = vectors.prove(plan, REGISTRY, "quick")
    assert not [c for c in found if c.holds is False]
    own = {c.name for c in found if c.name.startswith("vectors.")}
    tables = [first_column(f"check of {of}") for of in ("vectors", "contextual vectors", "a flow of vectors")]
    assert own <= {name for table in tables for name in table}
    assert set(tables[1]) <= own


def test_every_check_of_columns_stands_there_in_order() -> None:
    kernel = part("edit_flow", mean_length=1.0)
    plan = string_plan(kernel, part("cubic"), part("edit_flow_loss"), part("string_tau"), 4)
    named = [c.name for c in prove_strings(plan, REGISTRY, "quick")]
    assert first_column("check of edit_flow") == of_strings(named)
    parts = [n for n in named if not n.startswith(("strings.", "schedule."))]
    assert parts == [n for n in first_column(OF_PARTS) if n in parts]


def test_every_check_of_masks_stands_there_in_order() -> None:
    plan = string_plan(part("mask_delete"), part("loglinear"), part("flexmdm"), part("flexmdm_tau"), 5)
    named = [c.name for c in prove_strings(plan, REGISTRY, "quick")]
    assert first_column("check of mask_delete") == of_strings(named)
    assert {n for n in named if not n.startswith(("strings.", "schedule."))} <= set(first_column(OF_PARTS))


def test_blueprints_and_the_one_shown() -> None:
    section = TEXT.split("## Blueprints")[1]
    names = re.findall(r"`([\w-]+-tiny)`", section)
    assert set(names) <= {p.stem for p in BLUEPRINTS}
    (block,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    process = yaml.safe_load(block)["process"]
    schedule = process.pop("schedule")
    plan = token_plan(
        part(process.pop("op"), **process), part(schedule["op"]), part("nelbo"), part("ancestral"), 4, "log_x0"
    )
    assert make_parts(plan, REGISTRY).kernel.mask == 3


def test_every_test_that_stands_there_is_one() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PROOFS)
    assert len(named) > 15
    missing = [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing
