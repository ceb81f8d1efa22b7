"""The interface of samplers of strings, and the state of a sampling run: strings between noise and text.

A :class:`StringWalk` evaluates the network, applies edits, protects given text and counts. Axes: b rows, w positions (the start
state first), v data tokens, k kinds of edits (insertions first).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import Kernel_, StringKernel, StringObjective
from sedd_graph.diffusion.strings.strings import Strings, rebuild
from sedd_graph.diffusion.tokens.walk import ROUNDING

__all__ = ["OnStringStep", "StringRates", "StringSampler", "StringSettings", "StringWalk"]

StringRates = Callable[[Strings, Tensor], Mapping[str, Tensor]]
"""``rates(strings, sigma [b])`` returns the network's outputs, such as ``log_insert`` [b, w, v], ``log_delete`` [b, w] and
``log_substitute`` [b, w, v]."""
OnStringStep = Callable[[int, Strings], None]
"""Called with the number of each step and the strings after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringSettings(Generic[Kernel_]):
    """The process that a walk of strings reverses, and the limits of its edits.

    Attributes:
        fixed: bool [b, w], True for tokens that may be neither deleted nor replaced.
        shut: bool [b, w], True where nothing may be inserted behind the position.
        longest: Largest number of tokens of a string.
        kernel: The forward process of a string.
        schedule: Total noise as a function of time.
        generator: Source of all random numbers, on the device of the strings.
        allowed: bool [v], tokens that may be inserted; None: all.
        on_step: Called after each step.
    """

    fixed: Tensor
    shut: Tensor
    longest: int
    kernel: Kernel_
    schedule: Schedule
    generator: torch.Generator
    allowed: Tensor | None = None
    on_step: OnStringStep | None = None


class StringWalk(Generic[Kernel_]):
    """Strings between noise and text.

    Attributes:
        strings: The strings.
        fixed: bool [b, w], True for tokens that may be neither deleted nor replaced.
        shut: bool [b, w], True where nothing may be inserted behind the position.
        evaluations: Rows evaluated by the network so far.
        clamped: Probabilities above 1 so far.
        cut: Insertions so far that would have made a string longer than ``longest``, and were dropped.
    """

    def __init__(self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_]) -> None:
        self.strings, self.fixed, self.shut, self.longest = strings, settings.fixed, settings.shut, settings.longest
        self.kernel, self.schedule = settings.kernel, settings.schedule
        self.generator, self.allowed = settings.generator, settings.allowed
        self.evaluations = self.clamped = self.cut = self._steps = 0
        self._rates, self._on_step = rates, settings.on_step
        self.end_step()

    @property
    def rows(self) -> int:
        """Number of strings, b."""
        return len(self.fixed)

    def full(self, value: float) -> Tensor:
        """Return ``value`` for each row, float64 [b]."""
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.fixed.device)

    def end_step(self) -> None:
        """End a step: report the strings to the callback."""
        if self._on_step is not None:
            self._on_step(self._steps, self.strings)
        self._steps += 1

    def outputs(self, sigma: Tensor) -> Mapping[str, Tensor]:
        """Return the network's outputs for the current strings at total noise ``sigma`` [b]."""
        self.evaluations += self.rows
        return self._rates(self.strings, sigma.float())

    def rand(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float64."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def insertions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the network's weight of each insertion, float32 [b, w, v]; 0 for those that are not permitted."""
        weights = outputs["log_insert"].float().exp() * (self.strings.attend & ~self.shut)[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def _free(self) -> Tensor:
        """Return the tokens that may be deleted or replaced, bool [b, w]."""
        token = self.strings.attend & ~self.fixed
        token[:, 0] = False
        return token

    def deletions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the probability that each token is noise, float32 [b, w]; 0 for fixed tokens and without ``log_delete``."""
        if "log_delete" not in outputs:
            return torch.zeros_like(self.fixed, dtype=torch.float32)
        return outputs["log_delete"].float().exp() * self._free()

    def substitutions(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return the probability of each substitution, float32 [b, w, v]; 0 for those not permitted; None without ``log_substitute``."""
        if "log_substitute" not in outputs:
            return None
        weights = outputs["log_substitute"].float().exp() * self._free()[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def write(self, where: Tensor, weights: Tensor) -> None:
        """Replace the tokens at ``where`` bool [b, w] by draws from ``weights`` [replaced, v]."""
        if bool(where.any()):
            tokens = self.strings.tokens.clone()
            tokens[where] = categorical(weights, generator=self.generator)
            self.strings = dataclasses.replace(self.strings, tokens=tokens)

    def fitting(self, follow: Tensor, gone: Tensor) -> Tensor:
        """Limit insertions to the room that a string has; the rightmost are dropped, and counted in ``cut``.

        Args:
            follow: int64 [b, w], number of new tokens in each gap.
            gone: bool [b, w], tokens that are deleted in the same step.

        Returns:
            int64 [b, w].
        """
        room = self.longest + 1 - (self.strings.attend & ~gone).sum(-1, keepdim=True)
        fits = follow.minimum((room - (follow.cumsum(-1) - follow)).clamp(min=0))
        self.cut += int((follow - fits).sum())
        return fits

    def rewrite(self, follow: Tensor, new: Callable[[Tensor], Tensor], gone: Tensor) -> None:
        """Delete the tokens ``gone`` bool [b, w] and insert ``follow`` new ones in each gap, as :func:`rebuild` does."""
        strings, base = self.strings, self.kernel.states
        marked = strings.tokens + base * (self.fixed + 2 * self.shut)
        made = rebuild(marked, strings.attend & ~gone, follow, new, start=self.kernel.start)
        flags = made.tokens // base
        self.strings = Strings(made.tokens % base, made.attend)
        self.fixed, self.shut = flags % 2 == 1, flags >= 2

    def edit(
        self, put: Tensor, weights: Tensor, gone: Tensor, swap: Tensor | None = None, others: Tensor | None = None
    ) -> None:
        """Substitute, delete and insert.

        Args:
            put: bool [b, w], gaps that get one token each.
            weights: Weights of the inserted tokens, [b, w, v].
            gone: bool [b, w], tokens to delete.
            swap: bool [b, w], tokens to replace.
            others: Weights of their replacements, [b, w, v].
        """
        if swap is not None and others is not None:
            self.write(swap, others[swap])
        fits = self.fitting(put.long(), gone)
        new = torch.zeros_like(self.strings.tokens)
        if bool(fits.any()):
            new[fits > 0] = categorical(weights[fits > 0], generator=self.generator)
        self.rewrite(fits, lambda place: new.gather(1, place), gone)

    def leap(self, outputs: Mapping[str, Tensor], chances: Tensor) -> None:
        """Take one step in which all gaps and tokens are edited independently.

        A gap gets at most one token; a token is deleted, or replaced, or stays. Probabilities above 1 are clamped and counted.

        Args:
            outputs: The network's outputs.
            chances: Factors of the probabilities, [b, k] (:meth:`StringKernel.leap`).
        """
        weights, others = self.insertions(outputs), self.substitutions(outputs)
        put = (chances[:, :1] * weights.sum(-1)).double()
        gone = (chances[:, 1:2] * self.deletions(outputs)).double()
        swap = torch.zeros_like(gone) if others is None else (chances[:, 2:] * others.sum(-1)).double()
        either = gone + swap
        self.clamped += int(((put > 1 + ROUNDING) | (either > 1 + ROUNDING)).sum())
        gone, either = (x / either.clamp(min=1) for x in (gone, either))
        shape = tuple(put.shape)
        entering, leaving = self.rand(*shape) < put, self.rand(*shape)
        self.edit(entering, weights, leaving < gone, (leaving >= gone) & (leaving < either), others)


class StringSampler(Component, ABC, Generic[Kernel_]):
    """Generates strings from noise by edits. Generic in the kernels that it supports."""

    abstract: ClassVar[bool] = True
    clamped: int = 0
    """Probabilities of the last run that were above 1."""
    cut: int = 0
    """Insertions of the last run that would have made a string too long."""
    evaluations: int = 0
    """Rows that the network evaluated in the last run."""

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        """Return the kind of kernel or objective that the sampler needs, in words; None if both are suitable."""
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps; None for a sampler whose number of evaluations is random."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: StringWalk[Kernel_], steps: int) -> None:
        """Take ``walk`` from noise to clean strings. ``steps`` is 0 for a sampler without a number of steps."""

    @torch.no_grad()
    def run(
        self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_], *, steps: int | None = None
    ) -> Strings:
        """Generate clean strings.

        Args:
            rates: Evaluates the network.
            strings: Noise, or given text.
            settings: The process and the limits of edits.
            steps: Number of steps; by default that of the Config.
        """
        walk = StringWalk(rates, strings, settings)
        self.walk(walk, steps or self.steps or 0)
        self.clamped, self.cut, self.evaluations = walk.clamped, walk.cut, walk.evaluations
        return walk.strings
