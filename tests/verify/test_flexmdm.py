"""The proof of FlexMDM: sound ones pass, broken ones are caught by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.flexmdm import FlexLoss, FlexTau, MaskDelete
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.strings.flexmdm import FlexDraw, FlexKernel
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringWalk
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify.flexmdm import FlexToy, check_flexmdm
from sedd_graph.verify.strings import check_string_sampler
from tests.plans import string_plan

REGISTRY = discover()


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


def plan(sampler: str = "flexmdm_tau", pace: float = 1.0, **parts: Any) -> ProcessPlan:
    made = string_plan(part("mask_delete", pace=pace), part("loglinear"), part("flexmdm"), part(sampler), 10)
    return dataclasses.replace(made, **parts)


@pytest.mark.parametrize(
    "made",
    [plan(), plan("flexmdm_thinning"), plan(pace=4.0, schedule=part("cosine"))],
    ids=["tau", "thinning", "pace"],
)
def test_sound_processes_pass(made: ProcessPlan) -> None:
    assert [(c.name, c.value) for c in prove(made, REGISTRY) if not c.holds] == []


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
def test_what_cannot_work_is_refused_by_name(made: ProcessPlan, key: str) -> None:
    with pytest.raises(BlueprintError) as caught:
        make_parts(made, REGISTRY)
    assert key in [p.path for p in caught.value.problems]


def test_a_schedule_that_ends_too_soon_is_caught() -> None:
    made = plan(schedule=part("linear_rate", rate_min=2.0, rate_max=2.0))
    assert {c.name for c in prove(made, REGISTRY) if not c.holds} >= {"edits.forgets"}


# -- broken ones -------------------------------------------------------------------------------------------------------


def one_schedule(kernel: FlexKernel) -> None:
    """Masks as if they had not to be put in first."""
    kernel.masked = lambda sigma: -torch.expm1(-sigma.double()) * torch.exp(-sigma.double())


def filled_twice_as_fast(kernel: FlexKernel) -> None:
    """The rate of filling twice what it is."""
    weights = kernel.weights
    kernel.weights = lambda sigma: weights(sigma) * torch.tensor([1.0, 2.0])


def per_unit_of_time(kernel: FlexKernel) -> None:
    """Rates by exp(-sigma) and not by 1 - exp(-sigma): the paper's time not turned round."""
    kernel.weights = lambda sigma: torch.ones(len(sigma), 2, dtype=torch.float64)


def gaps_from_the_left(kernel: FlexKernel) -> None:
    """Gaps before a token, not behind it."""
    target = kernel.target

    def wrong(batch: Batch, strings: Strings) -> Any:
        found = target(batch, strings)
        return dataclasses.replace(found, missing=found.missing.roll(1, 1))

    kernel.target = wrong


def masks_match_nothing_twice(kernel: FlexKernel) -> None:
    """A mask stands for the likeliest token alone."""
    target = kernel.target

    def wrong(batch: Batch, strings: Strings) -> Any:
        found = target(batch, strings)
        return dataclasses.replace(found, filled=found.filled.round())

    kernel.target = wrong


def less_noise(kernel: FlexKernel) -> None:
    """Draws at half the noise."""
    sample = kernel.sample
    kernel.sample = lambda batch, sigma, **how: sample(batch, sigma / 2, **how)


def one_mask(kernel: FlexKernel) -> None:
    """Pure noise is one mask."""
    kernel.prior = lambda rows, **how: Strings(
        torch.tensor([[kernel.start, kernel.mask]] * rows), torch.ones(rows, 2, dtype=torch.bool)
    )


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (one_schedule, "edits.law"),
        (filled_twice_as_fast, "edits.transport"),
        (per_unit_of_time, "edits.transport"),
        (gaps_from_the_left, "edits.gap"),
        (masks_match_nothing_twice, "edits.mask"),
        (less_noise, "edits.sample"),
        (one_mask, "edits.prior"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[FlexKernel], None], check: str) -> None:
    kernel = MaskDelete(MaskDelete.Config(pace=3.0), Context({"n": 4}))
    wrong(kernel)
    assert check in {c.name for c in check_flexmdm(kernel, end=14.0) if not c.holds}


class Unbalanced(FlexLoss, kind="string_objective"):
    """Without its constant: the log a - a of what the heads should say."""

    class Config(FlexLoss.Config):
        pass

    def loss(self, outputs: Any, draw: FlexDraw, kernel: FlexKernel) -> Tensor:
        return super().loss(outputs, dataclasses.replace(draw, constant=torch.zeros_like(draw.constant)), kernel)


class LeavesMasks(FlexTau, kind="string_sampler"):
    """Without a last step that fills them."""

    class Config(FlexTau.Config):
        pass

    def walk(self, walk: StringWalk[FlexKernel], steps: int) -> None:
        super().walk(walk, steps)
        tokens = walk.strings.tokens.clone()
        tokens[:9, 1:] = torch.where(walk.strings.attend[:9, 1:], walk.kernel.mask, tokens[:9, 1:])
        walk.strings = dataclasses.replace(walk.strings, tokens=tokens)


def toy_of(made: StringParts) -> FlexToy:
    assert isinstance(made.kernel, FlexKernel)
    return FlexToy(made.kernel)


def test_a_broken_loss_and_a_broken_sampler_are_caught() -> None:
    made = make_parts(plan(), REGISTRY, states=4)
    broken = made._replace(
        objective=Unbalanced(Unbalanced.Config(), Context({"n": 4})),
        sampler=LeavesMasks(LeavesMasks.Config(), Context({"n": 4})),
    )
    assert not any(c.holds for c in toy_of(made).check_objective(broken.objective, broken.schedule))
    assert {c.name for c in check_string_sampler(toy_of(made), broken) if not c.holds} >= {"sampler.clean"}
