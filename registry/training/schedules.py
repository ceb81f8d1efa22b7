"""Learning-rate schedules: constant, cosine and linear decay. No torch."""

import math
from typing import Annotated

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.training.interfaces import LRSchedule


class Constant(LRSchedule, kind="lr_schedule"):
    """The peak learning rate throughout."""

    class Config(ComponentConfig):
        pass

    def share(self, progress: float) -> float:
        return 1.0


class _Decay(LRSchedule):
    abstract = True

    class Config(ComponentConfig):
        final: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
        """Share of the peak learning rate that is left at the end."""

    config: Config

    def _left(self, left: float) -> float:
        return self.config.final + (1 - self.config.final) * left


class CosineDecay(_Decay, kind="lr_schedule"):
    """Decay along half a cosine (arXiv 1608.03983, without restarts)."""

    def share(self, progress: float) -> float:
        return self._left(0.5 * (1 + math.cos(math.pi * progress)))


class LinearDecay(_Decay, kind="lr_schedule"):
    """Decay along a straight line."""

    def share(self, progress: float) -> float:
        return self._left(1.0 - progress)
