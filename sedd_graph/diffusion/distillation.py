"""The interface of distillation objectives, and what a process gives them: coupled draws and divergences of predictions.

A student is trained against a teacher so that it needs few sampler steps. Noise levels s < t are drawn for each row, and noisy
rows x_s and x_t **jointly** given the clean row x_0, by the process itself: x_0 -> x_s -> x_t is a Markov chain. The student
predicts the clean row at x_t, the teacher at x_s.

Axes: b batch, k noise levels of a row (blocks).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from sedd_graph.component.declared import Plain
from sedd_graph.diffusion.batch import Randomness

__all__ = [
    "LEAST",
    "T_MIN",
    "UNLIKELY",
    "Direction",
    "Distillable",
    "Distillation",
    "Evaluate",
    "Networks",
    "Optimum",
    "Outputs",
    "Pair",
    "Redraws",
]

LEAST = 1e-20
"""Smallest probability or expected number in a divergence."""
UNLIKELY = 1e-6
"""Smallest prediction of a teacher in the reverse divergence, and of teacher and follower in :meth:`Redraws.excess`, so that one
noisy row excludes a token by 13.8 nats at most."""
T_MIN = 1e-4
"""Smallest time of a student; the teacher's is half of it at least."""
Direction = Literal["forward", "reverse"]
"""Divergence of the student's prediction q from the teacher's p: ``forward`` is KL(p || q), ``reverse`` KL(q || p)."""
Optimum = Literal["posterior", "data"]
"""Where a distillation objective is least with a perfect teacher."""
Outputs = Any
"""Outputs of a network: what :meth:`Distillable.run` returned, or tensors [b, l, ...] by name. Objectives pass them on."""
Evaluate = Callable[[Any, Any], Outputs]
"""Evaluation of a network on a draw and its clean rows."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Noisy rows x_s and x_t of the same clean rows, drawn jointly.

    Attributes:
        lower: The draw at time s, as the process's network takes it.
        upper: The draw at time t.
        link: How x_t came from x_s, in the form that the process needs, such as which tokens were kept; None if it needs
            nothing.
    """

    lower: Any
    upper: Any
    link: Any = None


class Distillable(ABC):
    """What a process gives to distillation objectives. Implemented once for each family of processes."""

    @abstractmethod
    def times(self, batch: Any, random: Randomness) -> Tensor:
        """Draw one number in [0, 1) for each noise level of the rows, on an even grid with a random offset.

        Args:
            batch: Clean rows.
            random: Source of random numbers.

        Returns:
            float32 [b], or [b, k] where a row has k noise levels.
        """

    @abstractmethod
    def pair(self, batch: Any, s: Tensor, t: Tensor, random: Randomness) -> Pair:
        """Draw x_s and x_t jointly given x_0.

        Args:
            batch: Clean rows.
            s: Times of the teacher, [b] or [b, k].
            t: Times of the student, of the same shape, each above its ``s``.
            random: Source of random numbers.
        """

    @abstractmethod
    def run(self, model: Any, draw: Any, batch: Any, key: Tensor | None) -> tuple[Outputs, dict[str, Tensor]]:
        """Evaluate a network on a draw.

        Args:
            model: Module of the network.
            draw: A draw of :class:`Pair`.
            batch: The clean rows.
            key: Dropout key of each row, int32 [b]; None turns dropout off.

        Returns:
            The outputs, in the form that the other methods take, and the saved activations by dotted path.
        """

    @abstractmethod
    def divergence(self, student: Outputs, teacher: Outputs, pair: Pair, batch: Any, direction: Direction) -> Tensor:
        """Return the divergence of the student's prediction at x_t from the teacher's at x_s, summed over each row.

        Each position, or edit, is weighted by 1 / (probability that noise has changed a token at x_t), so that no noise
        level is favoured. The reverse divergence leaves out what noise has changed between s and t: there the teacher sees at
        x_s what the student must predict, and the geometric mean of many such certainties is nearly flat.

        Args:
            student: The student's outputs at ``pair.upper``.
            teacher: The teacher's outputs at ``pair.lower``, without gradient.
            pair: The coupled draws.
            batch: The clean rows.
            direction: Which divergence.

        Returns:
            Nats, float32 [b].
        """

    def lacks(self) -> str | None:
        """Return what keeps the process from distillation, as the phrase of what it needs; None if nothing does."""
        return None

    def redraws(self) -> Redraws | None:
        """Return what draws rows from predictions, if the family can do that; None, the default, if it cannot."""
        return None


class Redraws(ABC):
    """Rows drawn from a network's predictions, and the process's own bound of each position, for objectives that need them."""

    @abstractmethod
    def stepped(self, outputs: Outputs, pair: Pair, batch: Any, uniform: Tensor) -> Pair:
        """Return the pair with x_s drawn from a network's prediction at x_t, in place of the data's.

        Args:
            outputs: Outputs at ``pair.upper``, without gradient.
            pair: The coupled draws.
            batch: The clean rows.
            uniform: Uniform numbers, float64 [b, l].
        """

    @abstractmethod
    def reconstructed(self, outputs: Outputs, draw: Any, batch: Any, uniform: Tensor) -> tuple[Any, Tensor]:
        """Draw clean rows from a network's prediction at a noisy row, each position by itself.

        Args:
            outputs: Outputs at ``draw``.
            draw: Noisy rows.
            batch: Their clean rows, of which prompts are kept.
            uniform: Uniform numbers, float64 [b, l].

        Returns:
            The batch of the drawn rows, and the log-probability of each drawn token with its gradient, float32 [b, l];
            0 where no token was drawn.
        """

    @abstractmethod
    def noised(self, batch: Any, random: Randomness) -> Any:
        """Return the draw of the process's own training objective for clean rows."""

    @abstractmethod
    def nats(self, outputs: Outputs, draw: Any, batch: Any) -> Tensor:
        """Return the terms of the process's own training objective, a bound on -log p, float32 [b, l].

        Args:
            outputs: Outputs at ``draw``.
            draw: What :meth:`noised` returned.
            batch: The clean rows.
        """

    @abstractmethod
    def excess(
        self, student: Outputs, draw: Any, teacher: Outputs, follower: Outputs, noisy: Any, batch: Any
    ) -> Tensor:
        """Return how much less likely the teacher finds the student's tokens than the follower does, given a noisy row.

        It is the mean of log f(x_0) - log f*(x_0), for the predictions f of the follower and f* of the teacher at the noisy row,
        over the student's prediction of x_0 given x_t and the noisy token at its position; summed over the row, and weighted by
        1 / (probability that noise has changed a token at the noisy row).

        Args:
            student: The student's outputs at ``draw``.
            draw: Noisy rows x_t of the data.
            teacher: The teacher's outputs at ``noisy``, taken without gradient.
            follower: The follower's, likewise.
            noisy: What :meth:`noised` returned for rows that the student drew at ``draw``.
            batch: These rows.

        Returns:
            Nats, float32 [b].
        """


class Networks(NamedTuple):
    """Evaluation of the networks that take part in distillation: from a draw and its clean rows to outputs.

    Attributes:
        student: The trained network, with dropout.
        teacher: The frozen network, without gradient.
        follower: The network that is trained on the student's samples; None unless :attr:`Distillation.follows`.
    """

    student: Evaluate
    teacher: Evaluate
    follower: Evaluate | None = None


class Distillation(Plain, ABC):
    """Base class of distillation objectives, components of kind ``distillation``, the blueprint's section ``distill``."""

    abstract: ClassVar[bool] = True
    follows: ClassVar[bool] = False
    """True if a second network, the follower, is trained beside the student, on its samples. Such an objective is verified to
    lower the KL divergence of the student's rows from the data, whether it claims an optimum or not."""

    @property
    def rounds(self) -> int:
        """Number of rounds of equal length, 1 by default. The teacher of the first round is the given run; that of each
        other is the student at the end of the round before, averaged as ``train.ema`` declares."""
        return 1

    @property
    def least_at(self) -> Optimum | None:
        """Where the loss is least with a perfect teacher: at the true ``posterior`` of the clean row, or where the student's
        rows have the distribution of the ``data``. It is verified on an enumerated data set. None, the default: not claimed."""
        return None

    def heuristic(self) -> str | None:
        """Return why the student is not the distribution of the data even if all is learned perfectly, as a clause; None if
        nothing but its sampler's steps stands between."""
        return None

    def at(self, process: Distillable, batch: Any, s: Tensor, t: Tensor, random: Randomness) -> Any:
        """Return the draw of a step at given times, as :meth:`draw` does at random ones; for verification.

        Args:
            process: The process.
            batch: Clean rows.
            s: Times of the teacher, [b] or [b, k].
            t: Times of the student.
            random: Source of random numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} claims an optimum, or has a follower, and must define 'at'")

    def describe_round(self, number: int) -> str:
        """Return what changes in a round, counted from 0, for the user."""
        return ""

    @abstractmethod
    def lacks(self, process: Distillable) -> str | None:
        """Return what the objective lacks in a process, as a phrase; None if it can distil it."""

    @abstractmethod
    def draw(self, process: Distillable, batch: Any, number: int, random: Randomness) -> Any:
        """Draw everything random that a step needs.

        Args:
            process: The process.
            batch: Clean rows.
            number: Number of the round, from 0.
            random: Source of random numbers.
        """

    @abstractmethod
    def loss(self, process: Distillable, networks: Networks, draw: Any, batch: Any) -> Tensor:
        """Return the loss of each row, in nats of divergence, float32 [b]. Its random numbers are those of ``draw``.

        Args:
            process: The process.
            networks: The student and the teacher.
            draw: What :meth:`draw` returned.
            batch: Clean rows.
        """
