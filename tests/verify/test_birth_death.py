"""Verification of births and deaths: sound processes pass, and each defect fails the check that names it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.birth_death import Delete, Indel
from sedd_graph_registry.strings.objectives import DISE, RatioDraw
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.strings.alignment import Links
from sedd_graph.diffusion.strings.birth_death import BirthDeath, Target
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify.birth_death import BirthDeathTable
from sedd_graph.verify.strings import check_string_objective
from tests.plans import string_plan
from tests.verify.string_kernels import REGISTRY, failing, half_noise, one_token_prior, part

INDEL = {"frequencies": (0.6, 0.4), "mean_length": 0.25}


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
    assert [(c.name, c.value) for c in prove(made, REGISTRY, "quick") if not c.holds] == []


def test_a_schedule_that_ends_too_soon_is_caught() -> None:
    assert "strings.forgets" in failing(prove(plan("indel", end=4.0), REGISTRY, "quick"))


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (plan("indel", "dice"), "objective"),
        (plan("delete", "dise", "string_first_hitting"), "sample"),
        (dataclasses.replace(plan("indel"), objective=part("dise", targets="sampled")), "objective"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_their_place(made: ProcessPlan, key: str) -> None:
    with pytest.raises(BlueprintError) as caught:
        make_parts(made, REGISTRY)
    assert key in [p.path for p in caught.value.problems]


# -- defects ----------------------------------------------------------------------------------------------------------


def double_clock(kernel: BirthDeath) -> None:
    """The fate of a token is that at twice the noise."""
    links = kernel.links
    kernel.links = lambda sigma: links(2 * sigma)


def no_births_after_death(kernel: BirthDeath) -> None:
    """A token that dies leaves no born ones behind."""
    links = kernel.links

    def wrong(sigma: Tensor) -> Links:
        found = links(sigma)
        return Links(found.survive, found.vanish + found.replace, 0 * found.replace, found.birth)

    kernel.links = wrong


def double_insertion_rate(kernel: BirthDeath) -> None:
    """Insertions are twice as fast."""
    weights = kernel.weights
    scale = torch.tensor([2.0, 1.0])
    kernel.weights = lambda sigma: weights(sigma) * scale
    kernel.target = _target_of(kernel, weights)


def _target_of(kernel: BirthDeath, weights: Callable[[Tensor], Tensor]) -> Any:
    """Return the kernel's target, rescaled to the ``weights`` before they changed."""
    target = kernel.target

    def as_before(batch: Any, strings: Strings, sigma: Tensor) -> Target:
        found = target(batch, strings, sigma)
        scale = (kernel.weights(sigma.double()) / weights(sigma.double()))[:, 0].float()
        return dataclasses.replace(
            found, missing=found.missing * scale[:, None, None], fresh=found.fresh * scale[:, None]
        )

    return as_before


def unit_deletion_rate(kernel: BirthDeath) -> None:
    """Born tokens are deleted at rate 1 instead of 1 / beta."""
    weights = kernel.weights
    kernel.weights = lambda sigma: torch.stack([weights(sigma)[:, 0], torch.ones_like(sigma)], -1)


def first_of_equal_tokens(kernel: BirthDeath) -> None:
    """Equal tokens are not added up."""
    target = kernel.target

    def wrong(batch: Any, strings: Strings, sigma: Tensor) -> Target:
        found = target(batch, strings, sigma)
        return dataclasses.replace(found, missing=found.missing.clamp(max=0.5))

    kernel.target = wrong


BROKEN: list[tuple[Callable[[BirthDeath], None], str, str]] = [
    (double_clock, "delete", "strings.sample"),
    (double_clock, "indel", "strings.law"),
    (no_births_after_death, "indel", "strings.law"),
    (double_insertion_rate, "delete", "strings.insert"),
    (unit_deletion_rate, "indel", "strings.delete"),
    (first_of_equal_tokens, "delete", "strings.insert"),
    (half_noise, "delete", "strings.sample"),
    (half_noise, "indel", "strings.sample"),
    (one_token_prior, "delete", "strings.prior"),
    (one_token_prior, "indel", "strings.prior"),
]


@pytest.mark.parametrize(("wrong", "name", "check"), BROKEN, ids=[f"{w.__name__}-{n}" for w, n, _ in BROKEN])
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[BirthDeath], None], name: str, check: str) -> None:
    context = Context({"n": 3})
    kernel: BirthDeath = Delete(Delete.Config(), context) if name == "delete" else Indel(Indel.Config(**INDEL), context)
    wrong(kernel)
    assert check in failing(BirthDeathTable(kernel).check_kernel(14.0))


class Unbalanced(DISE, kind="string_objective"):
    """DISE without its constant, the sum of a log a - a over the regression targets a."""

    class Config(DISE.Config):
        pass

    def loss(self, outputs: Any, draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        return super().loss(outputs, dataclasses.replace(draw, constant=torch.zeros_like(draw.constant)), kernel)


def test_a_loss_without_its_constant_is_caught() -> None:
    made = make_parts(plan("delete"), REGISTRY, states=3)
    broken = made._replace(objective=Unbalanced(Unbalanced.Config(), Context({"n": 3})))
    assert isinstance(made.kernel, BirthDeath)
    table: Any = BirthDeathTable(made.kernel)
    perfect = table.perfect  # an eighth of the draws is enough to tell the two apart
    table.perfect = lambda objective, schedule, rows, *, seed: perfect(objective, schedule, rows // 8, seed=seed)
    assert all(c.holds for c in table.check_objective(made.objective, made.schedule))
    assert not any(c.holds for c in table.check_objective(broken.objective, broken.schedule))
    assert "objective.tight" in failing(check_string_objective(table, broken, "quick"))
