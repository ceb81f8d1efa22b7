"""The interface of samplers of strings, and the state of a sampling run.

A :class:`StringWalk` stores strings between noise and text. It evaluates the network, applies edits, leaves given
tokens unchanged, and counts evaluations. Axes: b rows, w positions (the BOS token first), v data tokens, k kinds of
edits (insertions first).
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
from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.confidence import StringConfidences
from sedd_graph.diffusion.strings.kernel import Kernel_, StringKernel, StringObjective
from sedd_graph.diffusion.strings.strings import Strings, rebuild
from sedd_graph.diffusion.tokens.sampler import chosen_steps
from sedd_graph.diffusion.tokens.walk import ROUNDING, T_MIN

__all__ = ["OnStringStep", "StringRates", "StringSampler", "StringSettings", "StringWalk"]

StringRates = Callable[[Strings, Tensor], Mapping[str, Tensor]]
"""Type of the functions ``rates(strings, sigma)`` that evaluate the network at total noise ``sigma`` [b].

They return outputs by name, such as ``log_insert`` [b, w, v], ``log_delete`` [b, w] and ``log_substitute`` [b, w, v].
"""
OnStringStep = Callable[[int, Strings], None]
"""Type of the callbacks ``on_step(index, strings)`` of a sampling run.

They are called with 0 and the initial strings, and after each step with the step's index, from 1, and the strings.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringSettings(Generic[Kernel_]):
    """Settings of a sampling run: the process to reverse, and the permitted edits.

    Attributes:
        fixed: bool [b, w], tokens that are neither deleted nor replaced.
        shut: bool [b, w], positions behind which nothing is inserted.
        longest: Largest number of tokens of a string.
        kernel: The forward process.
        schedule: Total noise as a function of time.
        generator: Random number generator on the device of the strings.
        allowed: bool [v], tokens that may be inserted; None: all.
        one_length: True if every string must have ``longest`` tokens.
        on_step: Callback after each step; None: no callback.
        on_confidence: Callback before ``on_step`` with the step's index and the probability that the network gave to each token
            among the tokens that it was drawn from, float32 [b, w]; NaN at tokens that were not drawn. None: no callback.
    """

    fixed: Tensor
    shut: Tensor
    longest: int
    kernel: Kernel_
    schedule: Schedule
    generator: torch.Generator
    allowed: Tensor | None = None
    one_length: bool = False
    on_step: OnStringStep | None = None
    on_confidence: Callable[[int, Tensor], None] | None = None


class StringWalk(Generic[Kernel_]):
    """The state of a sampling run: strings between noise and text.

    Args:
        rates: Evaluates the network.
        strings: Initial strings.
        settings: The process, and the permitted edits.

    Attributes:
        strings: The current strings.
        fixed: bool [b, w], tokens that are neither deleted nor replaced.
        shut: bool [b, w], positions behind which nothing is inserted.
        evaluations: Number of rows evaluated by the network so far, summed over calls.
        clamped: Number of edit probabilities above 1 so far, which were clamped.
        cut: Number of insertions so far that were dropped, since a string would have exceeded ``longest`` tokens.
    """

    def __init__(self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_]) -> None:
        self.strings, self.fixed, self.shut, self.longest = strings, settings.fixed, settings.shut, settings.longest
        self.kernel, self.schedule = settings.kernel, settings.schedule
        self.generator, self.allowed = settings.generator, settings.allowed
        self.evaluations = self.clamped = self.cut = self._steps = 0
        self._rates, self._on_step, self._check = rates, settings.on_step, OutputCheck(settings.fixed.device)
        told = settings.on_confidence
        self._sure = None if told is None else StringConfidences(strings.tokens, told)
        self.end_step()

    @property
    def rows(self) -> int:
        """Number of strings, b."""
        return len(self.fixed)

    def full(self, value: float) -> Tensor:
        """Return a vector with ``value`` for each row, float64 [b]."""
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.fixed.device)

    def end_step(self) -> None:
        """End a step: call the callbacks with the current strings and their confidences."""
        if self._sure is not None:
            self._sure.end_step(self._steps)
        if self._on_step is not None:
            self._on_step(self._steps, self.strings)
        self._steps += 1

    def outputs(self, sigma: Tensor) -> Mapping[str, Tensor]:
        """Return the network's outputs by name for the current strings.

        Args:
            sigma: Total noise, [b].
        """
        self.evaluations += self.rows
        outputs = self._rates(self.strings, sigma.float())
        tokens, attend = self.strings.tokens, self.strings.attend
        # clean tokens are predicted at symbols that stand for one, such as a mask
        masks = attend & (tokens >= self.kernel.data_tokens) & (tokens != self.kernel.start)
        self._check.add(outputs, attend, masks)
        return outputs

    def read(self, flag: Tensor) -> bool:
        """Copy a boolean scalar from the device to the host and return it, verifying the network's outputs so far.

        The result of this verification is on the device, too; one transfer copies both.

        Args:
            flag: bool [].

        Raises:
            UserError: An output of the network was not finite, or a distribution did not sum to 1.
        """
        return bool(self._check.read(flag)[0])

    def check_outputs(self) -> None:
        """Verify the network's outputs so far, which waits for the device.

        Raises:
            UserError: An output was not finite, or a distribution did not sum to 1.
        """
        self._check.read()

    def rand(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float64 of shape ``[*shape]``."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def insertions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return ``exp(log_insert)``, the network's weight of inserting each token behind each position.

        The weight is 0 where the insertion is not permitted.

        Args:
            outputs: The network's outputs by name.

        Returns:
            float32 [b, w, v].
        """
        weights = outputs["log_insert"].float().exp() * (self.strings.attend & ~self.shut)[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def _free(self) -> Tensor:
        """Return the tokens that may be deleted or replaced, bool [b, w]."""
        token = self.strings.attend & ~self.fixed
        token[:, 0] = False
        return token

    def deletions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return ``exp(log_delete)``, the network's probability that each token is noise; 0 for fixed tokens.

        All entries are 0 if ``log_delete`` is not an output of the network.

        Args:
            outputs: The network's outputs by name.

        Returns:
            float32 [b, w].
        """
        if "log_delete" not in outputs:
            return torch.zeros_like(self.fixed, dtype=torch.float32)
        return outputs["log_delete"].float().exp() * self._free()

    def substitutions(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return ``exp(log_substitute)``, the network's weight of replacing each token by each other one.

        The weight is 0 where the substitution is not permitted.

        Args:
            outputs: The network's outputs by name.

        Returns:
            float32 [b, w, v]; None if ``log_substitute`` is not an output.
        """
        if "log_substitute" not in outputs:
            return None
        weights = outputs["log_substitute"].float().exp() * self._free()[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def write(self, where: Tensor, weights: Tensor) -> None:
        """Replace tokens by tokens sampled from given weights.

        Args:
            where: bool [b, w], the r tokens to replace.
            weights: Weights of the new tokens, [r, v], not normalised.
        """
        if self.read(where.any()):
            tokens = self.strings.tokens.clone()
            tokens[where] = drawn = categorical(weights, generator=self.generator)
            if self._sure is not None:
                self._sure.written(where, weights, drawn)
            self.strings = dataclasses.replace(self.strings, tokens=tokens)

    def fitting(self, follow: Tensor, gone: Tensor) -> Tensor:
        """Reduce the numbers of insertions so that no string exceeds ``longest`` tokens.

        The rightmost insertions are dropped, and counted in ``cut``.

        Args:
            follow: int64 [b, w], number of new tokens to insert behind each position.
            gone: bool [b, w], tokens that are deleted in the same step.

        Returns:
            The reduced numbers, int64 [b, w].

        Raises:
            UserError: An output of the network was not finite, or a distribution did not sum to 1.
        """
        room = self.longest + 1 - (self.strings.attend & ~gone).sum(-1, keepdim=True)
        fits = follow.minimum((room - (follow.cumsum(-1) - follow)).clamp(min=0))
        self.cut += int(self._check.read((follow - fits).sum())[0])  # one transfer for both
        return fits

    def rewrite(self, follow: Tensor, new: Callable[[Tensor], Tensor], gone: Tensor) -> None:
        """Delete and insert tokens in the current strings.

        Args:
            follow: int64 [b, w], number of new tokens to insert behind each position.
            new: Function that chooses the new tokens, ``tokens = new(place)``, both int64 [b, width] over the positions
                of the resulting strings. If position i of the result is a new token, ``place[:, i]`` is the current
                position behind which it is inserted. ``tokens`` is ignored at all other positions.
            gone: bool [b, w], tokens to delete.
        """
        strings, base = self.strings, self.kernel.states
        marked = strings.tokens + base * (self.fixed + 2 * self.shut)
        keep = strings.attend & ~gone
        if self._sure is not None:
            places = torch.arange(marked.shape[1], device=marked.device).expand_as(marked)
            origin = rebuild(places, keep, follow, lambda place: place + marked.shape[1], start=0).tokens
        made = rebuild(marked, keep, follow, new, start=self.kernel.start)
        flags = made.tokens // base
        self.strings = Strings(made.tokens % base, made.attend)
        self.fixed, self.shut = flags % 2 == 1, flags >= 2
        if self._sure is not None:
            self._sure.moved(origin, made.attend)

    def edit(
        self, put: Tensor, weights: Tensor, gone: Tensor, swap: Tensor | None = None, others: Tensor | None = None
    ) -> None:
        """Substitute, delete and insert tokens in the current strings.

        Args:
            put: bool [b, w], positions behind which one token is inserted.
            weights: Weights of the inserted tokens, [b, w, v], not normalised.
            gone: bool [b, w], tokens to delete.
            swap: bool [b, w], tokens to replace; None: no substitutions.
            others: Weights of the replacement tokens, [b, w, v], not normalised; None: no substitutions.
        """
        if swap is not None and others is not None:
            self.write(swap, others[swap])
        fits = self.fitting(put.long(), gone)
        new = torch.zeros_like(self.strings.tokens)
        if bool(fits.any()):
            new[fits > 0] = drawn = categorical(weights[fits > 0], generator=self.generator)
            if self._sure is not None:
                self._sure.inserting(fits > 0, weights[fits > 0], drawn)
        self.rewrite(fits, lambda place: new.gather(1, place), gone)

    def leap(self, outputs: Mapping[str, Tensor], chances: Tensor) -> None:
        """Take one step in which all positions are edited independently (tau-leaping).

        At most one token is inserted behind each position; a token is deleted, replaced or unchanged. Probabilities
        above 1 are clamped and counted in ``clamped``.

        Args:
            outputs: The network's outputs by name.
            chances: Factor of each of the k kinds of edits (insertion, deletion and, if k = 3, substitution), [b, k],
                from :meth:`StringKernel.leap`. The probability of an edit is its factor times the exponential of the
                network's output for it.
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

    def insert_one(self, sigma: Tensor) -> bool:
        """Insert one token into each string that has fewer than ``longest``, in proportion to the network's rates.

        Args:
            sigma: Total noise that is passed to the network, [b].

        Returns:
            True if a token was inserted; False if all strings are full, or may not be inserted into.
        """
        room = self.strings.lengths < self.longest
        if not self.read(room.any()):
            return False
        weights = self.insertions(self.outputs(sigma))
        each = weights.sum(-1)
        going = room & (each.sum(-1) > 0)
        if not self.read(going.any()):
            return False
        chosen = torch.zeros_like(self.strings.lengths)
        chosen[going] = categorical(each[going], generator=self.generator)
        put = torch.zeros_like(self.fixed).scatter_(1, chosen[:, None], going[:, None])
        self.edit(put, weights, torch.zeros_like(put))
        self.end_step()
        return True

    def complete(self) -> None:
        """Insert one token at a time until every string has ``longest`` tokens, or admits no insertion.

        Each token is drawn in proportion to the network's insertion rates. For objectives that require strings of one
        length: under them the rates do not depend on time, so the inserted tokens have the model's distribution given
        the tokens present.
        """
        sigma = self.schedule.sigma(self.full(T_MIN))
        while self.insert_one(sigma):
            pass


class StringSampler(Component, ABC, Generic[Kernel_]):
    """A sampler of strings: generates clean strings from noise by edits. Generic in the kernels that it supports."""

    abstract: ClassVar[bool] = True
    clamped: int = 0
    """Number of edit probabilities in the last run that were above 1 and were clamped."""
    cut: int = 0
    """Number of insertions dropped in the last run, since a string would have exceeded its largest length."""
    evaluations: int = 0
    """Number of rows that the network evaluated in the last run, summed over steps."""
    fixed: Tensor
    """True at the BOS token and the given tokens in the result of the last run, bool [b, w]."""

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        """Return a description of the kernel or objective that the sampler requires; None if both are suitable."""
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps; None for a sampler whose number of network evaluations is random."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: StringWalk[Kernel_], steps: int) -> None:
        """Advance ``walk`` from noise to clean strings.

        Args:
            walk: The strings and the operations on them.
            steps: Number of steps; 0 for a sampler without a number of steps.
        """

    @torch.no_grad()
    def run(
        self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_], *, steps: int | None = None
    ) -> Strings:
        """Generate clean strings.

        Args:
            rates: Evaluates the network.
            strings: Initial strings: noise, or given tokens.
            settings: The process, and the permitted edits.
            steps: Number of steps, at least 1; None: the number in the Config.

        Raises:
            UserError: ``steps`` is below 1, or is given and the sampler has no number of steps; or outputs of the
                network are not finite or not normalised.
        """
        taken = chosen_steps(steps, self.steps)
        walk = StringWalk(rates, strings, settings)
        self.walk(walk, taken)
        if settings.one_length:  # steps of at most one token in each gap can leave some missing
            walk.complete()
        walk.check_outputs()
        self.clamped, self.cut, self.evaluations = walk.clamped, walk.cut, walk.evaluations
        self.fixed = walk.fixed
        return walk.strings
