"""The probability-flow ODE of a process on vectors: its steps, and the likelihood of tokens that it gives.

In the coordinates s = sqrt(alpha_bar / (1 - alpha_bar)) and y = x_t / sqrt(1 - alpha_bar), so that y = s x_0 + noise, the ODE
is dy / ds = E[x_0 | x_t], and the log-density of y falls along it by the divergence of E[x_0 | x_t] in y. Axes: b batch, l
length, d width of a vector.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser, first_time
from sedd_graph.diffusion.vectors.gaussian import along, log_snr, noise_std
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel

__all__ = ["Divergence", "Flow", "FlowLikelihood", "Method", "advance", "first_time", "root_snr", "spaced"]

Method = Literal["euler", "heun"]
"""Method of integration: ``euler`` (order 1, one evaluation in a step) or ``heun`` (order 2, two evaluations)."""


KNOTS = 2000
"""Number of times, and of noise levels, between which the times of the steps are interpolated."""


class Divergence(NamedTuple):
    """Estimate of the clean vectors at y, and its divergence.

    Attributes:
        x0: The estimate, [b, l, d].
        value: Divergence of the estimate in y, or an unbiased estimate of it, float64 [b].
    """

    x0: Tensor
    value: Tensor


def root_snr(sigma: Tensor) -> Tensor:
    """Return s = sqrt(alpha_bar / (1 - alpha_bar)), float64 of the shape of ``sigma``."""
    return torch.exp(log_snr(sigma.double()) / 2)


def advance(y: Tensor, start: Tensor, end: Tensor, x0: Tensor, *others: Tensor) -> Tensor:
    """Return y at s = ``end``, one step from ``y`` [b, l, d] at s = ``start``, both float64 [b].

    Args:
        y: Vectors in the coordinates of the ODE.
        start: Value of s before the step.
        end: Value of s after the step.
        x0: Estimate of the clean vectors at the start of the step (Euler), [b, l, d].
        *others: Further estimates that are averaged with it: that at the end of an Euler step (Heun).
    """
    return y + along(end - start, y) * (sum(others, x0) / (1 + len(others)))


def spaced(kernel: VectorKernel, schedule: Schedule, steps: int, device: torch.device) -> Tensor:
    """Return times of the ends of steps that are even in the mean of time and relative log-SNR, increasing to 1, float64.

    Args:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        steps: Number of steps; there is one time more.
        device: Device of the result.
    """
    first = first_time(schedule)
    even = torch.linspace(first, 1, KNOTS, dtype=torch.float64, device=device)
    ends = log_snr(kernel.sigma(schedule, even[[0, -1]]))
    levels = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, KNOTS, dtype=torch.float64, device=device)
    times = torch.cat([even, schedule.time(softplus(-levels)).clamp(first, 1)]).unique()
    share = (log_snr(kernel.sigma(schedule, times)) - ends[0]) / (ends[1] - ends[0])
    place = ((times + share) / 2).cpu().numpy()
    wanted = np.linspace(0, 1, steps + 1)
    found = torch.from_numpy(np.interp(wanted, place, times.cpu().numpy()))
    found[0], found[-1] = first, 1.0
    return found.to(device)


class FlowLikelihood(NamedTuple):
    """Terms of the bound on -log p of the tokens that an ODE gives, nats, float64 [b] each.

    Attributes:
        reconstruction: -log p(tokens | y) at the lowest noise.
        volume: Integral of the divergence of the estimate.
        prior: -log of the normal density of y at the highest noise, plus the log-density of the noise at the lowest.
        end: Vectors y at the highest noise, [b, l, d].
    """

    reconstruction: Tensor
    volume: Tensor
    prior: Tensor
    end: Tensor

    @property
    def nats(self) -> Tensor:
        """Bound on -log p of the tokens of each row, nats, float64 [b]."""
        return self.reconstruction + self.volume + self.prior


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """The probability-flow ODE of a network, as a generative model of tokens: noise -> y at the lowest noise -> tokens.

    A self-conditioned network is evaluated twice at each y, the second time given its first estimate there, so that the
    right-hand side is a function of y and s. Its divergence counts both evaluations.

    Attributes:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        steps: Number of steps of the integration.
        method: Method of integration.
        probes: Number of Rademacher vectors of Hutchinson's estimate of each divergence (arXiv 1810.01367); 0: the exact
            divergence, by one derivative for each coordinate.
    """

    kernel: VectorKernel
    schedule: Schedule
    steps: int
    method: Method = "heun"
    probes: int = 1

    @property
    def caveat(self) -> str:
        """Reason why :meth:`likelihood` is an estimate of a bound, not a bound."""
        return (
            f"an estimate: {self.steps} {self.method.title()} steps integrate the ODE, and the standard error counts noise and "
            "Hutchinson's estimate of the divergence, but not the error of the steps (raise objective.steps to see it)"
        )

    @staticmethod
    def estimate(denoise: Denoiser, x: Tensor, t: Tensor) -> Estimate:
        """Return the estimate of the clean rows at noisy vectors ``x`` [b, l, d] and times ``t`` [b], with gradients."""
        first = denoise(x, t).x0 if denoise.self_conditioned else None
        return denoise(x, t, first)

    def grid(self, rows: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return times, standard deviation of the noise, and s of the ends of the steps, from little noise on, float64 [b].

        Steps are evenly spaced in the mean of time and relative log-SNR: in time, where the schedule places the changes of
        the estimate; in log-SNR, so that the first and the last steps are short too.
        """
        times = spaced(self.kernel, self.schedule, self.steps, device)
        found = []
        for t in times:
            each = t.expand(rows)
            sigma = self.kernel.sigma(self.schedule, each)
            found.append((each, noise_std(sigma), root_snr(sigma)))
        return found

    def divergence(self, at: Callable[[Tensor], Tensor], y: Tensor, moving: Tensor, random: Randomness) -> Divergence:
        """Return a vector field at ``y`` and its divergence over the moving positions.

        Args:
            at: The vector field: takes y and returns [b, l, d].
            y: Vectors, [b, l, d].
            moving: Positions that are integrated over, bool [b, l, 1].
            random: Source of the probes.
        """
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            field = torch.where(moving, at(y), 0.0)
            total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
            probes = self._probes(y, moving, random)
            for number, probe in enumerate(probes):
                last = number == len(probes) - 1
                (slope,) = torch.autograd.grad(field, y, probe, retain_graph=not last)
                total = total + (slope * probe).double().sum((1, 2))
        return Divergence(field.detach(), total / max(1, self.probes))

    def _probes(self, y: Tensor, moving: Tensor, random: Randomness) -> list[Tensor]:
        if self.probes:
            signs = (random.rand(*y.shape, self.probes) < 0.5).to(y.dtype) * 2 - 1
            return [torch.where(moving, signs[..., i], 0.0) for i in range(self.probes)]
        unit = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device).view(-1, 1, *y.shape[1:])
        return [torch.where(moving, one.expand_as(y), 0.0) for one in unit]

    def likelihood(
        self, denoise: Denoiser, batch: Batch, random: Randomness, *, noise: Tensor | None = None
    ) -> FlowLikelihood:
        """Estimate the bound on -log p of the tokens of each row.

        With y = s e + noise at the lowest noise (e are the embeddings), -log p(tokens) is at most the expectation of -log
        p(tokens | y) - log p(y) + log N(noise): p(y) is the density of the flow, and the bound is variational with the noise
        as its posterior. With exact integration and divergences it is a bound; Hutchinson's estimate is unbiased, and a
        finite number of steps makes the result an estimate.

        Args:
            denoise: The network.
            batch: Clean rows. Positions that are not corrupted or do not count keep their embeddings.
            random: Source of noise and probes.
            noise: Standard normal noise at the lowest noise, [b, l, d]; None: drawn.
        """
        clean = self.kernel.embed(batch.tokens, batch.attend, batch.attend & ~batch.corrupt).detach()
        moving = (batch.loss & batch.corrupt)[..., None]
        drawn = random.randn(*clean.shape).to(clean.dtype) if noise is None else noise
        grid = self.grid(len(clean), clean.device)
        drawn = torch.where(moving, drawn, 0.0)
        y = along(grid[0][2], clean) * clean + drawn

        def field(place: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
            t, deviation, _ = place
            return lambda y: self.estimate(denoise, torch.where(moving, along(deviation, y) * y, clean), t).x0

        with torch.no_grad():
            x = torch.where(moving, along(grid[0][1], y) * y, clean)
            logits = self.estimate(denoise, x, grid[0][0]).logits
            if logits is None:
                logits = denoise.decode(x if self.kernel.contextual else clean)
            log_p = logits.log_softmax(-1).gather(-1, batch.tokens[..., None])
            reconstruction = -torch.where(moving, log_p, 0.0).double().sum((1, 2))
        volume = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for here, there in itertools.pairwise(grid):
            start, end = here[2], there[2]
            first = self.divergence(field(here), y, moving, random)
            slope, found = first.value, [first.x0]
            if self.method == "heun":
                after = self.divergence(field(there), advance(y, start, end, first.x0), moving, random)
                slope, found = (slope + after.value) / 2, [first.x0, after.x0]
            y = advance(y, start, end, *found)
            volume = volume + (start - end) * slope
        y = torch.where(moving, y, 0.0)
        prior = (y.double().square() - drawn.double().square()).sum((1, 2)) / 2
        return FlowLikelihood(reconstruction, volume, prior, y)
