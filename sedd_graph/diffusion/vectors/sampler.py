"""The interface of samplers of vectors, which denoise Gaussian noise and round it to tokens. Implementations are components.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.conditions.conditions import Forbidden, Pattern
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.classifier import VectorClassifier
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.flow import spaced
from sedd_graph.diffusion.vectors.gaussian import along, posterior, signal
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel
from sedd_graph.errors import UserError

__all__ = ["VectorSampler", "VectorSamplerConfig", "VectorWalk", "VectorWalkSettings", "reverse"]

LEAST = 1e-5
"""Time of the last evaluation of the network, for a process in continuous time."""


class VectorSamplerConfig(ComponentConfig):
    """Config of every sampler of vectors: number of steps, clamping, and conditions on the text."""

    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 200
    """Number of steps, which is the number of network evaluations unless the sampler says otherwise; from 1 to
    1,000,000. A process in discrete time has at most its own number of steps."""
    spacing: Literal["time", "both"] = "time"
    """Times of the steps in continuous time. ``time``: even in time; ``both``: even in the mean of time and relative log-SNR, for
    schedules that change fast at the ends of time, such as ``logit_normal``."""
    clamp: bool = False
    """True: each estimate of the clean vectors is replaced by the nearest embeddings (the clamping trick of Diffusion-LM,
    arXiv 2205.14217, section 4.3)."""
    observed: Literal["clamp", "renoise"] = "renoise"
    """Form in which given tokens enter the network in infilling. ``renoise``: their embeddings, noised afresh at each
    step to the level of the others (Diffusion-LM); ``clamp``: without noise, as prompts are trained."""
    forbid: Annotated[tuple[Forbidden, ...], pydantic.Field(max_length=4096)] = ()
    """List of at most 4,096 token ids or strings. These tokens are never sampled: rounding takes the most likely of the
    others. A string forbids every token whose text contains that string."""
    allow: Annotated[dict[int, Pattern], pydantic.Field(max_length=4096)] = {}
    """Mapping from positions of a row to regular expressions, for at most 4,096 positions. The text of the token at the
    position must match the expression as a whole. Negative positions count from the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorWalkSettings:
    """Settings of a sampling run.

    Attributes:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        generator: Random number generator on the device of the rows.
        tokens: Given tokens, int64 [b, l]; any id at free positions.
        free: Positions that are sampled, bool [b, l].
        renoise: True: given tokens are noised to the level of the others; False: their embeddings are held fixed.
        allowed: Tokens that may be sampled, bool [v], [l, v] or [b, l, v]; None: all.
        classifier: Classifier that guides the samples; None: no guidance.
        on_step: Callback ``on_step(index, rows)``: with 0 and the rounded noise, int64 [b, l], and after each step with
            the step's index, from 1, and the rounded rows. None: no callback.
        start: Initial vectors at the highest noise, float32 [b, l, d]; None: standard normal noise from the generator.
    """

    kernel: VectorKernel
    schedule: Schedule
    generator: torch.Generator
    tokens: Tensor
    free: Tensor
    renoise: bool = True
    allowed: Tensor | None = None
    classifier: VectorClassifier | None = None
    on_step: Callable[[int, Tensor], None] | None = None
    start: Tensor | None = None


class VectorWalk:
    """The state of a sampling run: vectors between noise and text, and the operations on them that samplers share.

    Args:
        denoise: The network.
        settings: The process, and the conditions on the rows.
        clamp: True: estimates are replaced by the nearest embeddings.
        start: Time of the initial noise.

    Attributes:
        x: The current vectors, float32 [b, l, d].
        given: Embeddings of the given tokens, float32 [b, l, d].
        last: The newest estimate of the clean rows; None before the first one.
    """

    def __init__(self, denoise: Denoiser, settings: VectorWalkSettings, *, clamp: bool, start: float = 1.0) -> None:
        self.settings, self.kernel, self.schedule = settings, settings.kernel, settings.schedule
        self.free, self._denoise, self._clamp = settings.free[..., None], denoise, clamp
        self.last: Estimate | None = None
        self._steps = 0
        known = ~settings.free & denoise.attend
        self.given = self.kernel.embed(settings.tokens, known, known).float()
        self.start_variance = self.kernel.start_variance(self.schedule)
        self.x = self.normal() if settings.start is None else settings.start
        self.hold(torch.full((len(self.x),), start, dtype=torch.float64, device=self.x.device))
        self._report()

    def normal(self) -> Tensor:
        """Draw standard normal noise, float32 [b, l, d]."""
        given, generator = self.given, self.settings.generator
        return torch.randn(given.shape, generator=generator, device=given.device)

    def sigma(self, t: Tensor) -> Tensor:
        """Return total noise at times ``t``, float64 [b]."""
        return self.kernel.sigma(self.schedule, t)

    def estimate(self, t: Tensor, *, x: Tensor | None = None) -> Estimate:
        """Return the estimate of the clean rows, after guidance and clamping. It conditions the next one.

        Args:
            t: Times of the vectors, float64 [b].
            x: Vectors in place of the current ones, [b, l, d]; the estimate is then not kept for the next one.
        """
        at = self.x if x is None else x
        found = self._denoise(at, t, None if self.last is None else self.last.x0)
        classifier, x0 = self.settings.classifier, found.x0
        if classifier is not None and classifier.config.updates == 0:
            sigma = self.sigma(t)
            slope = classifier.gradient(at, sigma, self.kernel, self.start_variance)
            # the score of x_t is (sqrt(alpha_bar) x0 - x_t) / (1 - alpha_bar)
            x0 = x0 + along(-torch.expm1(-sigma) / signal(sigma), x0) * slope
        if self._clamp:
            x0 = self.kernel.embed(self.kernel.nearest(x0, self.settings.allowed)).to(x0.dtype)
        if not bool(x0.isfinite().all()):
            raise UserError("sample: the network's estimate of the clean vectors is not finite")
        found = Estimate(x0, found.logits)
        if x is None:
            self.last = found
        return found

    def refined(self, t: Tensor, *, x: Tensor | None = None) -> Estimate:
        """Return :meth:`estimate`, of a self-conditioned network conditioned on its first estimate at the same vectors.

        The result is a function of the vectors and of ``t``, whatever was estimated before.
        """
        self.last = None
        if self._denoise.self_conditioned:
            self.last = self.estimate(t, x=x)
        return self.estimate(t, x=x)

    def put(self, x: Tensor, t: Tensor) -> None:
        """Assign new vectors to the free positions; given positions get their embeddings at the noise of time ``t``.

        Args:
            x: Vectors, [b, l, d].
            t: Their times, float64 [b].
        """
        self.x = x
        self.hold(t)

    def hold(self, t: Tensor) -> None:
        """Set the given positions to their embeddings, noised to the level of times ``t`` float64 [b] if renoised."""
        if bool(self.free.all()):
            return
        given = self.given
        if self.settings.renoise:
            start = given + self.start_variance**0.5 * self.normal()
            given = self.kernel.noised(start, self.sigma(t), self.normal())
        self.x = torch.where(self.free, self.x, given)

    def guide(self, mean: Tensor, variance: Tensor, t: Tensor) -> None:
        """Apply the updates of a classifier to the current vectors, if it has any.

        Args:
            mean: Mean of the reverse step that drew the vectors, [b, l, d].
            variance: Its variance, float64 [b].
            t: Times of the vectors, float64 [b].
        """
        classifier = self.settings.classifier
        if classifier is None or classifier.config.updates == 0:
            return
        sigma = self.sigma(t)
        self.put(classifier.updated(self.x, mean, variance, sigma, self.kernel, self.start_variance), t)

    def conclude(self, estimate: Estimate, t: Tensor) -> None:
        """Replace the vectors by an estimate of the clean ones: the embeddings of its most likely tokens, if it has logits.

        Args:
            estimate: The estimate at the lowest noise.
            t: Times of the vectors, float64 [b].
        """
        found = estimate.x0
        if estimate.logits is not None:
            allowed = self.settings.allowed
            logits = estimate.logits if allowed is None else estimate.logits.masked_fill(~allowed, -torch.inf)
            found = self.kernel.embed(logits.argmax(-1))
        self.put(found.to(self.x.dtype), torch.zeros_like(t))
        self.end_step()

    def rounded(self) -> Tensor:
        """Return the current vectors as tokens, int64 [b, l]; given tokens are returned as they are."""
        tokens = self._denoise.round(self.x, self.settings.allowed)
        return torch.where(self.settings.free, tokens, self.settings.tokens)

    def end_step(self) -> None:
        """Report the rounded rows to ``settings.on_step``."""
        self._steps += 1
        self._report()

    def _report(self) -> None:
        if self.settings.on_step is not None:
            self.settings.on_step(self._steps, self.rounded())


class VectorSampler(Component, ABC):
    """A sampler: turns Gaussian noise into vectors, and rounds them to tokens.

    Its Config is :class:`VectorSamplerConfig` or a subclass of it.
    """

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("x0", "logits")
    """Names of the network outputs that the sampler accepts."""
    Config: ClassVar[type[ComponentConfig]] = VectorSamplerConfig
    config: VectorSamplerConfig

    evaluations: int = 0
    """Number of rows that the network evaluated in the last run, summed over steps."""

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        """Return a description of the kernel or schedule that the sampler requires; None if these are suitable."""
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps."""
        return self.config.steps

    @property
    def order(self) -> float:
        """Order p of convergence: with many steps the error of the samples falls as steps to the power -p."""
        return 1.0

    def bias(self, step: float) -> float:
        """Return the largest error of mean and variance, in standard deviations, of a step of length ``step`` in time.

        It is that of a network that is certain of the clean vector; 0, the default, where such a step is exact.
        """
        return 0.0

    def times(self, walk: VectorWalk, steps: int) -> Tensor:
        """Return the times at which the network is evaluated, decreasing from 1, float64 [steps].

        In discrete time with T steps these are ``steps`` of the times i / T, from 1 to 1 / T, as evenly spaced as possible
        (``space_timesteps`` of the Diffusion-LM code).
        """
        total, device = walk.kernel.steps, walk.x.device
        if total is None:
            if self.config.spacing == "both" and steps > 1:
                return spaced(walk.kernel, walk.schedule, steps - 1, device).flip(0).clamp(min=LEAST)
            return torch.linspace(1.0, LEAST, steps, dtype=torch.float64, device=device)
        index = torch.arange(steps - 1, -1, -1, dtype=torch.float64, device=device)
        places = index * ((total - 1) / max(1, steps - 1)) if steps > 1 else index + total - 1
        return (places.round() + 1) / total

    def count(self, kernel: VectorKernel, steps: int | None) -> int:
        """Return the number of steps of a run: ``steps``, or that of the Config for None.

        Raises:
            UserError: There are more steps than the process has.
        """
        total, taken = kernel.steps, steps or self.config.steps
        if total is not None and taken > total:
            raise UserError(
                f"sample: {taken:,} steps are more than the {total:,} of the process: take at most {total:,}"
            )
        return taken

    @abstractmethod
    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        """Advance ``walk`` from noise to clean vectors.

        Args:
            walk: The vectors and the operations on them.
            times: Times at which the network is evaluated, float64 [steps], decreasing.
        """

    @torch.no_grad()
    def run(self, denoise: Denoiser, settings: VectorWalkSettings, *, steps: int | None = None) -> Tensor:
        """Generate rows of tokens.

        Args:
            denoise: The network.
            settings: The process, and the conditions on the rows.
            steps: Number of steps, at least 1; None: the number in the Config.

        Returns:
            The rows, int64 [b, l].

        Raises:
            UserError: There are more steps than the process has, or outputs of the network are not finite.
        """
        walk = VectorWalk(denoise, settings, clamp=self.config.clamp)
        self.walk(walk, self.times(walk, self.count(settings.kernel, steps)))
        rows = walk.rounded()
        self.evaluations = denoise.evaluations
        return rows


def reverse(walk: VectorWalk, estimate: Estimate, s: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return mean [b, l, d] and variance float64 [b] of the model's reverse step p(x_s | x_t).

    Args:
        walk: The vectors x_t.
        estimate: The network's estimate at x_t.
        s: Time after the step, float64 [b]; None: clean vectors, for which the variance is None.
        t: Current time, float64 [b].
    """
    sigma = walk.sigma(t)
    lower = torch.zeros_like(sigma) if s is None else walk.sigma(s)
    mean = posterior(lower, sigma).mean(estimate.x0, walk.x)
    return mean, None if s is None else walk.kernel.reverse_variance(lower, sigma, walk.schedule)
