"""The interfaces of the noise process: kernel, schedule, objective, sampler; and of a flow: its likelihood. Implementations
come in as components.

Axes: b batch, l length, n states. ``sigma`` is total noise and ``dsigma`` its derivative in t; t = 0 is clean, t = 1 is
noise. Columns of a rate matrix sum to zero: ``Q[z, y]`` is the rate from y to z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component import Component, ComponentConfig
from sedd_graph.diffusion.categorical import jump
from sedd_graph.diffusion.roles import Batch, Draw, Randomness

__all__ = ["Denoise", "Kernel", "Likelihood", "Objective", "OnStep", "Sampler", "Schedule"]

Denoise = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""``denoise(x [b, l], t [b])`` gives the model's outputs: ``log_score`` or ``log_x0``, float32 [b, l, n]."""

OnStep = Callable[[int, Tensor], None]
"""Called with the number of the step and the rows after it."""


class Schedule(Component, ABC):
    """How noise grows with time."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Total noise, float32 [b], increasing in t."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Its derivative in t, float32 [b]."""


class Kernel(Component, ABC):
    """How one token moves. ``states`` counts the mask where there is one; ``mask`` is its index, else None.

    Noise is measured by its total ``sigma``; a kernel may change its ways as it grows. A prediction of the clean token
    (``log_x0``) is, for every kernel, its posterior given all *other* positions, which under a mask is all there is to know.
    """

    abstract: ClassVar[bool] = True
    clamp_safe: ClassVar[bool] = False
    """Whether a data token that is seen is a clean one, so that holding observed tokens fixed while sampling is exact."""
    masks_evenly: ClassVar[bool] = False
    """Whether all that ever happens is that tokens are masked, all at one rate: what forms that count masks ask for."""

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """``config`` cut down to ``states`` states, for a proof: what a Config says of single tokens, for a few of them."""
        return config

    @property
    def states(self) -> int:
        return self.axis("n")

    @property
    @abstractmethod
    def mask(self) -> int | None:
        """Index of the mask state."""

    @property
    def data_tokens(self) -> int:
        """How many states are data."""
        return self.states - (self.mask is not None)

    @abstractmethod
    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        """x_t given x_0 [b, l] at total noise ``sigma`` [b]; only ``corrupt`` positions move."""

    @abstractmethod
    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        """Rows of pure noise, int64 [rows, length]; ``allowed`` bool [n] bounds the data tokens in it."""

    @abstractmethod
    def rate_matrix(self, sigma: float) -> Tensor:
        """Q at total noise ``sigma`` > 0, per unit of it, float64 [n, n], for proofs on small vocabularies."""

    @abstractmethod
    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        """float64 [n, n]: ``P[z, y]`` is the chance to be at z at noise ``sigma``, having been at y at ``start``.

        In closed form; it solves dP/dsigma = Q(sigma) P. For ``sigma`` float64 [b] it is [b, n, n].
        """

    @abstractmethod
    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Score entropy per position in nats, without the factor dsigma, float32 [b, l] (SEDD, arXiv 2310.16834, eq. 9)."""

    @abstractmethod
    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The same bound's integrand for a head that predicts the clean token, without dsigma, float32 [b, l]."""

    @abstractmethod
    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """The log score that a prediction of the clean token stands for, exactly, float32 [b, l, n]."""

    @abstractmethod
    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Rates of the reverse process out of x per unit of ``sigma`` [b], 0 at x itself, [b, l, n]."""

    @abstractmethod
    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Tweedie step from ``sigma`` down to ``sigma_next`` [b]: probabilities [b, l, n], not clamped (SEDD, Theorem 4.2)."""

    @abstractmethod
    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Ancestral step from total noise ``sigma`` down to ``sigma_next`` [b]: probabilities [b, l, n]."""


class Objective(Component, ABC):
    """What training minimises: a bound on -log p(x_0) in nats per sequence."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of model outputs that it can take, the preferred one first."""
    needs_mask: ClassVar[bool] = False
    """Whether it works only with a kernel that masks all tokens at one rate, and does nothing else."""

    @abstractmethod
    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        """Draw times and corrupted rows; ``t`` and ``xt``, where given, are taken instead. All randomness is here."""

    @abstractmethod
    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Nats per sequence, float32 [b]: its mean over draws is the bound. Pure tensor code that compiles."""

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        """The draw (and the loss to hold it to) for evaluation: the objective itself, or a form of less variance."""
        return self, self.corrupt(batch, kernel, schedule, random=random)


class Likelihood(Component, ABC):
    """What a flow is trained by where there is no noise process: the density that its outputs are held to.

    By the change of variables -log p(x) = -log base(z) - log |det dz/dx|: exact, no bound.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def nats(self, z: Tensor) -> Tensor:
        """-log of the base density of each row of ``z`` [b, ...], nats, [b]."""

    @abstractmethod
    def draw(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """Rows of the base density, float32 of ``shape``."""


class Sampler(Component, ABC):
    """Noise to text: steps of the reverse process, then noise removal. ``clamped`` counts steps that were too large."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    T_MIN: ClassVar[float] = 1e-5

    @abstractmethod
    def step(
        self, outputs: Mapping[str, Tensor], x: Tensor, t: Tensor, s: Tensor | None, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Weights of the next state [b, l, n] for a step from t down to s, or to clean text where s is None.

        The weight at x itself is the chance to stay; the rest sum to the chance to move (possibly out of range).
        """

    @torch.no_grad()
    def run(
        self,
        denoise: Denoise,
        x: Tensor,
        *,
        free: Tensor,
        kernel: Kernel,
        schedule: Schedule,
        generator: torch.Generator,
        steps: int | None = None,
        allowed: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """From noise ``x`` int64 [b, l] to text. Only ``free`` bool [b, l] positions move; only ``allowed`` bool [n] tokens
        come out, and never the mask. Returns int64 [b, l]."""
        count = steps or self.config.steps
        times = torch.linspace(1.0, self.T_MIN, count + 1, device=x.device, dtype=torch.float64).float()
        self.clamped = 0
        given = x
        if on_step:
            on_step(0, x)
        for index in range(count + 1):
            last = index == count
            t = times[index].expand(x.shape[0])
            s = None if last else times[index + 1].expand(x.shape[0])
            weights = self.step(denoise(x, t), x, t, s, kernel, schedule)
            x = torch.where(free, self._move(weights, x, kernel, allowed, final=last, generator=generator), given)
            if on_step:
                on_step(index + 1, x)
        return x

    def _move(
        self,
        weights: Tensor,
        x: Tensor,
        kernel: Kernel,
        allowed: Tensor | None,
        *,
        final: bool,
        generator: torch.Generator,
    ) -> Tensor:
        negative = weights < 0
        weights = weights.masked_fill(negative, 0.0)
        stay = weights.gather(-1, x[..., None])[..., 0]
        elsewhere = weights.scatter(-1, x[..., None], 0.0)
        away = elsewhere.sum(-1)
        self.clamped += int(((away > 1 + 1e-4) | negative.any(-1)).sum())
        move = away / (away + stay).clamp(min=1e-30)
        if kernel.mask is not None:
            masked = x == kernel.mask
            elsewhere[..., kernel.mask] = 0.0
            if final:  # noise removal: whatever is still masked must go
                move = torch.where(masked, 1.0, move)
        if allowed is not None:
            elsewhere = elsewhere * allowed
        total = elsewhere.sum(-1)
        if final and kernel.mask is not None:
            # A position whose every weight has underflowed still has to become something that is allowed.
            data = torch.arange(kernel.states, device=x.device) != kernel.mask
            fallback = (data if allowed is None else data & allowed).to(elsewhere.dtype)
            elsewhere = torch.where((total > 0)[..., None], elsewhere, fallback)
        else:
            move = torch.where(total > 0, move, 0.0)
        return jump(x, move, elsewhere, generator=generator)
