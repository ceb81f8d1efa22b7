"""Sampler of the probability-flow ODE of a process on vectors in continuous time.

Axes: b batch, l length, d width of a vector.
"""

import itertools

from torch import Tensor

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.flow import Method, advance, root_snr
from sedd_graph.diffusion.vectors.gaussian import along, noise_std
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorSamplerConfig, VectorWalk
from sedd_graph.errors import UserError

__all__ = ["Ode"]


class Ode(VectorSampler, kind="vector_sampler"):
    """Sampler of the probability-flow ODE: from noise to text without further noise (LangFlow, arXiv 2604.11748).

    The ODE is dy / ds = E[x_0 | x_t], with y = x_t / sqrt(1 - alpha_bar) and s = sqrt(alpha_bar / (1 - alpha_bar)). An ``euler``
    step is that of ``ddim`` with eta 0. The last evaluation, at the lowest noise, gives the tokens: the most likely ones of a
    network that predicts logits, otherwise the nearest.
    """

    class Config(VectorSamplerConfig):
        method: Method = "heun"
        """Method of integration. ``euler``: order 1, one evaluation of the network in a step; ``heun``: order 2, two
        evaluations."""
        refine: bool = False
        """How a self-conditioned network is conditioned. False: on the estimate before, as published; True: on its first
        estimate at the same vectors (twice the evaluations), so that samples are those of the ODE whose likelihood
        ``eval --likelihood ode`` reports."""

    config: Config

    @property
    def order(self) -> float:
        return 2.0 if self.config.method == "heun" else 1.0

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        if kernel.steps is not None or kernel.start_variance(schedule) > 0:
            return "a kernel in continuous time whose x_0 is the embedding, such as normalized_gaussian"
        return None

    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        classifier = walk.settings.classifier
        if classifier is not None and classifier.config.updates:
            raise UserError(
                "sample: the classifier's updates need a sampler that draws noise, such as ddpm: take updates: 0"
            )
        every = [t.expand(len(walk.x)) for t in times]
        for t, s in itertools.pairwise(every):
            here, there = walk.sigma(t), walk.sigma(s)
            y, start, end = walk.x / along(noise_std(here), walk.x), root_snr(here), root_snr(there)
            deviation = along(noise_std(there), y)
            first = self._estimate(walk, t).x0
            found = advance(y, start, end, first)
            if self.config.method == "heun":
                found = advance(y, start, end, first, self._estimate(walk, s, deviation * found).x0)
            walk.put(deviation * found, s)
            walk.end_step()
        walk.conclude(self._estimate(walk, every[-1]), every[-1])

    def _estimate(self, walk: VectorWalk, t: Tensor, x: Tensor | None = None) -> Estimate:
        """Return the estimate at the current vectors, or at ``x``, and time ``t``."""
        return walk.refined(t, x=x) if self.config.refine else walk.estimate(t, x=x)
