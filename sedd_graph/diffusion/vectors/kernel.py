"""The interface of kernels of vectors: embeddings of tokens, Gaussian noise, rounding. Implementations are components.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import SizeField
from sedd_graph.component.outputs import TOKEN_LOGITS, VECTOR_X0, Output
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.gaussian import along, log_snr, noise_std, posterior, signal

__all__ = ["Estimate", "VectorKernel", "VectorKernelConfig"]

CHUNK = 2**24
"""Largest number of entries of a table of distances that is held at once."""


class Estimate(NamedTuple):
    """Estimate of the clean rows, computed by the network from noisy vectors.

    Attributes:
        x0: Clean vectors, float32 [b, l, d].
        logits: Unnormalised log probability of each clean token, float32 [b, l, v]; None if the network predicts
            vectors alone.
    """

    x0: Tensor
    logits: Tensor | None = None


class VectorKernelConfig(ComponentConfig):
    """Config of a kernel of vectors: the sizes of the table of embeddings."""

    vocab: SizeField
    """Number of tokens. An integer or an expression such as ``v``."""
    width: SizeField
    """Width of a vector; 16 in Diffusion-LM for E2E, 128 for ROCStories."""


class VectorKernel(Component, ABC):
    """The forward process of tokens as vectors: token -> x_0 ~ N(embedding, start variance) -> x_t by Gaussian noise.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, with alpha_bar = exp(-total noise). A subclass defines the
    embeddings (:meth:`table`) and p(token | x_0) (:meth:`logits`). Its Config extends :class:`VectorKernelConfig`.
    """

    abstract: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {}
    """Values for the Config keys without default, for tests and generated documentation."""
    learned: ClassVar[bool] = False
    """True if the kernel has trained parameters, such as embeddings, which are saved with the network's."""
    contextual: ClassVar[bool] = False
    """True if the vector of a token depends on the whole row, so that there is no table of embeddings, and tokens are read
    from vectors by the network (:class:`~sedd_graph.diffusion.vectors.contextual.ContextualKernel`)."""
    extra_states: ClassVar[int] = 0
    """0: every token has a vector. The plan of a process reads this attribute from each kernel."""

    config: VectorKernelConfig

    @classmethod
    def own_schedule(cls, config: ComponentConfig) -> None:
        """Return None: a process on vectors always declares its schedule."""

    @classmethod
    def sizes(cls, config: VectorKernelConfig) -> tuple[int, int]:
        """Return the number of tokens v and the width d of a vector."""
        return config.vocab, config.width

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the sets of network outputs that this kernel reads: ``x0`` (vectors) or ``logits`` (tokens)."""
        return ((VECTOR_X0,), (TOKEN_LOGITS,))

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """Return the Config for ``states`` tokens of a small example that numerical verification uses."""
        return config

    @property
    def data_tokens(self) -> int:
        """Number of tokens, v."""
        return self.config.vocab

    @property
    def width(self) -> int:
        """Width of a vector, d."""
        return self.config.width

    # -- tokens and vectors -------------------------------------------------------------------------------------------

    @abstractmethod
    def table(self) -> Tensor:
        """Return the embedding of each token, [v, d], with gradients where it is trained."""

    @abstractmethod
    def logits(self, x0: Tensor) -> Tensor:
        """Return unnormalised log p(token | x_0), which rounds clean vectors to tokens.

        Args:
            x0: Clean vectors, [..., d].

        Returns:
            float32 (float64 for a float64 ``x0``) [..., v].
        """

    def place(self, table: Tensor) -> None:
        """Set the embeddings to ``table`` [v, d] and the rounding to the nearest of them, for numerical verification.

        A kernel whose embeddings cannot be chosen ignores the call, as this default does.
        """

    def embed(self, tokens: Tensor, attend: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        """Return the embeddings of token rows, [b, l, d].

        Args:
            tokens: int64 [b, l].
            attend: Positions that are not padding, bool [b, l]; None: all. Only a contextual kernel reads it.
            given: Positions whose embeddings may depend on each other alone, such as those of a prompt, bool [b, l];
                None: none. Only a contextual kernel reads it.
        """
        return F.embedding(tokens, self.table())

    def round(self, x0: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the most likely token at each clean vector.

        Args:
            x0: Clean vectors, [b, l, d].
            allowed: Tokens that may be returned, bool [v], [l, v] or [b, l, v]; None: all.

        Returns:
            int64 [b, l].
        """
        found = self.logits(x0)
        return (found if allowed is None else found.masked_fill(~allowed, -torch.inf)).argmax(-1)

    @torch.no_grad()
    def nearest(self, x0: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the token whose embedding is nearest to each vector in Euclidean distance.

        Args:
            x0: Vectors, [b, l, d].
            allowed: Tokens that may be returned, bool [v], [l, v] or [b, l, v]; None: all.

        Returns:
            int64 [b, l].
        """
        table = self.table().to(x0.dtype)
        half = table.square().sum(-1) / 2
        rows = max(1, CHUNK // max(1, x0.shape[1] * len(table)))
        found = []
        with full_precision(x0):
            for start in range(0, len(x0), rows):
                score = x0[start : start + rows] @ table.T - half  # -distance^2 / 2, up to |x|^2 / 2
                if allowed is not None:
                    score = score.masked_fill(
                        ~(allowed if allowed.dim() < 3 else allowed[start : start + rows]), -torch.inf
                    )
                found.append(score.argmax(-1))
        return torch.cat(found)

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Estimate:
        """Convert the outputs of the network to an estimate of the clean rows.

        Args:
            outputs: ``x0`` or ``logits`` by name.
            x: Noisy vectors that the network was evaluated on, [b, l, d].
            sigma: Total noise, float64 [b].
        """
        if "x0" in outputs:
            return Estimate(outputs["x0"].float())
        logits = outputs["logits"].float()
        with full_precision(logits):
            return Estimate(logits.softmax(-1) @ self.table().float(), logits)

    # -- noise --------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Number of steps of a process in discrete time; None for continuous time."""
        return None

    def sigma(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return total noise at times ``t``: 0 at t = 0 in discrete time, otherwise that of the schedule.

        Args:
            schedule: Total noise as a function of time.
            t: Times in [0, 1], float64 [b].

        Returns:
            float64 [b].
        """
        found = schedule.sigma(t.double())
        return found if self.steps is None else torch.where(t > 0, found, 0.0)

    def declared_start(self, schedule: Schedule) -> float:
        """Return the standard deviation sigma_0 that the Config declares; by default 0: x_0 is the embedding.

        Numerical verification compares :meth:`start_variance` and :meth:`start` with it.
        """
        return 0.0

    def start_variance(self, schedule: Schedule) -> float:
        """Return the variance sigma_0^2 of x_0 around the embedding of its token; 0: x_0 is the embedding."""
        return self.declared_start(schedule) ** 2

    def start(self, tokens: Tensor, schedule: Schedule, noise: Tensor) -> Tensor:
        """Return clean vectors x_0 of ``tokens`` int64 [b, l], [b, l, d], from standard normal ``noise`` [b, l, d]."""
        return self.embed(tokens) + math.sqrt(self.start_variance(schedule)) * noise

    def noised(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return x_t, [b, l, d], given x_0 [b, l, d], total noise [b] and standard normal ``noise`` [b, l, d]."""
        return along(signal(sigma), x0) * x0 + along(noise_std(sigma), x0) * noise

    def reverse_variance(self, lower: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
        """Return the variance of a sampler's reverse step p(x_s | x_t) in each coordinate, float64 [b].

        By default that of q(x_s | x_t, token).

        Args:
            lower: Total noise at s, above 0, float64 [b].
            sigma: Total noise at t, float64 [b].
            schedule: Total noise as a function of time.
        """
        return posterior(lower, sigma, self.start_variance(schedule)).variance

    def inputs(self, x: Tensor, t: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the network that depend on noisy vectors and noise level, by name.

        Args:
            x: Noisy vectors, [b, l, d].
            t: Times, float64 [b].
            sigma: Total noise, float64 [b].

        Returns:
            ``x``, and float32 [b]: ``t``, ``sigma``, ``log_snr`` and ``timestep``.
        """
        first = 0.0 if self.steps is None else 1 / self.steps
        return {
            "x": x,
            "t": t.float(),
            "sigma": sigma.float(),
            "log_snr": log_snr(sigma).float(),
            "timestep": (1000 * (t.double() - first)).float(),
        }
