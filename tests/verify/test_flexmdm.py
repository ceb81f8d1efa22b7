"""Verification of FlexMDM: sound processes pass, and each defect fails the check that names it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.flexmdm import FlexLoss, FlexTau, MaskDelete
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.strings.flexmdm import FlexDraw, FlexKernel
from sedd_graph.diffusion.strings.sampler import StringWalk
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify.flexmdm import FlexTable
from sedd_graph.verify.string_sampler import check_string_sampler
from sedd_graph.verify.strings import check_string_objective
from tests.plans import string_plan
from tests.verify.string_kernels import REGISTRY, failing, half_noise, one_token_prior, part


def plan(sampler: str = "flexmdm_tau", pace: float = 1.0, **parts: Any) -> ProcessPlan:
    made = string_plan(part("mask_delete", pace=pace), part("loglinear"), part("flexmdm"), part(sampler), 10)
    return dataclasses.replace(made, **parts)


@pytest.mark.parametrize(
    "made",
    [plan(), plan("flexmdm_thinning"), plan(pace=4.0, schedule=part("cosine"))],
    ids=["tau", "thinning", "pace"],
)
def test_sound_processes_pass(made: ProcessPlan) -> None:
    assert [(c.name, c.value) for c in prove(made, REGISTRY, "quick") if not c.holds] == []


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (plan(objective=part("dise")), "objective"),
        (plan("string_tau"), "sample"),
        (plan("string_thinning"), "sample"),
        (dataclasses.replace(plan(), kernel=part("delete")), "objective"),
        (dataclasses.replace(plan(), kernel=part("delete")), "sample"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_their_place(made: ProcessPlan, key: str) -> None:
    with pytest.raises(BlueprintError) as caught:
        make_parts(made, REGISTRY)
    assert key in [p.path for p in caught.value.problems]


def test_a_schedule_that_ends_too_soon_is_caught() -> None:
    made = plan(schedule=part("linear_rate", rate_min=2.0, rate_max=2.0))
    assert "strings.forgets" in failing(prove(made, REGISTRY, "quick"))


# -- defects ----------------------------------------------------------------------------------------------------------


def masks_without_insertion(kernel: FlexKernel) -> None:
    """The probability of a mask is that of a token which need not be inserted first."""
    kernel.masked = lambda sigma: -torch.expm1(-sigma.double()) * torch.exp(-sigma.double())


def double_fill_rate(kernel: FlexKernel) -> None:
    """Masks are filled twice as fast."""
    weights = kernel.weights
    kernel.weights = lambda sigma: weights(sigma) * torch.tensor([1.0, 2.0])


def rates_of_the_papers_time(kernel: FlexKernel) -> None:
    """The rates are those of the paper's time, in which noise is at 0."""
    kernel.weights = lambda sigma: torch.ones(len(sigma), 2, dtype=torch.float64)


def gaps_before_tokens(kernel: FlexKernel) -> None:
    """Missing tokens are counted before a token, not behind it."""
    target = kernel.target

    def wrong(batch: Batch, strings: Strings) -> Any:
        found = target(batch, strings)
        return dataclasses.replace(found, missing=found.missing.roll(1, 1))

    kernel.target = wrong


def masks_of_one_token(kernel: FlexKernel) -> None:
    """A mask is taken for its most likely token."""
    target = kernel.target

    def wrong(batch: Batch, strings: Strings) -> Any:
        found = target(batch, strings)
        return dataclasses.replace(found, filled=found.filled.round())

    kernel.target = wrong


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (masks_without_insertion, "strings.law"),
        (double_fill_rate, "strings.transport"),
        (rates_of_the_papers_time, "strings.transport"),
        (gaps_before_tokens, "strings.gap"),
        (masks_of_one_token, "strings.mask"),
        (half_noise, "strings.sample"),
        (one_token_prior, "strings.prior"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[FlexKernel], None], check: str) -> None:
    kernel = MaskDelete(MaskDelete.Config(pace=3.0), Context({"n": 4}))
    wrong(kernel)
    assert check in failing(FlexTable(kernel).check_kernel(14.0))


class Unbalanced(FlexLoss, kind="string_objective"):
    """The loss without its constant, the sum of a log a - a over the regression targets a."""

    class Config(FlexLoss.Config):
        pass

    def loss(self, outputs: Any, draw: FlexDraw, kernel: FlexKernel) -> Tensor:
        return super().loss(outputs, dataclasses.replace(draw, constant=torch.zeros_like(draw.constant)), kernel)


class LeavesMasks(FlexTau, kind="string_sampler"):
    """A sampler that leaves masks in the first nine rows."""

    class Config(FlexTau.Config):
        pass

    def walk(self, walk: StringWalk[FlexKernel], steps: int) -> None:
        super().walk(walk, steps)
        tokens = walk.strings.tokens.clone()
        tokens[:9, 1:] = torch.where(walk.strings.attend[:9, 1:], walk.kernel.mask, tokens[:9, 1:])
        walk.strings = dataclasses.replace(walk.strings, tokens=tokens)


def test_a_broken_loss_and_a_broken_sampler_are_caught() -> None:
    made = make_parts(plan(), REGISTRY, states=4)
    broken = made._replace(
        objective=Unbalanced(Unbalanced.Config(), Context({"n": 4})),
        sampler=LeavesMasks(LeavesMasks.Config(), Context({"n": 4})),
    )
    assert isinstance(made.kernel, FlexKernel)
    table = FlexTable(made.kernel)
    assert "objective.tight" in failing(check_string_objective(table, broken, "quick"))
    assert "sampler.clean" in failing(check_string_sampler(table, broken, "quick"))
