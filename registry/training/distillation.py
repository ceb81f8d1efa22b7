"""Distillation objectives: coupled-pair consistency."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.distillation import (
    T_MIN,
    Direction,
    Distillable,
    Distillation,
    DistillationConfig,
    Networks,
    Pair,
)

__all__ = ["Consistency"]


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Draws of a step of :class:`Consistency`.

    Attributes:
        pair: Noisy rows x_s and x_t.
        uniform: Uniform numbers by which the student draws x_s, float64 [b, l]; None where the data do.
    """

    pair: Pair
    uniform: Tensor | None


class Consistency(Distillation, kind="distillation"):
    """Coupled-pair consistency: the student's prediction at x_t against the teacher's at x_s, s < t.

    With the pairs of the data and the forward divergence, the loss is least at the mean of the teacher's prediction over
    x_s given x_t. For a perfect teacher that is the true posterior, since x_0, x_s and x_t are a Markov chain: this is the
    discrete consistency distillation of Duo (arXiv 2506.10892) for any process. The reverse divergence seeks modes, as
    does SDTT (arXiv 2410.21035); it is least at the normalised geometric mean of the teacher's predictions, a heuristic.
    """

    class Config(DistillationConfig):
        divergence: Direction = "forward"
        """``forward``, KL(teacher || student): unbiased. ``reverse``, KL(student || teacher): a heuristic that seeks modes."""
        pairs: Literal["data", "student"] = "data"
        """Who draws x_s given x_t: ``data``, by the process given the clean row; ``student``, by a step of its sampler."""

    config: Config

    def lacks(self, process: Distillable) -> str | None:
        return process.lacks(self.config.divergence)

    def draw(self, process: Distillable, batch: Any, gap: float, random: Randomness) -> Coupled:
        t = T_MIN + (1 - T_MIN) * process.times(batch, random)
        s = (t - gap).clamp(min=T_MIN / 2)
        pair = process.pair(batch, s, t, random)
        own = self.config.pairs == "student"
        return Coupled(pair, random.rand48(len(batch), batch.width).to(t.device) if own else None)

    def loss(self, process: Distillable, networks: Networks, draw: Coupled, batch: Any) -> Tensor:
        pair = draw.pair
        student = networks.student(pair.upper)
        with torch.no_grad():
            if draw.uniform is not None:
                found = {name: value.detach() for name, value in student.items()}
                pair = process.stepped(found, pair, batch, draw.uniform)
            teacher = networks.teacher(pair.lower)
        return process.divergence(student, teacher, pair, batch, self.config.divergence)
