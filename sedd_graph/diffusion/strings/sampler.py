"""Samplers of strings that grow and shrink: the interface, and the walk that every one of them takes its edits on.

An :class:`StringWalk` holds the strings on their way and what all samplers share: asking the network, editing, what may not
be touched, counting. Axes: b rows, w positions (the start state first), v data tokens.
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

__all__ = ["OnStringStep", "StringRates", "StringSampler", "StringWalk"]

StringRates = Callable[[Strings, Tensor], Mapping[str, Tensor]]
"""``rates(strings, sigma [b])`` gives what the heads say: ``log_insert`` [b, w, v], and where the kernel has them ``log_delete`` [b, w]
and ``log_substitute`` [b, w, v]."""
OnStringStep = Callable[[int, Strings], None]
"""Called with the number of the step and the strings after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringSettings(Generic[Kernel_]):
    """The process that a walk of strings reverses, and what it may change.

    ``fixed`` tokens stay and ``shut`` gaps take no insertion, bool [b, w]. A string has at most ``longest`` tokens; ``allowed``
    bool [v] are the tokens that may be inserted (None: all). ``on_step`` is called after each step.
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
    """Strings on their way from noise to text, with their ``fixed`` tokens and ``shut`` gaps, bool [b, w].

    ``evaluations`` counts rows evaluated by the network, ``clamped`` probabilities above 1, ``cut`` insertions for which a
    string had no room.
    """

    def __init__(self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_]) -> None:
        self.strings, self.fixed, self.shut, self.longest = strings, settings.fixed, settings.shut, settings.longest
        self.kernel, self.schedule = settings.kernel, settings.schedule
        self.generator, self.allowed = settings.generator, settings.allowed
        self.evaluations = self.clamped = self.cut = self._steps = 0
        self._rates, self._on_step = rates, settings.on_step
        self.shown()

    @property
    def rows(self) -> int:
        return len(self.fixed)

    def full(self, value: float) -> Tensor:
        """float64 [b]."""
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.fixed.device)

    def shown(self) -> None:
        """A step is over: tell who looks on."""
        if self._on_step is not None:
            self._on_step(self._steps, self.strings)
        self._steps += 1

    def outputs(self, sigma: Tensor) -> Mapping[str, Tensor]:
        """What the heads say of the strings as they are, at total noise ``sigma`` [b]."""
        self.evaluations += self.rows
        return self._rates(self.strings, sigma.float())

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def insertions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """What the head says, as weights [b, w, v]: 0 where nothing may be put in."""
        weights = outputs["log_insert"].float().exp() * (self.strings.attend & ~self.shut)[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def deletions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Chances [b, w] that a token was born: 0 where none may go."""
        if "log_delete" not in outputs:
            return torch.zeros_like(self.fixed, dtype=torch.float32)
        token = self.strings.attend & ~self.fixed
        token[:, 0] = False
        return outputs["log_delete"].float().exp() * token

    def substitutions(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Chances [b, w, v] that a token is to become another: 0 where none may; None where noise replaces nothing."""
        if "log_substitute" not in outputs:
            return None
        token = self.strings.attend & ~self.fixed
        token[:, 0] = False
        weights = outputs["log_substitute"].float().exp() * token[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def write(self, where: Tensor, weights: Tensor) -> None:
        """Let the tokens ``where`` bool [b, w] become others, drawn from ``weights`` [here, v], one row for each."""
        if bool(where.any()):
            tokens = self.strings.tokens.clone()
            tokens[where] = categorical(weights, generator=self.generator)
            self.strings = dataclasses.replace(self.strings, tokens=tokens)

    def fitting(self, follow: Tensor, gone: Tensor) -> Tensor:
        """How many of ``follow`` int64 [b, w] new tokens find room when the tokens ``gone`` bool [b, w] are out. The others are
        left out, from the right, and counted."""
        room = self.longest + 1 - (self.strings.attend & ~gone).sum(-1, keepdim=True)
        fits = follow.minimum((room - (follow.cumsum(-1) - follow)).clamp(min=0))
        self.cut += int((follow - fits).sum())
        return fits

    def rewrite(self, follow: Tensor, new: Callable[[Tensor], Tensor], gone: Tensor) -> None:
        """Take the tokens ``gone`` out and put ``follow`` new ones behind each place, as :func:`rebuild` does."""
        strings, base = self.strings, self.kernel.states
        marked = strings.tokens + base * (self.fixed + 2 * self.shut)
        made = rebuild(marked, strings.attend & ~gone, follow, new, start=self.kernel.start)
        flags = made.tokens // base
        self.strings = Strings(made.tokens % base, made.attend)
        self.fixed, self.shut = flags % 2 == 1, flags >= 2

    def edit(
        self, put: Tensor, weights: Tensor, gone: Tensor, swap: Tensor | None = None, others: Tensor | None = None
    ) -> None:
        """Put a token drawn from ``weights`` [b, w, v] into the gaps ``put``, take the tokens ``gone`` out, and let those of
        ``swap`` become one drawn from ``others`` [b, w, v]; all bool [b, w]."""
        if swap is not None and others is not None:
            self.write(swap, others[swap])
        fits = self.fitting(put.long(), gone)
        new = torch.zeros_like(self.strings.tokens)
        if bool(fits.any()):
            new[fits > 0] = categorical(weights[fits > 0], generator=self.generator)
        self.rewrite(fits, lambda place: new.gather(1, place), gone)

    def leap(self, outputs: Mapping[str, Tensor], chances: Tensor) -> None:
        """Every gap and token by itself, with ``chances`` [b, k] for heads that say 1; those above 1 are counted. A token
        goes, or is replaced, or stays."""
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
    """Noise to text by insertions and deletions. ``clamped`` counts chances above 1, ``cut`` insertions that found no room."""

    abstract: ClassVar[bool] = True
    clamped: int = 0
    cut: int = 0
    evaluations: int = 0

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        """What it needs and does not find in either, in words; None where nothing is missing."""
        return None

    @property
    def steps(self) -> int | None:
        """How many steps the Config asks for; None where that is no choice."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: StringWalk[Kernel_], steps: int) -> None:
        """Take ``walk`` from noise to clean strings; ``steps`` is 0 for a sampler that has none."""

    @torch.no_grad()
    def run(
        self, rates: StringRates, strings: Strings, settings: StringSettings[Kernel_], *, steps: int | None = None
    ) -> Strings:
        """Sample clean strings from noisy ones."""
        walk = StringWalk(rates, strings, settings)
        self.walk(walk, steps or self.steps or 0)
        self.clamped, self.cut, self.evaluations = walk.clamped, walk.cut, walk.evaluations
        return walk.strings
