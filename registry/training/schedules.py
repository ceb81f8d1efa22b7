"""Learning-rate schedules: constant, cosine decay and linear decay. The module does not import torch."""

import math
from typing import Annotated

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.training.interfaces import LRSchedule


class Constant(LRSchedule, kind="lr_schedule"):
    """Constant learning rate: the optimizer's peak learning rate throughout the run."""

    class Config(ComponentConfig):
        pass

    def share(self, progress: float) -> float:
        return 1.0


class _Decay(LRSchedule):
    abstract = True

    class Config(ComponentConfig):
        final: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
        """Learning rate at the end of the run as a share of the peak learning rate, in [0, 1]."""

    config: Config

    def _between(self, share: float) -> float:
        """Interpolate between the final share (0) and the peak (1)."""
        return self.config.final + (1 - self.config.final) * share


class CosineDecay(_Decay, kind="lr_schedule"):
    """Cosine decay of the learning rate from its peak to ``final`` times the peak (arXiv 1608.03983)."""

    def share(self, progress: float) -> float:
        return self._between(0.5 * (1 + math.cos(math.pi * progress)))


class LinearDecay(_Decay, kind="lr_schedule"):
    """Linear decay of the learning rate from its peak to ``final`` times the peak."""

    def share(self, progress: float) -> float:
        return self._between(1.0 - progress)
