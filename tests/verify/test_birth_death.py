"""The proof of processes that change lengths: sound ones pass, broken ones are caught by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.birth_death import Delete, Indel
from sedd_graph_registry.strings.objectives import DISE, RatioDraw
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.strings.alignment import Links
from sedd_graph.diffusion.strings.birth_death import BirthDeath, Target
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify.birth_death import StringToy, check_birth_death
from tests.plans import string_plan

REGISTRY = discover()
INDEL = {"frequencies": (0.6, 0.4), "mean_length": 0.25}


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


def plan(kernel: str, objective: str = "dise", sampler: str = "string_tau", **schedule: Any) -> ProcessPlan:
    config = {} if kernel == "delete" else {"mean_length": 1.0}
    level = (
        part("loglinear")
        if kernel == "delete"
        else part("linear_rate", rate_min=0.01, rate_max=schedule.get("end", 40.0))
    )
    return string_plan(part(kernel, **config), level, part(objective), part(sampler), 10)


@pytest.mark.parametrize(
    "made",
    [
        plan("delete"),
        plan("delete", "dice", "string_tau"),
        plan("delete", "dice", "string_first_hitting"),
        plan("delete", sampler="string_thinning"),
        plan("indel"),
        plan("indel", sampler="string_thinning"),
    ],
    ids=lambda p: "-".join(x.contract.name for x in (p.kernel, p.objective, p.sampler)),
)
def test_sound_processes_pass(made: ProcessPlan) -> None:
    assert [(c.name, c.value) for c in prove(made, REGISTRY) if not c.holds] == []


def test_a_schedule_that_ends_too_soon_is_caught() -> None:
    failing = {c.name for c in prove(plan("indel", end=4.0), REGISTRY) if not c.holds}
    assert "edits.forgets" in failing


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (plan("indel", "dice"), "objective"),
        (plan("delete", "dise", "string_first_hitting"), "sample"),
        (dataclasses.replace(plan("indel"), objective=part("dise", targets="sampled")), "objective"),
    ],
)
def test_what_cannot_work_is_refused_by_name(made: ProcessPlan, key: str) -> None:
    with pytest.raises(BlueprintError) as caught:
        make_parts(made, REGISTRY)
    assert key in [p.path for p in caught.value.problems]


# -- broken ones -------------------------------------------------------------------------------------------------------


def faster(kernel: BirthDeath) -> None:
    """Twice the clock in what becomes of a token."""
    links = kernel.links
    kernel.links = lambda sigma: links(2 * sigma)


def children_lost(kernel: BirthDeath) -> None:
    """Tokens that die leave none behind."""
    links = kernel.links

    def wrong(sigma: Tensor) -> Links:
        found = links(sigma)
        return Links(found.survive, found.vanish + found.replace, 0 * found.replace, found.birth)

    kernel.links = wrong


def rates_doubled(kernel: BirthDeath) -> None:
    """Insertions twice as fast."""
    weights = kernel.weights
    scale = torch.tensor([2.0, 1.0])
    kernel.weights = lambda sigma: weights(sigma) * scale
    kernel.target = _target_of(kernel, weights)


def _target_of(kernel: BirthDeath, weights: Callable[[Tensor], Tensor]) -> Any:
    """Targets as they were before ``weights`` changed."""
    target = kernel.target

    def as_before(batch: Any, strings: Strings, sigma: Tensor) -> Target:
        found = target(batch, strings, sigma)
        scale = (kernel.weights(sigma.double()) / weights(sigma.double()))[:, 0].float()
        return dataclasses.replace(
            found, missing=found.missing * scale[:, None, None], fresh=found.fresh * scale[:, None]
        )

    return as_before


def deaths_forgotten(kernel: BirthDeath) -> None:
    """Born tokens go at rate 1 instead of 1/beta."""
    weights = kernel.weights
    kernel.weights = lambda sigma: torch.stack([weights(sigma)[:, 0], torch.ones_like(sigma)], -1)


def twins_apart(kernel: BirthDeath) -> None:
    """Of equal tokens only the first counts."""
    target = kernel.target

    def wrong(batch: Any, strings: Strings, sigma: Tensor) -> Target:
        found = target(batch, strings, sigma)
        return dataclasses.replace(found, missing=found.missing.clamp(max=0.5))

    kernel.target = wrong


def less_noise(kernel: BirthDeath) -> None:
    """Draws at half the noise."""
    sample = kernel.sample
    kernel.sample = lambda batch, sigma, **how: sample(batch, sigma / 2, **how)


def one_token(kernel: BirthDeath) -> None:
    """Pure noise is one token."""
    kernel.prior = lambda rows, **how: Strings(
        torch.tensor([[kernel.start, 0]] * rows), torch.ones(rows, 2, dtype=torch.bool)
    )


BROKEN: list[tuple[Callable[[BirthDeath], None], str, str]] = [
    (faster, "delete", "edits.sample"),
    (faster, "indel", "edits.law"),
    (children_lost, "indel", "edits.law"),
    (rates_doubled, "delete", "edits.insert"),
    (deaths_forgotten, "indel", "edits.delete"),
    (twins_apart, "delete", "edits.insert"),
    (less_noise, "delete", "edits.sample"),
    (less_noise, "indel", "edits.sample"),
    (one_token, "delete", "edits.prior"),
    (one_token, "indel", "edits.prior"),
]


@pytest.mark.parametrize(("wrong", "name", "check"), BROKEN, ids=[f"{w.__name__}-{n}" for w, n, _ in BROKEN])
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[BirthDeath], None], name: str, check: str) -> None:
    context = Context({"n": 3})
    kernel: BirthDeath = Delete(Delete.Config(), context) if name == "delete" else Indel(Indel.Config(**INDEL), context)
    wrong(kernel)
    assert check in {c.name for c in check_birth_death(kernel, end=14.0) if not c.holds}


class Unbalanced(DISE, kind="string_objective"):
    """DISE without its constant: the log a - a of what the heads should say."""

    class Config(DISE.Config):
        pass

    def loss(self, outputs: Any, draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        return super().loss(outputs, dataclasses.replace(draw, constant=torch.zeros_like(draw.constant)), kernel)


def test_a_loss_without_its_constant_is_caught() -> None:
    made = make_parts(plan("delete"), REGISTRY, states=3)
    broken = made._replace(objective=Unbalanced(Unbalanced.Config(), Context({"n": 3})))
    assert isinstance(made.kernel, BirthDeath)
    toy = StringToy(made.kernel)
    assert all(c.holds for c in toy.check_objective(made.objective, made.schedule))
    assert not any(c.holds for c in toy.check_objective(broken.objective, broken.schedule))
