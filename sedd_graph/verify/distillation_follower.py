"""Verification of distillation towards the distribution of the data: the student's gradient, the bounds, and the follower.

The follower is a network that is trained on the student's rows (:attr:`Distillation.follows`). All students of an enumerated data
set have a known distribution of rows, so that the gradient of its divergence from the data is known by autograd.

Axes: b rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Distillation, Evaluate, Networks, Outputs
from sedd_graph.verify.distillation_case import DEVIATIONS, SHIFT, DistillationCase, Students, changed, middle, times

__all__ = ["prove_follower", "prove_gradient"]

ROWS = 40_000
"""Number of clean rows by which the gradient of a wrong follower is estimated."""
BOUND_ROWS = 100_000
"""Number of rows by which the difference of two bounds is estimated."""
GRADIENT_ROWS = 200_000
"""Number of rows by which a mean gradient of a known expectation is estimated."""
DIRECTIONS = 7
"""Number of random directions along which it is compared."""
SLACK = 0.08
"""Share of a divergence, or of its gradient, that may be missing: training objectives leave out the noise of times below their
``t_min``, by which a kernel with high rates has changed a few tokens already."""


def prove_follower(case: DistillationCase, objective: Distillation) -> list[Check]:
    """Verify the difference of the process's bounds, and the gradient of the follower.

    Args:
        case: The enumerated data set.
        objective: An objective with a follower.
    """
    return [_data(case), _follower(case, objective)]


def _data(case: DistillationCase) -> Check:
    """Verify that L(f*, p) - min_f L(f, p) is KL(p || p*), L being the process's own bound: 0 at the data's distribution alone."""
    name, claim = (
        "distill.data",
        "L(f*, p) - min L(f, p) is the KL divergence of p from the data's distribution, 0 at it alone",
    )
    redraws = case.process.redraws()
    if case.other is None or redraws is None:
        return Check(name, claim, None, "not enumerated for this process", "")
    drawn, own, divergence = case.other
    generator = torch.Generator().manual_seed(91)
    rows = drawn(BOUND_ROWS, generator)
    noisy = redraws.noised(rows, Randomness(generator))
    gap = (
        (redraws.nats(case.perfect(noisy, rows), noisy, rows) - redraws.nats(own(noisy, rows), noisy, rows))
        .double()
        .sum(1)
    )
    mean, error = float(gap.mean()), float(gap.std()) / BOUND_ROWS**0.5
    holds = abs(mean - divergence) < DEVIATIONS * error + SLACK * divergence and mean > DEVIATIONS * error
    value = f"{mean:.4f} +- {error:.4f} against {divergence:.4f} nats"
    return Check(name, claim, holds, value, f"{BOUND_ROWS:,} rows of another distribution")


def _imperfect(case: DistillationCase, t: float) -> tuple[dict[str, Tensor], Students] | None:
    """Return the outputs of an imperfect student at each noisy row, and all students; None where they are not enumerated."""
    if case.students is None:
        return None
    students, generator = case.students(t), torch.Generator().manual_seed(37)
    outputs = {name: value.clamp(min=-60) for name, value in students.perfect.items()}
    return {k: v + SHIFT * torch.randn(v.shape, generator=generator) for k, v in outputs.items()}, students


def _student(case: DistillationCase, table: Outputs, asked: dict[str, Tensor]) -> Evaluate:
    """Return the network with the outputs ``table`` at each noisy row; ``code`` and outputs of a call are added to ``asked``."""

    def network(at: object, rows: Batch) -> Outputs:
        code = case.code(at, rows)[:, 0]
        own = {name: value.detach()[code].requires_grad_() for name, value in table.items()}
        asked.update(own, code=code)
        return own

    return network


def prove_gradient(case: DistillationCase, objective: Distillation) -> Check:
    """Verify that the mean gradient of an imperfect student is that of KL(p || p*), by enumeration and autograd.

    The gradients are compared along that of the divergence, and along random directions. That of an objective which does not
    claim the distribution of the data need only lead down.

    Args:
        case: The enumerated data set.
        objective: An objective that claims the distribution of the data, or has a follower.
    """
    name, claim = "distill.gradient", "the mean gradient of the student is that of KL(p || data), p being its rows"
    if objective.least_at != "data":
        name, claim = "distill.direction", "the mean gradient of the student lowers KL(p || data), p being its rows"
    s, t = middle(case)
    if (found := _imperfect(case, t)) is None:
        return Check(name, claim, None, "not enumerated for this process", "")
    table, students = found
    with torch.enable_grad():
        leaves = {k: v.clone().requires_grad_() for k, v in table.items()}
        divergence, follower = students.divergence(leaves)
        exact = dict(zip(leaves, torch.autograd.grad(divergence, [*leaves.values()]), strict=True))
    generator = torch.Generator().manual_seed(73)
    batch, asked = case.draw(GRADIENT_ROWS, generator), dict[str, Tensor]()
    draw = objective.at(case.process, batch, *times(case, batch, s, t, generator), Randomness(generator))
    with torch.enable_grad():
        networks = Networks(_student(case, table, asked), case.perfect, follower if objective.follows else None)
        loss = objective.loss(case.process, networks, draw, batch)
        given = dict(zip(exact, torch.autograd.grad(loss.sum(), [asked[k] for k in exact]), strict=True))
    code, along = asked["code"], [exact]
    along += [{k: torch.randn(v.shape, generator=generator) for k, v in exact.items()} for _ in range(DIRECTIONS)]
    each = torch.stack([sum((given[k] * d[k][code]).double().flatten(1).sum(1) for k in exact) for d in along])  # type: ignore[misc]
    expected = torch.tensor([sum(float((exact[k].double() * d[k]).sum()) for k in exact) for d in along])
    mean, error = each.mean(1), each.std(1) / len(batch) ** 0.5
    size = float(sum(value.double().square().sum() for value in exact.values()) ** 0.5)
    slack = SLACK * size * torch.tensor([size] + [1.0] * DIRECTIONS)
    off = ((mean - expected).abs() - slack).clamp(min=0) / error
    share, least = float(mean[0] / expected[0]), float(error[0] / expected[0])
    value = f"{share:.3f} +- {least:.3f} times the gradient; at most {float(off.max()):.1f} standard errors along {len(along)} directions"
    holds = share > DEVIATIONS * least
    if objective.least_at == "data":
        holds = holds and float(off.max()) < DEVIATIONS
    return Check(name, claim, holds, value, f"{len(batch):,} rows, an imperfect student, its follower perfect")


def _follower(case: DistillationCase, objective: Distillation) -> Check:
    """Verify that the gradient of a wrong follower leads towards the network that is perfect for the student's rows."""
    name, claim = "distill.follower", "the follower is trained towards the perfect network for the student's rows"
    s, t = middle(case)
    if (found := _imperfect(case, t)) is None:
        return Check(name, claim, None, "not enumerated for this process", "")
    table, students = found
    _, perfect = students.divergence(table)
    generator = torch.Generator().manual_seed(79)
    batch, leaf, moved = case.draw(ROWS, generator), dict[str, Tensor](), dict[str, Tensor]()
    draw = objective.at(case.process, batch, *times(case, batch, s, t, generator), Randomness(generator))

    def wrong(at: object, rows: Batch) -> Outputs:
        exact, code = perfect(at, rows), case.code(at, rows)
        for k, v in exact.items():
            moved[k] = SHIFT * changed(v, code, torch.Generator().manual_seed(83))
            leaf[k] = (v.clamp(min=-60) + moved[k]).requires_grad_()
        # a network may not raise the probabilities of all tokens at once
        return {k: v.log_softmax(-1) if k == "log_x0" else v for k, v in leaf.items()}

    with torch.enable_grad():
        networks = Networks(_student(case, table, {}), case.perfect, wrong)
        loss = objective.loss(case.process, networks, draw, batch)
        given = torch.autograd.grad(loss.sum(), [*leaf.values()], allow_unused=True)
    each = torch.zeros(len(batch), dtype=torch.float64)
    for gradient, change in zip(given, moved.values(), strict=True):
        if gradient is not None:
            each += (gradient * change).double().flatten(1).sum(1)
    mean, error = float(each.mean()), float(each.std()) / len(batch) ** 0.5
    value = f"{mean:.4f} +- {error:.4f} nats for each unit of the way back"
    return Check(name, claim, mean > DEVIATIONS * error > 0, value, f"{len(batch):,} rows, a follower that is wrong")
