"""Samplers of vectors in discrete time: DDPM and DDIM.

Axes: b batch, l length, d width of a vector.
"""

from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.vectors.gaussian import along, noise_std, signal
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorSamplerConfig, VectorWalk, reverse

__all__ = ["DDIM", "DDPM"]


def pairs(walk: VectorWalk, times: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Return the steps as (t, s), both float64 [b], with s None in the last step, to clean vectors."""
    rows = len(walk.x)
    every = [t.expand(rows) for t in times]
    return list(zip(every, [*every[1:], None], strict=True))


class DDPM(VectorSampler, kind="vector_sampler"):
    """Ancestral sampling: each step draws x_s from the model's reverse step p(x_s | x_t) (arXiv 2006.11239, algorithm 2).

    The last step takes the mean of p(x_0 | x_1), which is the network's estimate, and rounds it.
    """

    class Config(VectorSamplerConfig):
        pass

    config: Config

    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        for t, s in pairs(walk, times):
            mean, variance = reverse(walk, walk.estimate(t), s, t)
            if s is None or variance is None:
                walk.put(mean, torch.zeros_like(t))
            else:
                walk.put(mean + along(variance.sqrt(), mean) * walk.normal(), s)
                walk.guide(mean, variance, s)
            walk.end_step()


class DDIM(VectorSampler, kind="vector_sampler"):
    """Implicit sampling: x_s is computed from x_t and the estimate, with little noise or none (arXiv 2010.02502, eq. 12)."""

    class Config(VectorSamplerConfig):
        eta: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
        """Share of the noise of q(x_s | x_t, x_0) that a step draws, from 0 (none: x_T determines the sample) to 1."""

    config: Config

    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        for t, s in pairs(walk, times):
            start, sigma = walk.estimate(t).x0, walk.sigma(t)
            if s is None:
                walk.put(start, torch.zeros_like(t))
            else:
                lower = walk.sigma(s)
                noise = (walk.x - along(signal(sigma), start) * start) / along(noise_std(sigma), start)
                drawn = self.config.eta * noise_std(lower) / noise_std(sigma) * noise_std(sigma - lower)
                kept = (noise_std(lower).square() - drawn.square()).clamp(min=0).sqrt()
                mean = along(signal(lower), start) * start + along(kept, noise) * noise
                walk.put(mean + along(drawn, mean) * walk.normal(), s)
                walk.guide(mean, drawn.square().clamp(min=1e-12), s)
            walk.end_step()
