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
    """Base class of components that make the optimizers of a model. Subclasses implement :meth:`make`."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """Return optimizers that together have each parameter once.

        The ``lr`` of each parameter group is its peak, which the learning-rate schedule scales. The state of an optimizer must
        consist of tensors and numbers per parameter, so that a checkpoint can store it.

        Args:
            parameters: Trainable parameters by their dotted names.
        """


class LRSchedule(Plain, ABC):
    """Base class of learning-rate schedules, which return the learning rate as a share of its peak, without warm-up."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of the peak learning rate, in [0, 1], when the share ``progress`` of the run, in [0, 1], is done."""


class Tracker(Plain, ABC):
    """Base class of trackers, which send metrics to a service or to files in addition to ``metrics.jsonl``.

    A tracker that raises is disabled with a warning; it never ends a run.
    """

    abstract: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    """Optional package that it imports, which the extra of the same name installs."""

    @abstractmethod
    def start(self, run: Path, name: str) -> None:
        """Begin to log the run in the folder ``run``, of the blueprint ``name``."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics by name at a training step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample, at a training step; by default, do nothing."""

    def resume(self, step: int) -> None:
        """Prepare to log again the steps after ``step``, from which a run resumes; by default, do nothing."""

    def close(self) -> None:
        """Wait until all metrics are sent; by default, do nothing."""
