"""Base classes of optimizers, learning-rate schedules and trackers. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sedd_graph.component.declared import Plain

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["LRSchedule", "OptimizerFactory", "Tracker"]


class OptimizerFactory(Plain, ABC):
    """Makes the optimizers of a model. Subclasses implement :meth:`make`."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """Return optimizers that together hold each parameter once.

        The ``lr`` of each parameter group is its peak, which the learning-rate schedule scales. The state of an optimizer must
        consist of tensors and numbers per parameter, so that a checkpoint can hold it.

        Args:
            parameters: Trainable parameters by their dotted names.
        """


class LRSchedule(Plain, ABC):
    """Learning rate over a run, as a share of its peak. Warm-up is applied on top of it."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of the peak learning rate, in [0, 1], at ``progress`` in [0, 1]."""


class Tracker(Plain, ABC):
    """Sends metrics to a service or to files, beside ``metrics.jsonl``.

    A tracker that raises is dropped with a warning; it never ends a run.
    """

    abstract: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    """Optional package that it imports; it is installed by the extra of the same name."""

    @abstractmethod
    def start(self, run: Path, name: str) -> None:
        """Begin to log the run in the folder ``run`` of the blueprint called ``name``."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers by name at a training step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample, at a training step. By default it is not logged."""

    def resume(self, step: int) -> None:
        """Prepare to continue from ``step``: later records will be logged again. By default nothing is done."""

    def close(self) -> None:
        """Return once everything is sent. By default nothing is done."""
