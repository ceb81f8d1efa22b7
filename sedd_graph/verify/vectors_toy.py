"""The toy of processes on vectors: short rows of few tokens, whose noisy vectors are a known mixture of Gaussians.

Given a row of tokens, x_t is normal with mean sqrt(alpha_bar) times its embeddings and variance alpha_bar sigma_0^2 + 1 -
alpha_bar in each coordinate. So the posterior of the row given x_t, and with it the best estimate of the clean vectors,
is known exactly. Levels are computed from the schedule alone, not by the kernel. Axes: b batch, l length, d width, v
tokens, k rows of the toy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.objective import VectorObjective
from sedd_graph.diffusion.vectors.parts import VectorParts

__all__ = ["TOKENS", "Early", "Toy", "level", "placed"]

TOKENS = 3
"""Number of tokens of the toy."""
PLACES = (-3.0, 0.6, 4.2)
"""First coordinate of the embeddings: three tokens that rounding tells apart, at unequal distances and norms."""
NODES = 40
"""Number of nodes of the quadrature over noise levels."""
CHANCES = (0.5, 0.2, 0.3)
"""Probabilities of the tokens of a row of one token."""


def placed(parts: VectorParts) -> VectorParts:
    """Set the embeddings of the toy's kernel to known places, where it allows that; return ``parts``."""
    kernel = parts.kernel
    table = torch.zeros(TOKENS, kernel.width)
    table[:, 0] = torch.tensor(PLACES)
    if kernel.width > 1:
        table[:, 1] = torch.tensor((0.5, -1.0, 0.3))
    kernel.place(table)
    return parts


def level(schedule: Schedule, t: float) -> float:
    """Return alpha_bar at time ``t``: exp(-total noise), 1 at t = 0."""
    if t <= 0:
        return 1.0
    return math.exp(-float(schedule.sigma(torch.tensor([t], dtype=torch.float64))))


class Early(Schedule):
    """A schedule with its total noise scaled down to 1 at t = 1, so that the last step is far from the prior.

    Terms of the loss and of the bound that are negligible under the schedule itself can then be verified.

    Args:
        schedule: The schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule.config, schedule.context)
        self._inner = schedule
        self._scale = 1 / float(schedule.sigma(torch.ones(1, dtype=torch.float64)))

    def sigma(self, t: Tensor) -> Tensor:
        return self._inner.sigma(t) * self._scale

    def dsigma(self, t: Tensor) -> Tensor:
        return self._inner.dsigma(t) * self._scale


class Toy:
    """Rows of ``length`` tokens with known probabilities, and their exact posterior given noisy vectors.

    Args:
        parts: Components of the process, with :data:`TOKENS` tokens.
        length: Tokens per row, 1 or 2. The tokens of a row of two are dependent.
        chances: Probability of each row; None: the default.
        training: True: the network reads tokens best at the noise levels at which it is trained to; False: at the level of its
            time. Only networks of contextual kernels read tokens.

    Attributes:
        rows: All rows, int64 [k, l].
        chances: Their probabilities, float64 [k].
        clean: Their embeddings, float64 [k, l, d].
        start_variance: Variance of x_0 around the embeddings.
    """

    def __init__(
        self, parts: VectorParts, length: int = 1, chances: Tensor | None = None, *, training: bool = False
    ) -> None:
        self.parts, self.length, self.training = parts, length, training
        kernel, schedule = parts.kernel, parts.schedule
        self.rows = torch.tensor(list(itertools.product(range(TOKENS), repeat=length)))
        if chances is None:
            one = torch.tensor(CHANCES, dtype=torch.float64)
            # of two tokens, the second follows the first by a permutation, with noise
            follows = 0.7 * torch.eye(TOKENS, dtype=torch.float64).roll(1, 0) + 0.3 * one
            chances = one if length == 1 else (one[:, None] * follows).reshape(-1)
        self.chances = chances / chances.sum()
        self.clean = kernel.embed(self.rows).detach().double()
        self._flat = self.clean.flatten(1).T.contiguous()
        self._hot = torch.nn.functional.one_hot(self.rows, TOKENS).double().flatten(1)
        self.start_variance = kernel.start_variance(schedule)

    @property
    def entropy(self) -> float:
        """Entropy of the rows, nats."""
        return float(-torch.xlogy(self.chances, self.chances).sum())

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and the variance of x_t given the row, at times ``t`` [b], float64 [b] each."""
        bar = torch.exp(-self.parts.schedule.sigma(t))
        if self.parts.kernel.steps is not None:
            bar = torch.where(t > 0, bar, 1.0)
        return bar.sqrt(), bar * self.start_variance + 1 - bar

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the probability of each row given noisy vectors ``x`` [b, l, d] at times ``t`` [b], float64 [b, k]."""
        signal, variance = self.levels(t.double())
        scale = (signal / variance)[:, None]
        # -|x - signal clean|^2 / (2 variance), less what is equal for all rows
        log = scale * (x.double().flatten(1) @ self._flat - signal[:, None] * self._flat.square().sum(0) / 2)
        return (self.chances.log() + log).softmax(-1)

    def estimates(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x_0 | x_t] and E[embedding | x_t], float64 [b, l, d] each; arguments as for :meth:`posterior`."""
        signal, variance = (v[:, None, None] for v in self.levels(t.double()))
        clean = (self.posterior(x, t) @ self._flat.T).view_as(x)
        # x_0 given x_t and the row is normal: its mean is shifted from the embedding towards x_t
        return clean + self.start_variance * signal / variance * (x.double() - signal * clean), clean

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the log of the probability of each token given noisy vectors, float64 [b, l, v]."""
        chance = (self.posterior(x, t) @ self._hot).view(*x.shape[:2], TOKENS)
        return chance.clamp(min=1e-300).log()

    def decoded(self, x: Tensor) -> Tensor:
        """Return the log of the probability of each token given vectors whose positions have unknown noise levels.

        The levels are those at which the objective trains the network to read tokens. Float64 [b, l, v] for ``x`` [b, l, d].
        """
        decoding = self.parts.objective.decoding
        if decoding is None:
            raise ValueError("the objective trains no network to read tokens")
        node, weight = np.polynomial.hermite_e.hermegauss(NODES)
        snr = torch.exp(decoding.mean + decoding.std * torch.from_numpy(node))
        signal, variance = (snr / (1 + snr)).sqrt(), 1 / (1 + snr)
        away = x.double()[:, None, :, None] - signal[:, None] * self.clean[:, :, None]  # [b, k, l, nodes, d]
        log = -away.square().sum(-1) / (2 * variance) - x.shape[-1] / 2 * variance.log()
        each = (log + torch.from_numpy(weight / weight.sum()).log()).logsumexp(-1).sum(-1)
        chance = ((self.chances.log() + each).softmax(-1) @ self._hot).view(*x.shape[:2], TOKENS)
        return chance.clamp(min=1e-300).log()

    def added(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what the kernel adds to the logits of a network, float64 [b, l, v]; 0 without preconditioning."""
        zero = torch.zeros(*x.shape[:2], TOKENS, dtype=torch.float64)
        found = self.parts.kernel.translate({"logits": zero}, x, self.parts.kernel.sigma(self.parts.schedule, t)).logits
        return zero if found is None else found.double()

    def network(self, objective: VectorObjective, output: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """Return the perfect network as a function of its inputs: at each noisy row its best output.

        Args:
            objective: The objective, which determines what is best.
            output: Name of the network's output, ``x0`` or ``logits``.
        """
        kernel = self.parts.kernel

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            x, t = inputs["x"], inputs["t"].double()
            if kernel.steps is not None:  # float32 times are those of the steps, rounded
                t = (t * kernel.steps).round() / kernel.steps
            if output == "logits":
                return {"logits": self.logits(x, t) - self.added(x, t)}
            found = {"x0": objective.optimal(*self.estimates(x, t), t, kernel)}
            if not kernel.contextual:
                return found
            # what is read from an output that the row's mode does not have is no number
            mode = inputs["decode"].bool()
            read = torch.full((*x.shape[:2], TOKENS), math.nan, dtype=torch.float64)
            read[mode] = self.decoded(x[mode]) if self.training else self.logits(x[mode], t[mode])
            return {"x0": found["x0"].masked_fill(mode[:, None, None], math.nan), "logits": read}

        return run

    def denoiser(self, objective: VectorObjective, output: str, rows: int) -> Denoiser:
        """Return the perfect network as a function of noisy vectors and time.

        Args:
            objective: The objective, which determines what is best.
            output: Name of the network's output.
            rows: Number of rows of the batch.
        """
        attend = torch.ones(rows, self.length, dtype=torch.bool)
        return Denoiser(self.network(objective, output), self.parts.kernel, self.parts.schedule, attend)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows of tokens, int64 [count, l]."""
        return self.rows[torch.multinomial(self.chances, count, replacement=True, generator=generator)]
