"""Verification of Edit Flows: sound processes pass, and each defect fails the check that names it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.edit_flow import ColumnDraw, EditFlow, EditFlowLoss
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.strings import edit_flow
from sedd_graph.diffusion.strings.columns import Columns, Remaining, partway
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify import edit_flow_cases as verification
from sedd_graph.verify.edit_flow import EditFlowTable
from sedd_graph.verify.string_sampler import check_string_sampler
from sedd_graph.verify.strings import check_string_objective
from tests.plans import string_plan
from tests.verify.string_kernels import REGISTRY, failing, half_noise, one_token_prior, part


def plan(
    mean_length: float = 2.0, sampler: str = "string_tau", objective: str = "edit_flow_loss", **config: Any
) -> ProcessPlan:
    kernel = part("edit_flow", mean_length=mean_length, **config)
    return string_plan(kernel, part("cubic"), part(objective), part(sampler), 10)


@pytest.mark.parametrize(
    "made",
    [plan(), plan(sampler="string_thinning"), plan(alignment="padded"), plan(0.0), plan(0.0, "string_thinning")],
    ids=["optimal-tau", "optimal-thinning", "padded-tau", "empty-tau", "empty-thinning"],
)
def test_sound_processes_pass(made: ProcessPlan) -> None:
    checks = prove(made, REGISTRY, "quick")
    assert failing(checks) == set()
    notes = {c.name for c in checks if c.holds is None}
    assert notes == {"objective.capped"} | ({"objective.loose"} if made.kernel.config.mean_length > 0 else set())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plan(objective="dise"), "needs a kernel of births and deaths"),
        (plan(objective="dice"), "needs a kernel that only deletes"),
        (plan(sampler="string_first_hitting"), "strings of one known length"),
        (dataclasses.replace(plan(), kernel=part("delete")), "needs a kernel of Edit Flows"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_reason(made: ProcessPlan, message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        make_parts(made, REGISTRY)


# -- defects ----------------------------------------------------------------------------------------------------------


def swapped_ends(kernel: EditFlowKernel) -> None:
    """The noise string and the clean string are exchanged."""
    align = kernel.align
    kernel.align = lambda noise, clean: Columns(*reversed(align(noise, clean)))


def disordered(kernel: EditFlowKernel) -> None:
    """The order of the columns is reversed."""
    align = kernel.align
    kernel.align = lambda noise, clean: Columns(*(x.flip(1) for x in align(noise, clean)))


def double_rates(kernel: EditFlowKernel) -> None:
    """All edits are twice as fast."""
    weights = kernel.weights
    kernel.weights = lambda sigma: 2 * weights(sigma)


def forward_rate(kernel: EditFlowKernel) -> None:
    """The rates are kappa' / kappa, at which columns become noise."""
    kernel.weights = lambda sigma: torch.ones_like(sigma)[:, None].expand(-1, 3)


def half_a_step(kernel: EditFlowKernel) -> None:
    """Each step removes half the noise that it should."""
    leap = kernel.leap
    kernel.leap = lambda sigma, sigma_next: leap(sigma, (sigma + sigma_next) / 2)


BROKEN: list[tuple[Callable[[EditFlowKernel], None], str]] = [
    (swapped_ends, "strings.columns"),
    (swapped_ends, "strings.ends"),
    (disordered, "strings.columns"),
    (double_rates, "strings.transport"),
    (double_rates, "objective.rate"),
    (forward_rate, "strings.transport"),
    (half_noise, "strings.sample"),
    (one_token_prior, "strings.prior"),
    (half_a_step, "sampler.law"),
]


def small() -> EditFlow:
    """Return a kernel of two data tokens and at most two noise tokens."""
    return EditFlow(EditFlow.Config(frequencies=(0.6, 0.4), mean_length=1.0, longest=2), Context({"n": 3}))


@pytest.mark.parametrize(("wrong", "check"), BROKEN, ids=[f"{w.__name__}-{c}" for w, c in BROKEN])
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[EditFlowKernel], None], check: str) -> None:
    kernel = small()
    wrong(kernel)
    table = EditFlowTable(kernel)
    checks = table.check_kernel(7.0)
    if not check.startswith("strings."):
        made = make_parts(plan(), REGISTRY, states=3)._replace(kernel=kernel)
        checks = [*check_string_objective(table, made, "quick"), *check_string_sampler(table, made, "quick")]
    assert check in failing(checks)


def gap_before(left: Remaining) -> Remaining:
    """Tokens are inserted one position too early."""
    return left._replace(place=torch.where(left.insert, (left.place - 1).clamp(min=0), left.place))


def kinds_swapped(left: Remaining) -> Remaining:
    """Insertions and deletions are exchanged."""
    return left._replace(insert=left.delete, delete=left.insert)


def old_token(left: Remaining) -> Remaining:
    """Tokens are replaced by another one than the clean string's."""
    return left._replace(token=torch.where(left.substitute, 1 - left.token, left.token))


@pytest.mark.parametrize("wrong", [gap_before, kinds_swapped, old_token])
def test_wrong_remaining_edits_are_caught(
    wrong: Callable[[Remaining], Remaining], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **how: Any) -> tuple[Strings, Remaining]:
        strings, left = partway(*arguments, **how)
        return strings, wrong(left)

    for module in (edit_flow, verification):
        monkeypatch.setattr(module, "partway", broken)
    assert "strings.transport" in failing(EditFlowTable(small()).check_kernel(7.0))


class Uncounted(EditFlowLoss, kind="string_objective"):
    """The loss without its constant, the number of remaining edits, which makes it a bound."""

    class Config(EditFlowLoss.Config):
        pass

    def loss(self, outputs: Any, draw: ColumnDraw, kernel: EditFlowKernel) -> Tensor:
        number = torch.stack([x.sum(-1) for x in draw.left[2:]], -1)
        return super().loss(outputs, draw, kernel) + (draw.weights * number).sum(-1)


class OneKind(EditFlowLoss, kind="string_objective"):
    """The loss without deletions."""

    class Config(EditFlowLoss.Config):
        pass

    def loss(self, outputs: Any, draw: ColumnDraw, kernel: EditFlowKernel) -> Tensor:
        only = draw.weights * torch.tensor([1.0, 0.0, 1.0])
        return super().loss(outputs, dataclasses.replace(draw, weights=only), kernel)


@pytest.mark.parametrize("wrong", [Uncounted, OneKind])
def test_a_loss_without_one_of_its_terms_is_caught(wrong: type[EditFlowLoss]) -> None:
    made = make_parts(plan(longest=2), REGISTRY, states=3)
    assert isinstance(made.kernel, EditFlowKernel)
    table = EditFlowTable(made.kernel)
    broken = made._replace(objective=wrong(wrong.Config(), Context({"n": 3})))
    assert not failing(check_string_objective(table, made, "quick"))
    assert "objective.bound" in failing(check_string_objective(table, broken, "quick"))


def test_noise_of_any_length_has_no_table() -> None:
    kernel = EditFlow(EditFlow.Config(frequencies=(0.6, 0.4), mean_length=1.0), Context({"n": 3}))
    assert kernel.longest is None
    with pytest.raises(ValueError, match="noise strings of a maximum length"):
        EditFlowTable(kernel)
