"""Verification of distillation: coupled draws, and the optimum of an objective with a perfect teacher.

The reference is an enumerated data set with a perfect network, as in the other proofs. A perfect teacher's loss must be least at
a perfect student for an objective that claims it (:attr:`Distillation.least_at`): at every input of the student, the mean
gradient over clean rows, x_s and noise is 0. The draws are those of the process, so a coupling that is no Markov chain, or
exchanged times, is seen there too; the coupling is also compared with the kernel's transition matrices by itself.

Axes: b rows, l positions, n states, u distinct inputs of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Distillable, Distillation, Networks, Outputs, Pair
from sedd_graph.verify.guards import guarded

__all__ = ["DistillationCase", "prove_distillation"]

ROWS = 60_000
"""Number of clean rows that are drawn for the mean gradient."""
TIMES = ((0.15, 0.35), (0.4, 0.8), (0.75, 0.95))
"""Times s and t at which loss and draws are verified."""
LEAST_ROWS = 200
"""Number of rows of an input of the student for its mean gradient to be judged."""
DEVIATIONS = 6.0
"""Largest deviation of a mean from its expectation, in standard errors: chance exceeds it once in 5e8."""
SHIFT = 0.5
"""Standard deviation of the random changes of outputs that must make the loss larger."""
BOUND_ROWS = 400_000
"""Number of rows by which the difference of two bounds is estimated."""


@dataclasses.dataclass(frozen=True)
class DistillationCase:
    """An enumerated data set, with the perfect networks for it.

    Attributes:
        process: The process on its rows.
        draw: Draws a number of clean rows.
        perfect: Outputs of the perfect network for a draw and its clean rows.
        code: Number of the student's input at each row of a draw and its clean rows, int64 [b].
        pairs: Compares the drawn pairs with the kernel: what is wrong, or "" and the size of the comparison.
        bounds: For objectives whose optimum is the distribution of the data: another distribution of clean rows, as its
            draws, its perfect network and its KL divergence from that of the data, nats; None where there is none.
    """

    process: Distillable
    draw: Callable[[int, torch.Generator], Batch]
    perfect: Callable[[object, Batch], Outputs]
    code: Callable[[object, Batch], Tensor]
    pairs: Callable[[Batch, Pair, float, float], Check]
    other: tuple[Callable[[int, torch.Generator], Batch], Callable[[object, Batch], Outputs], float] | None = None


def prove_distillation(case: DistillationCase, objective: Distillation) -> list[Check]:
    """Verify the coupled draws of a process, and the optimum of a distillation objective on them.

    Args:
        case: The enumerated data set.
        objective: The objective.
    """

    def run() -> list[Check]:
        checks = [_pairs(case)]
        if objective.least_at == "posterior":
            checks += _optimum(case, objective)
        elif objective.least_at == "data":
            checks += _data(case)
        if (why := objective.heuristic()) is not None:
            checks.append(Check("distill.heuristic", "the student is a heuristic, and so named", None, why, "declared"))
        return checks

    return guarded("distill", run)


def _pairs(case: DistillationCase) -> Check:
    """Compare drawn pairs with the kernel at all times; the worst check is returned."""
    found = []
    for number, (s, t) in enumerate(TIMES):
        generator = torch.Generator().manual_seed(31 + number)
        batch = case.draw(ROWS, generator)
        found.append(case.pairs(batch, _pair(case, batch, s, t, generator), s, t))
    return next((check for check in found if not check.holds), found[0])


def _pair(case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator) -> Pair:
    return case.process.pair(batch, *_times(case, batch, s, t, generator), Randomness(generator))


def _times(
    case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    like = case.process.times(batch, Randomness(generator))
    return torch.full_like(like, s), torch.full_like(like, t)


def _optimum(case: DistillationCase, objective: Distillation) -> list[Check]:
    """Verify that the mean gradient is 0 at a perfect student, that changes of its outputs raise the loss, and that none of
    the gradient goes to the teacher."""
    worst, least, judged, leaks = 0.0, float("inf"), 0, 0
    for number, (s, t) in enumerate(TIMES):
        generator = torch.Generator().manual_seed(57 + number)
        batch = case.draw(ROWS, generator)
        draw = objective.at(case.process, batch, *_times(case, batch, s, t, generator), Randomness(generator))
        asked = list[object]()
        own = dict[str, Tensor]()
        theirs = list[Tensor]()

        def student(at: object, rows: Batch, own: dict[str, Tensor] = own, asked: list[object] = asked) -> Outputs:
            asked.append(at)
            own.update({k: v.clamp(min=-60).requires_grad_() for k, v in case.perfect(at, rows).items()})
            return own

        def teacher(at: object, rows: Batch, theirs: list[Tensor] = theirs) -> Outputs:
            found = {k: v.clamp(min=-60).requires_grad_() for k, v in case.perfect(at, rows).items()}
            theirs += found.values()
            return found

        with torch.enable_grad():
            loss = objective.loss(case.process, Networks(student, teacher), draw, batch)
            given = torch.autograd.grad(loss.sum(), [*own.values(), *theirs], allow_unused=True)
        leaks += sum(g is not None and bool(g.any()) for g in given[len(own) :])
        code = case.code(asked[0], batch)
        deviation, count = _deviation(given[: len(own)], code)
        worst, judged = max(worst, deviation), judged + count
        least = min(least, _rise(case, objective, draw, batch, own, code, loss.detach(), generator))
    how = f"{len(TIMES)} pairs of times, {ROWS:,} rows each"
    claim = "with a perfect teacher the loss is least at the true posterior: mean gradients are 0"
    value = f"at most {worst:.1f} standard errors over {judged:,} inputs and outputs; other outputs raise the loss by {least:.2g} nats"
    return [
        Check("distill.optimum", claim, worst < DEVIATIONS and judged > 0 and least > 0, value, how),
        Check("distill.teacher", "the teacher has no gradient", leaks == 0, f"{leaks} of its outputs have one", how),
    ]


def _deviation(gradients: tuple[Tensor | None, ...], code: Tensor) -> tuple[float, int]:
    """Return the largest mean gradient of an input of the student in standard errors, and how many were judged."""
    _, row, rows = torch.unique(code, return_inverse=True, return_counts=True)
    worst, judged = 0.0, 0
    for gradient in gradients:
        if gradient is None:
            continue
        flat = gradient.double().flatten(1)
        total, square = (
            torch.zeros(len(rows), flat.shape[1], dtype=torch.float64).index_add(0, row, v) for v in (flat, flat**2)
        )
        counts = rows[:, None].double()
        spread = (square / counts - (total / counts) ** 2).clamp(min=0).sqrt()
        # a gradient whose large values are too rare to be drawn seems not to vary: it is judged by the largest of its input
        floor = 0.05 * (square / counts).amax(1, keepdim=True).sqrt() + 1e-9
        found = (total / counts).abs() / ((spread + floor) / counts.sqrt())
        found = found[rows >= LEAST_ROWS]
        worst, judged = max(worst, float(found.max()) if found.numel() else 0.0), judged + int((found > 0).sum())
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
    codes, row = torch.unique(code, return_inverse=True)
    rises = []
    for sign in (-1.0, 1.0):
        other = {
            k: v.detach() + sign * SHIFT * torch.randn(len(codes), *v.shape[1:], generator=generator)[row]
            for k, v in own.items()
        }
        networks = Networks(lambda at, rows, other=other: other, case.perfect)
        rises.append(float((objective.loss(case.process, networks, draw, batch) - loss).mean()))
    return min(rises)


def _data(case: DistillationCase) -> list[Check]:
    """Verify that L(f*, p) - min_f L(f, p) is KL(p || p*), L being the process's own bound: 0 at the data's distribution alone."""
    name, claim = (
        "distill.data",
        "L(f*, p) - min L(f, p) is the KL divergence of p from the data's distribution, 0 at it alone",
    )
    redraws = case.process.redraws()
    if case.other is None or redraws is None:
        return [Check(name, claim, None, "not enumerated for this process", "")]
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
    holds = abs(mean - divergence) < DEVIATIONS * error + 0.01 * divergence and mean > DEVIATIONS * error
    value = f"{mean:.4f} +- {error:.4f} against {divergence:.4f} nats"
    return [Check(name, claim, holds, value, f"{BOUND_ROWS:,} rows of another distribution")]
