"""The proof of Edit Flows: sound processes pass, broken ones are caught by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.strings.edit_flow import ColumnDraw, EditFlow, EditFlowLoss
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.strings import edit_flow
from sedd_graph.diffusion.strings.columns import Columns, Remaining, partway
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.strings import make_parts, prove
from sedd_graph.verify import edit_flow as proof
from sedd_graph.verify.edit_flow import ColumnToy, _bound, check_columns
from sedd_graph.verify.strings import check_string_sampler
from tests.plans import string_plan

REGISTRY = discover()


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


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
    checks = prove(made, REGISTRY)
    assert [(c.name, c.value) for c in checks if c.holds is False] == []
    loose = made.kernel.config.mean_length > 0
    assert ("objective.loose" in {c.name for c in checks}) == loose


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plan(objective="dise"), "needs a kernel of births and deaths"),
        (plan(objective="dice"), "needs a kernel that only deletes"),
        (plan(sampler="string_first_hitting"), "strings of one known length"),
        (dataclasses.replace(plan(), kernel=part("delete")), "needs a kernel of Edit Flows"),
    ],
)
def test_what_cannot_work_is_refused_by_name(made: ProcessPlan, message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        make_parts(made, REGISTRY)


# -- broken ones -------------------------------------------------------------------------------------------------------


def swapped_ends(kernel: EditFlowKernel) -> None:
    """Noise where text is, and the other way round."""
    align = kernel.align
    kernel.align = lambda noise, clean: Columns(*reversed(align(noise, clean)))


def disordered(kernel: EditFlowKernel) -> None:
    """Columns from the end."""
    align = kernel.align
    kernel.align = lambda noise, clean: Columns(*(x.flip(1) for x in align(noise, clean)))


def twice_as_fast(kernel: EditFlowKernel) -> None:
    weights = kernel.weights
    kernel.weights = lambda sigma: 2 * weights(sigma)


def forward_rate(kernel: EditFlowKernel) -> None:
    """kappa' / kappa, the rate at which columns become noise."""
    kernel.weights = lambda sigma: torch.ones_like(sigma)[:, None].expand(-1, 3)


def less_noise(kernel: EditFlowKernel) -> None:
    sample = kernel.sample
    kernel.sample = lambda batch, sigma, **how: sample(batch, sigma / 2, **how)


def one_token(kernel: EditFlowKernel) -> None:
    """Pure noise is one token."""
    kernel.prior = lambda rows, **how: Strings(
        torch.tensor([[kernel.start, 0]] * rows), torch.ones(rows, 2, dtype=torch.bool)
    )


def half_a_step(kernel: EditFlowKernel) -> None:
    leap = kernel.leap
    kernel.leap = lambda sigma, sigma_next: leap(sigma, (sigma + sigma_next) / 2)


BROKEN: list[tuple[Callable[[EditFlowKernel], None], str]] = [
    (swapped_ends, "edits.columns"),
    (swapped_ends, "edits.ends"),
    (disordered, "edits.columns"),
    (twice_as_fast, "edits.transport"),
    (twice_as_fast, "objective.bound"),
    (forward_rate, "edits.transport"),
    (less_noise, "edits.sample"),
    (one_token, "edits.prior"),
    (half_a_step, "sampler.law"),
]


def failing(kernel: EditFlow, *, columns: bool = False) -> set[str]:
    """The checks that do not hold: all, or those of columns alone."""
    made = make_parts(plan(), REGISTRY, states=3)._replace(kernel=kernel)
    toy = ColumnToy(kernel)
    checks = check_columns(toy, end=7.0)
    if not columns:
        checks = [*checks, *toy.check_objective(made.objective, made.schedule), *check_string_sampler(toy, made)]
    return {c.name for c in checks if c.holds is False}


def small() -> EditFlow:
    return EditFlow(EditFlow.Config(frequencies=(0.6, 0.4), mean_length=1.0, longest=2), Context({"n": 3}))


@pytest.mark.parametrize(("wrong", "check"), BROKEN, ids=[f"{w.__name__}-{c}" for w, c in BROKEN])
def test_a_broken_kernel_is_caught_by_name(wrong: Callable[[EditFlowKernel], None], check: str) -> None:
    kernel = small()
    wrong(kernel)
    assert check in failing(kernel, columns=check.startswith("edits."))


def gap_before(left: Remaining) -> Remaining:
    """Insertions one place too early."""
    return left._replace(place=torch.where(left.insert, (left.place - 1).clamp(min=0), left.place))


def kinds_swapped(left: Remaining) -> Remaining:
    """Deletions taken for insertions of a token, insertions for deletions."""
    return left._replace(insert=left.delete, delete=left.insert)


def old_token(left: Remaining) -> Remaining:
    """Substitutions by another token than the text's."""
    return left._replace(token=torch.where(left.substitute, 1 - left.token, left.token))


@pytest.mark.parametrize("wrong", [gap_before, kinds_swapped, old_token])
def test_wrong_edits_are_caught(wrong: Callable[[Remaining], Remaining], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **how: Any) -> tuple[Strings, Remaining]:
        strings, left = partway(*arguments, **how)
        return strings, wrong(left)

    for module in (edit_flow, proof):
        monkeypatch.setattr(module, "partway", broken)
    assert "edits.transport" in failing(small(), columns=True)


class Uncounted(EditFlowLoss, kind="string_objective"):
    """Without the edits left to do themselves: the constant that makes a bound of it."""

    class Config(EditFlowLoss.Config):
        pass

    def loss(self, outputs: Any, draw: ColumnDraw, kernel: EditFlowKernel) -> Tensor:
        number = torch.stack([x.sum(-1) for x in draw.left[2:]], -1)
        return super().loss(outputs, draw, kernel) + (draw.weights * number).sum(-1)


class OneKind(EditFlowLoss, kind="string_objective"):
    """Deletions are forgotten."""

    class Config(EditFlowLoss.Config):
        pass

    def loss(self, outputs: Any, draw: ColumnDraw, kernel: EditFlowKernel) -> Tensor:
        only = draw.weights * torch.tensor([1.0, 0.0, 1.0])
        return super().loss(outputs, dataclasses.replace(draw, weights=only), kernel)


@pytest.mark.parametrize("wrong", [Uncounted, OneKind])
def test_a_loss_that_leaves_something_out_is_caught(wrong: type[EditFlowLoss]) -> None:
    made = make_parts(plan(longest=2), REGISTRY, states=3)
    assert isinstance(made.kernel, EditFlowKernel)
    toy = ColumnToy(made.kernel)
    assert _bound(toy, made.objective, made.schedule).holds
    assert not _bound(toy, wrong(wrong.Config(), Context({"n": 3})), made.schedule).holds
