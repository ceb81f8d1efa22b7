"""Base densities of normalising flows. Axes: b batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.likelihood import Likelihood


class ExactLikelihood(Likelihood, kind="likelihood"):
    """Standard normal base density of a flow, for training by exact likelihood (NICE, arXiv 1410.8516, equation 1)."""

    class Config(ComponentConfig):
        pass

    config: Config

    def nats(self, z: Tensor) -> Tensor:
        z = z.flatten(1)
        return 0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi)

    def draw(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        return torch.randn(list(shape), generator=generator, device=generator.device)
