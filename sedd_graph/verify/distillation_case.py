"""What distillation is verified on: an enumerated data set with perfect networks, the times, and comparisons of draws.

Axes: b rows, l positions, k parts of the positions, u distinct inputs of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Distillable, Evaluate, Outputs, Pair

__all__ = ["DEVIATIONS", "SHIFT", "DistillationCase", "Students", "changed", "compared", "middle", "times", "times_of"]

LEVELS = ((0.15, 0.4), (0.5, 1.0), (0.9, 2.0))
"""Total noise at the times s and t at which loss and draws are verified."""
DEVIATIONS = 6.0
"""Largest deviation of a mean from its expectation, in standard errors: chance exceeds it once in 5e8."""
SHIFT = 0.5
"""Standard deviation of the random changes of outputs that must make the loss larger."""


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


def times_of(case: DistillationCase) -> list[tuple[float, float]]:
    """Return the times s and t of each pair of :data:`LEVELS`."""
    found: list[list[float]] = case.time(torch.tensor(LEVELS, dtype=torch.float64).flatten()).view(-1, 2).tolist()
    return [(s, t) for s, t in found]


def middle(case: DistillationCase) -> tuple[float, float]:
    """Return the pair of times s and t in the middle of :data:`LEVELS`."""
    pairs = times_of(case)
    return pairs[len(pairs) // 2]


def times(
    case: DistillationCase, batch: Batch, s: float, t: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the times s and t of each noise level of the rows, in the shape of the process's own."""
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


def changed(output: Tensor, code: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random change of an output [b, l, ...], equal for equal inputs of each part of the positions."""
    found = []
    for own, part in zip(code.T, output.tensor_split(code.shape[1], 1), strict=True):
        codes, row = torch.unique(own, return_inverse=True)
        found.append(torch.randn(len(codes), *part.shape[1:], generator=generator)[row])
    return torch.cat(found, 1)
