"""The interface of distillation objectives, and what a process gives them: coupled draws and divergences of predictions.

A student is trained against a teacher so that it needs few sampler steps. Noise levels s < t are drawn for each row, and noisy
rows x_s and x_t **jointly** given the clean row x_0, by the process itself: x_0 -> x_s -> x_t is a Markov chain. The student
predicts the clean row at x_t, the teacher at x_s.

Axes: b batch, k noise levels of a row (blocks).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import Tensor

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.declared import Plain
from sedd_graph.diffusion.batch import Randomness

__all__ = ["T_MIN", "Direction", "Distillable", "Distillation", "DistillationConfig", "Networks", "Pair"]

T_MIN = 1e-4
"""Smallest time of a student; the teacher's is half of it at least."""
Direction = Literal["forward", "reverse"]
"""Divergence of the student's prediction q from the teacher's p: ``forward`` is KL(p || q), ``reverse`` KL(q || p)."""
Outputs = Mapping[str, Tensor]


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
            The outputs by name, and the saved activations by dotted path.
        """

    @abstractmethod
    def divergence(self, student: Outputs, teacher: Outputs, pair: Pair, batch: Any, direction: Direction) -> Tensor:
        """Return the divergence of the student's prediction at x_t from the teacher's at x_s, summed over each row.

        Each position, or edit, is weighted by 1 / (probability that noise has changed a token at x_t), so that no noise
        level is favoured.

        Args:
            student: The student's outputs at ``pair.upper``.
            teacher: The teacher's outputs at ``pair.lower``, without gradient.
            pair: The coupled draws.
            batch: The clean rows.
            direction: Which divergence.

        Returns:
            Nats, float32 [b].
        """

    def lacks(self, direction: Direction) -> str | None:
        """Return what keeps the process from a direction, as a phrase; None if nothing does."""
        return None

    def stepped(self, outputs: Outputs, pair: Pair, batch: Any, uniform: Tensor) -> Pair:
        """Return the pair with x_s drawn from a network's prediction at x_t, in place of the data's, if the family can.

        Args:
            outputs: Outputs at ``pair.upper``, without gradient.
            pair: The coupled draws.
            batch: The clean rows.
            uniform: Uniform numbers, float64 [b, l].
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Networks:
    """Evaluation of the networks that take part in distillation: from a draw to outputs by name.

    Attributes:
        student: The trained network, with dropout.
        teacher: The frozen network, without gradient.
        fake: The network that follows the student's samples; None unless :attr:`Distillation.follows` is True.
    """

    student: Callable[[Any], Outputs]
    teacher: Callable[[Any], Outputs]
    fake: Callable[[Any], Outputs] | None = None


class DistillationConfig(ComponentConfig):
    """Config keys of every distillation objective: rounds, and the steps of each."""

    rounds: Annotated[int, pydantic.Field(ge=1, le=32)] = 4
    """Number of rounds of equal length. The teacher of the first is the given run; that of each other is the student at the
    end of the round before, averaged as ``train.ema`` declares."""
    steps: Annotated[int, pydantic.Field(ge=1, le=2**20)] = 16
    """Number of sampler steps that the student is made for. The distance t - s is 1 / ``steps`` in the last round, and half
    as large in each round before."""

    def gap(self, number: int) -> float:
        """Return the distance t - s in a round, counted from 0."""
        return 0.5 ** (self.rounds - 1 - number) / self.steps


class Distillation(Plain, ABC):
    """Base class of distillation objectives, components of kind ``distillation``, the blueprint's section ``distill``."""

    abstract: ClassVar[bool] = True
    config: DistillationConfig

    def lacks(self, process: Distillable) -> str | None:
        """Return what the objective lacks in a process, as a phrase; None if it can distil it."""
        return None

    @abstractmethod
    def draw(self, process: Distillable, batch: Any, gap: float, random: Randomness) -> Any:
        """Draw everything random that a step needs.

        Args:
            process: The process.
            batch: Clean rows.
            gap: Distance t - s of this round.
            random: Source of random numbers.
        """

    @abstractmethod
    def loss(self, process: Distillable, networks: Networks, draw: Any, batch: Any) -> Tensor:
        """Return the loss of each row, in nats of divergence, float32 [b]; it draws nothing.

        Args:
            process: The process.
            networks: The student and the teacher.
            draw: What :meth:`draw` returned.
            batch: Clean rows.
        """
