"""Verification of distillation: coupled draws, and the optimum of an objective with a perfect teacher.

The reference is an enumerated data set with a perfect network, as in the other proofs. A perfect teacher's loss must be least at
a perfect student for an objective that claims it (:attr:`Distillation.least_at`): at every input of the student, the mean
gradient over clean rows, x_s and noise is 0. The draws are those of the process, so a coupling that is no Markov chain, or
exchanged times, is seen there too; the coupling is also compared with the kernel's transition matrices by itself.

Axes: b rows, l positions, n states, u distinct inputs of the student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Distillable, Distillation, Evaluate, Networks, Outputs, Pair
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.statistics import bernstein

__all__ = ["DistillationCase", "Students", "compared", "prove_distillation"]

ROWS = 40_000
"""Number of clean rows that are drawn for the mean gradient."""
FEW_ROWS = 64
"""Number of clean rows of a loss that is only run."""
LEVELS = ((0.15, 0.4), (0.5, 1.0), (0.9, 2.0))
"""Total noise at the times s and t at which loss and draws are verified."""
LEAST_ROWS = 200
"""Number of rows of an input of the student for its mean gradient to be judged."""
DEVIATIONS = 6.0
"""Largest deviation of a mean from its expectation, in standard errors: chance exceeds it once in 5e8."""
SHIFT = 0.5
"""Standard deviation of the random changes of outputs that must make the loss larger."""
BOUND_ROWS = 100_000
"""Number of rows by which the difference of two bounds is estimated."""
GRADIENT_ROWS = 200_000
"""Number of rows by which a mean gradient of a known expectation is estimated."""
DIRECTIONS = 7
"""Number of random directions along which it is compared."""
SLACK = 0.08
"""Share of a divergence, or of its gradient, that may be missing: training objectives leave out the noise of times below their
``t_min``, by which a kernel with high rates has changed a few tokens already."""


class Students(Protocol):
    """Students, enumerated: networks that reconstruct clean rows at the noisy rows of the data at one time.

    Attributes:
        perfect: Outputs of the perfect student at each noisy row, in the order of :attr:`DistillationCase.code`.
    """

    perfect: Outputs

    def divergence(self, outputs: Outputs) -> tuple[Tensor, Evaluate]:
        """Return KL(p || p*) of a student, p being the distribution of its rows and p* that of the data, and the network
        that is perfect for p.

        Args:
            outputs: Outputs of the student at each noisy row, through which the divergence is differentiated.
        """


@dataclasses.dataclass(frozen=True)
class DistillationCase:
    """An enumerated data set, with the perfect networks for it.

    Attributes:
        process: The process on its rows.
        draw: Draws a number of clean rows.
        perfect: Outputs of the perfect network for a draw and its clean rows.
        code: Numbers of the student's inputs at the rows of a draw and its clean rows, int64 [b, k], one for each of k equal
            parts of the positions.
        pairs: Compares the drawn pairs with the kernel: what is wrong, or "" and the size of the comparison.
        other: For objectives with a follower: another distribution of clean rows, as its draws, its perfect network and its
            KL divergence from that of the data, nats; None where there is none.
        students: For objectives whose optimum is the distribution of the data: all students at a time; None where they are
            not enumerated.
        time: Time at which total noise, float64 [q], is reached.
    """

    process: Distillable
    time: Callable[[Tensor], Tensor]
    draw: Callable[[int, torch.Generator], Batch]
    perfect: Callable[[Any, Batch], Outputs]
    code: Callable[[Any, Batch], Tensor]
    pairs: Callable[[Batch, Pair], Check]
    other: tuple[Callable[[int, torch.Generator], Batch], Callable[[Any, Batch], Outputs], float] | None = None
    students: Callable[[float], Students] | None = None


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
        elif objective.least_at == "data" or objective.follows:
            checks.append(_gradient(case, objective))
        if objective.follows:
            checks += [_data(case), _follower(case, objective)]
        if (why := objective.heuristic()) is not None:
            checks.append(Check("distill.heuristic", "the student is a heuristic, and so named", None, why, "declared"))
        return checks

    return guarded("distill", run)


def _pairs(case: DistillationCase) -> Check:
    """Compare drawn pairs with the kernel at all times; the worst check is returned."""
    found = []
    for number, (s, t) in enumerate(_times_of(case)):
        generator = torch.Generator().manual_seed(31 + number)
        batch = case.draw(ROWS, generator)
        found.append(case.pairs(batch, _pair(case, batch, s, t, generator)))
    return next((check for check in found if not check.holds), found[0])


def _pair(case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator) -> Pair:
    return case.process.pair(batch, *_times(case, batch, s, t, generator), Randomness(generator))


def _times_of(case: DistillationCase) -> list[tuple[float, float]]:
    """Return the times s and t of each pair of :data:`LEVELS`."""
    found: list[list[float]] = case.time(torch.tensor(LEVELS, dtype=torch.float64).flatten()).view(-1, 2).tolist()
    return [(s, t) for s, t in found]


def _middle(case: DistillationCase) -> tuple[float, float]:
    times = _times_of(case)
    return times[len(times) // 2]


def _times(
    case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    like = case.process.times(batch, Randomness(generator))
    return torch.full_like(like, s), torch.full_like(like, t)


def compared(counts: Tensor, chance: Tensor, how: str) -> Check:
    """Compare the numbers of triples x_0, x_s, x_t that were drawn with their probabilities.

    Args:
        counts: Number of each triple, float64 [x_0, x_s, x_t].
        chance: Probability of x_s and x_t given x_0, of the same shape.
        how: How many were drawn.
    """
    expected = counts.sum((1, 2), keepdim=True) * chance.clamp(min=0)
    off = (counts - expected).abs() / (expected * (1 - chance.clamp(0, 1))).clamp(min=1e-6).sqrt()
    # few triples of small probability are drawn: their number is no normal variable
    worst = float(torch.where(expected > 5, off, torch.where(counts > expected + 25, 99.0, 0.0)).max())
    impossible = int(counts[chance <= 1e-12].sum())
    claim = "x_0, x_s and x_t are drawn as a Markov chain of the kernel"
    value = f"at most {worst:.1f} standard errors; {impossible} impossible triples"
    return Check("distill.pairs", claim, worst < DEVIATIONS and impossible == 0, value, how)


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
    for number, (s, t) in enumerate(_times_of(case)):
        generator = torch.Generator().manual_seed(57 + number)
        batch = case.draw(ROWS, generator)
        draw = objective.at(case.process, batch, *_times(case, batch, s, t, generator), Randomness(generator))
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
    how = f"{len(LEVELS)} pairs of times, {ROWS:,} rows each"
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
        other = {k: v.detach() + sign * SHIFT * _change(v, code, generator) for k, v in own.items()}
        networks = Networks(functools.partial(_same, other), case.perfect)
        rises.append(float((objective.loss(case.process, networks, draw, batch) - loss).mean()))
    return min(rises)


def _same(outputs: Outputs, at: object, rows: Batch) -> Outputs:
    return outputs


def _change(output: Tensor, code: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random change of an output [b, l, ...], equal for equal inputs of each part of the positions."""
    found = []
    for own, part in zip(code.T, output.tensor_split(code.shape[1], 1), strict=True):
        codes, row = torch.unique(own, return_inverse=True)
        found.append(torch.randn(len(codes), *part.shape[1:], generator=generator)[row])
    return torch.cat(found, 1)


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


def _gradient(case: DistillationCase, objective: Distillation) -> Check:
    """Verify that the mean gradient of an imperfect student is that of KL(p || p*), by enumeration and autograd.

    The gradients are compared along that of the divergence, and along random directions. That of an objective which does not
    claim the distribution of the data need only lead down.
    """
    name, claim = "distill.gradient", "the mean gradient of the student is that of KL(p || data), p being its rows"
    if objective.least_at != "data":
        name, claim = "distill.direction", "the mean gradient of the student lowers KL(p || data), p being its rows"
    s, t = _middle(case)
    if (found := _imperfect(case, t)) is None:
        return Check(name, claim, None, "not enumerated for this process", "")
    table, students = found
    with torch.enable_grad():
        leaves = {k: v.clone().requires_grad_() for k, v in table.items()}
        divergence, follower = students.divergence(leaves)
        exact = dict(zip(leaves, torch.autograd.grad(divergence, [*leaves.values()]), strict=True))
    generator = torch.Generator().manual_seed(73)
    batch, asked = case.draw(GRADIENT_ROWS, generator), dict[str, Tensor]()
    draw = objective.at(case.process, batch, *_times(case, batch, s, t, generator), Randomness(generator))
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
    s, t = _middle(case)
    if (found := _imperfect(case, t)) is None:
        return Check(name, claim, None, "not enumerated for this process", "")
    table, students = found
    _, perfect = students.divergence(table)
    generator = torch.Generator().manual_seed(79)
    batch, leaf, moved = case.draw(ROWS, generator), dict[str, Tensor](), dict[str, Tensor]()
    draw = objective.at(case.process, batch, *_times(case, batch, s, t, generator), Randomness(generator))

    def wrong(at: object, rows: Batch) -> Outputs:
        exact, code = perfect(at, rows), case.code(at, rows)
        for k, v in exact.items():
            moved[k] = SHIFT * _change(v, code, torch.Generator().manual_seed(83))
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
