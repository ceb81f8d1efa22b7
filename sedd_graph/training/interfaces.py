"""Base classes of the components of training: optimizers, learning-rate schedules, adapters and trackers. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sedd_graph.component.declared import Plain

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Adapter", "LRSchedule", "OptimizerFactory", "Setting", "Tracker"]

Setting = bool | int | float | str
"""Value of a setting of a run, as trackers receive it."""


class OptimizerFactory(Plain, ABC):
    """Base class of optimizer components, which make torch optimizers. Subclasses implement :meth:`make`."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """Return optimizers for ``parameters``. Each parameter must be in exactly one of them.

        The ``lr`` of a parameter group is its peak learning rate, which the learning-rate schedule scales. The state of
        an optimizer must consist of tensors and numbers per parameter, so that a checkpoint can store it.

        Args:
            parameters: Trainable parameters of the network by dotted name.
        """


class LRSchedule(Plain, ABC):
    """Base class of learning-rate schedules, which return the learning rate divided by its peak, without warm-up."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the learning rate divided by its peak, in [0, 1], without warm-up.

        Args:
            progress: Share of the training run that is done, in [0, 1].
        """


class Adapter(Plain, ABC):
    """Base class of adapters: trained parameters from which a weight matrix is computed, together with its frozen value.

    The module that :meth:`make` returns is a parametrization of torch (``torch.nn.utils.parametrize``): every use of the
    matrix, that of a derived inverse too, reads the adapted one, and it is merged by evaluating it once.
    """

    abstract: ClassVar[bool] = True

    @property
    @abstractmethod
    def patterns(self) -> Sequence[str]:
        """Patterns of the names of the adapted matrices, as in ``train.freeze``."""

    @abstractmethod
    def make(self, weight: Tensor) -> nn.Module:
        """Return the parametrization of a matrix: a module from its frozen value to its adapted one, of equal shape.

        At first the adapted matrix is the frozen one. Random initial values come from torch's global generator, which is
        seeded for each matrix.

        Args:
            weight: A matrix of its shape and dtype, [out, in]. Its values are zero if the model will be sharded.
        """


class Tracker(Plain, ABC):
    """Base class of experiment trackers, which send metrics to a service or to files in addition to ``metrics.jsonl``.

    A tracker that raises an exception is disabled with a warning; the training run continues.
    """

    abstract: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    """Name of the optional package that the tracker imports, which is also the name of this project's extra that
    installs the package; None for a tracker that needs no optional package."""

    def describe(self, settings: Mapping[str, Setting]) -> None:
        """Receive the settings of the run, before :meth:`start`; by default, do nothing.

        Args:
            settings: Values of the lock file by dotted key, such as ``train.batch``; lists and null as JSON text. Under
                ``lock_digest``, the digest of the lock file, by which ``run.json`` identifies the build.
        """

    @abstractmethod
    def start(self, run: Path, name: str) -> None:
        """Begin to log a training run.

        Args:
            run: The run folder.
            name: Name of the blueprint.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at an optimizer step.

        Args:
            step: The optimizer step.
            metrics: Values by name.
        """

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample, at an optimizer step; by default, do nothing.

        Args:
            step: The optimizer step.
            name: Name of the text, such as ``sample``.
            text: The text.
        """

    def resume(self, step: int) -> None:
        """Prepare for a run that resumes after ``step`` and logs the later steps again; by default, do nothing."""

    def close(self) -> None:
        """Wait until all metrics are sent, then release resources; by default, do nothing."""
