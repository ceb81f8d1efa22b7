"""Verification of distillation: coupled draws, and the optimum of an objective with a perfect teacher.

The reference is an enumerated data set with a perfect network, as in the other proofs. A perfect teacher's loss must be least at
a perfect student for an objective that claims it (:attr:`Distillation.least_at`): at every input of the student, the mean
gradient over clean rows, x_s and noise is 0. The draws are those of the process, so a coupling that is no Markov chain, or
exchanged times, is seen there too; the coupling is also compared with the kernel's transition matrices by itself.

Axes: b rows, l positions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Distillation, Evaluate, Networks, Outputs, Pair
from sedd_graph.verify.distillation_case import DEVIATIONS, SHIFT, DistillationCase, changed, times, times_of
from sedd_graph.verify.distillation_follower import prove_follower, prove_gradient
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.statistics import bernstein

__all__ = ["prove_distillation"]

ROWS = 40_000
"""Number of clean rows that are drawn for the mean gradient."""
FEW_ROWS = 64
"""Number of clean rows of a loss that is only run."""
LEAST_ROWS = 200
"""Number of rows of an input of the student for its mean gradient to be judged."""


def prove_distillation(case: DistillationCase, objective: Distillation) -> list[Check]:
    """Verify the coupled draws of a process, and the optimum of a distillation objective on them.

    Args:
        case: The enumerated data set.
        objective: The objective.
    """

    def run() -> list[Check]:
        if (lack := objective.lacks(case.process)) is not None:
            return [Check("distill.fits", "the process can be distilled by the objective", False, f"needs {lack}", "")]
        checks = [_pairs(case), *_runs(case, objective)]
        if objective.least_at == "posterior":
            checks.append(_optimum(case, objective))
        if objective.least_at == "data" or objective.follows:
            checks.append(prove_gradient(case, objective))
        if objective.follows:
            checks += prove_follower(case, objective)
        if (why := objective.heuristic()) is not None:
            checks.append(Check("distill.heuristic", "the student is a heuristic, and so named", None, why, "declared"))
        return checks

    return guarded("distill", run)


def _pairs(case: DistillationCase) -> Check:
    """Compare drawn pairs with the kernel at all times; the worst check is returned."""
    found = []
    for number, (s, t) in enumerate(times_of(case)):
        generator = torch.Generator().manual_seed(31 + number)
        batch = case.draw(ROWS, generator)
        found.append(case.pairs(batch, _pair(case, batch, s, t, generator)))
    return next((check for check in found if not check.holds), found[0])


def _pair(case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator) -> Pair:
    return case.process.pair(batch, *times(case, batch, s, t, generator), Randomness(generator))


def _perfect(case: DistillationCase, found: dict[str, Tensor], *, shift: float = 0.0) -> Evaluate:
    """Return a perfect network whose outputs, which require gradients, are added to ``found``; or one that is changed."""

    def network(at: object, rows: Batch) -> Outputs:
        outputs = {name: value.clamp(min=-60) for name, value in case.perfect(at, rows).items()}
        for name, value in outputs.items():
            generator = torch.Generator().manual_seed(5)
            found[name] = (value + shift * torch.randn(value.shape, generator=generator)).requires_grad_()
        return dict(found)

    return network


def _runs(case: DistillationCase, objective: Distillation) -> list[Check]:
    """Verify that the loss is finite, depends on the draw alone, and has a gradient in the student and none in the teacher."""
    generator = torch.Generator().manual_seed(17)
    batch = case.draw(FEW_ROWS, generator)
    draw = objective.draw(case.process, batch, objective.rounds - 1, Randomness(generator))
    student, teacher, follower = (dict[str, Tensor]() for _ in range(3))
    networks = Networks(
        _perfect(case, student, shift=SHIFT),
        _perfect(case, teacher),
        _perfect(case, follower, shift=SHIFT) if objective.follows else None,
    )
    with torch.enable_grad():
        loss = objective.loss(case.process, networks, draw, batch)
        moved, leaks = (
            sum(
                g is not None and bool(g.any())
                for g in torch.autograd.grad(loss.sum(), [*of.values()], allow_unused=True, retain_graph=True)
            )
            for of in (student, teacher)
        )
    again = objective.loss(case.process, networks, draw, batch)
    sound = loss.shape == (len(batch),) and bool(loss.isfinite().all())
    same = sound and torch.equal(loss.detach(), again.detach())
    how = f"{FEW_ROWS:,} rows, an imperfect student"
    claim = "losses are finite, one for each row, and a function of the draw, with a gradient in the student"
    value = f"{'finite' if sound else 'not finite'}, {'the same' if same else 'another'} when evaluated again, {moved} outputs moved"
    return [
        Check("distill.loss", claim, same and moved > 0, value, how),
        Check("distill.teacher", "the teacher has no gradient", leaks == 0, f"{leaks} of its outputs have one", how),
    ]


def _optimum(case: DistillationCase, objective: Distillation) -> Check:
    """Verify that the mean gradient is 0 at a perfect student, and that changes of its outputs raise the loss."""
    worst, least, judged = 0.0, float("inf"), 0
    for number, (s, t) in enumerate(times_of(case)):
        generator = torch.Generator().manual_seed(57 + number)
        batch = case.draw(ROWS, generator)
        draw = objective.at(case.process, batch, *times(case, batch, s, t, generator), Randomness(generator))
        own, asked = dict[str, Tensor](), list[object]()
        perfect = _perfect(case, own)

        def student(at: object, rows: Batch, asked: list[object] = asked, perfect: Evaluate = perfect) -> Outputs:
            asked.append(at)
            return perfect(at, rows)

        with torch.enable_grad():
            loss = objective.loss(case.process, Networks(student, case.perfect), draw, batch)
            given = torch.autograd.grad(loss.sum(), [*own.values()], allow_unused=True)
        code = case.code(asked[0], batch)
        deviation, count = _deviation(given, code)
        worst, judged = max(worst, deviation), judged + count
        least = min(least, _rise(case, objective, draw, batch, own, code, loss.detach(), generator))
    claim = "with a perfect teacher the loss is least at the true posterior: mean gradients are 0"
    value = (
        f"at most {worst:.1f} standard errors over {judged:,} inputs; other outputs raise the loss by {least:.2g} nats"
    )
    how = f"{len(times_of(case))} pairs of times, {ROWS:,} rows each"
    return Check("distill.optimum", claim, worst < DEVIATIONS and judged > 0 and least > 0, value, how)


def _deviation(gradients: tuple[Tensor | None, ...], code: Tensor) -> tuple[float, int]:
    """Return the largest mean gradient of an input of the student in standard errors, and how many inputs were judged.

    Args:
        gradients: Gradients in the student's outputs, [b, l, ...].
        code: Numbers of the student's inputs, int64 [b, k], for each of k equal parts of the positions.
    """
    worst, judged = 0.0, 0
    for gradient in gradients:
        if gradient is None:
            continue
        for own, flat in zip(code.T, gradient.double().tensor_split(code.shape[1], 1), strict=True):
            _, row, rows = torch.unique(own, return_inverse=True, return_counts=True)
            flat = flat.flatten(1)
            zero = torch.zeros(len(rows), flat.shape[1], dtype=torch.float64)
            total, square = zero.index_add(0, row, flat), zero.index_add(0, row, flat**2)
            # large gradients may be too rare to be drawn: they are taken to be as large as the largest of their input
            largest = zero[:, 0].scatter_reduce(0, row, flat.abs().amax(1), "amax")[:, None]
            found = bernstein(total, square, largest.expand_as(total))[(rows >= LEAST_ROWS) & (largest[:, 0] > 1e-9)]
            worst, judged = max(worst, float(found.max()) if found.numel() else 0.0), judged + len(found)
    return worst, judged


def _rise(
    case: DistillationCase,
    objective: Distillation,
    draw: object,
    batch: Batch,
    own: Outputs,
    code: Tensor,
    loss: Tensor,
    generator: torch.Generator,
) -> float:
    """Return by how much random changes of the student's outputs, equal for equal inputs, raise the mean loss at least."""
    rises = []
    for sign in (-1.0, 1.0):
        other = {k: v.detach() + sign * SHIFT * changed(v, code, generator) for k, v in own.items()}
        networks = Networks(functools.partial(_same, other), case.perfect)
        rises.append(float((objective.loss(case.process, networks, draw, batch) - loss).mean()))
    return min(rises)


def _same(outputs: Outputs, at: object, rows: Batch) -> Outputs:
    return outputs
