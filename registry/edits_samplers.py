"""Samplers of strings that grow and shrink: steps in time, thinning (exact), and first hitting (exact at a known length).

Axes: b rows, w positions (the start state first), v data tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component import ComponentConfig
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.edits import EditKernel, EditObjective, EditRates, EditSampler, OnEdit, Strings, rebuild
from sedd_graph.diffusion.process import Schedule

__all__ = ["EditFirstHitting", "EditTau", "EditThinning"]

END = 1e-5
"""Total noise at which thinning gives way to one last step to clean text."""


@dataclasses.dataclass
class _Way:
    """Strings on their way, with what may not be touched: ``fixed`` tokens and ``shut`` gaps, bool [b, w]."""

    strings: Strings
    fixed: Tensor
    shut: Tensor
    longest: int
    kernel: EditKernel
    generator: torch.Generator
    allowed: Tensor | None
    cut: int = 0

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def insertions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """What the head says, as weights [b, w, v]: 0 where nothing may be put in."""
        weights = outputs["log_insert"].float().exp() * (self.strings.attend & ~self.shut)[..., None]
        return weights if self.allowed is None else weights * self.allowed

    def deletions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Chances [b, w] that a token was born: 0 where none may go."""
        if not self.kernel.births:
            return torch.zeros_like(self.fixed, dtype=torch.float32)
        token = self.strings.attend & ~self.fixed
        token[:, 0] = False
        return outputs["log_delete"].float().exp() * token

    def edit(self, put: Tensor, weights: Tensor, gone: Tensor) -> None:
        """Put a token drawn from ``weights`` [b, w, v] into the gaps ``put``, and take the tokens ``gone`` out, both
        bool [b, w]. What finds no room is left out, from the right, and counted."""
        strings, base = self.strings, self.kernel.states
        keep = strings.attend & ~gone
        room = self.longest + 1 - keep.sum(-1, keepdim=True)
        fits = put & (put.cumsum(-1) <= room)
        self.cut += int((put & ~fits).sum())
        new = torch.zeros_like(strings.tokens)
        if bool(fits.any()):
            new[fits] = categorical(weights[fits], generator=self.generator)
        marked = strings.tokens + base * (self.fixed + 2 * self.shut)
        made = rebuild(marked, keep, fits.long(), lambda place: new.gather(1, place), start=self.kernel.start)
        flags = made.tokens // base
        self.strings = Strings(made.tokens % base, made.attend)
        self.fixed, self.shut = flags % 2 == 1, flags >= 2

    def leap(self, outputs: Mapping[str, Tensor], chances: Tensor) -> int:
        """Every gap and token by itself, with ``chances`` [b, 2] for heads that say 1. Returns how many were above 1."""
        weights = self.insertions(outputs)
        put = chances[:, :1] * weights.sum(-1)
        gone = chances[:, 1:] * self.deletions(outputs)
        over = int(((put > 1 + 1e-4) | (gone > 1 + 1e-4)).sum())
        shape = tuple(put.shape)
        self.edit(self.rand(*shape) < put.double(), weights, self.rand(*shape) < gone.double())
        return over


class _Sampler(EditSampler):
    """What the samplers have in common: the way, and the account of it."""

    def begin(
        self,
        strings: Strings,
        fixed: Tensor,
        shut: Tensor,
        longest: int,
        kernel: EditKernel,
        generator: torch.Generator,
        allowed: Tensor | None,
    ) -> _Way:
        self.clamped, self.evaluations = 0, 0
        return _Way(strings, fixed, shut, longest, kernel, generator, allowed)

    def end(self, way: _Way) -> Strings:
        self.cut = way.cut
        return way.strings


class EditTau(_Sampler, kind="edit_sampler"):
    """Steps of even length in time: in each, every gap takes at most one token and every token may go (tau-leaping; for
    ``delete`` Tweedie's step, DID, arXiv 2603.23507). A last step goes all the way to clean text."""

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128

    @property
    def steps(self) -> int | None:
        found: int = self.config.steps
        return found

    @torch.no_grad()
    def run(
        self,
        rates: EditRates,
        strings: Strings,
        *,
        fixed: Tensor,
        shut: Tensor,
        longest: int,
        kernel: EditKernel,
        schedule: Schedule,
        generator: torch.Generator,
        steps: int | None = None,
        allowed: Tensor | None = None,
        on_step: OnEdit | None = None,
    ) -> Strings:
        count = steps or self.config.steps
        way = self.begin(strings, fixed, shut, longest, kernel, generator, allowed)
        times = torch.linspace(1.0, self.T_MIN, count + 1, device=fixed.device, dtype=torch.float64)
        levels = torch.cat([schedule.sigma(times), times.new_zeros(1)])
        if on_step:
            on_step(0, strings)
        for index in range(count + 1):
            now, after = (levels[i].expand(len(fixed)) for i in (index, index + 1))
            outputs = rates(way.strings, now.float())
            self.evaluations += len(fixed)
            self.clamped += way.leap(outputs, kernel.leap(now, after).float())
            if on_step:
                on_step(index + 1, way.strings)
        return self.end(way)


class EditThinning(_Sampler, kind="edit_sampler"):
    """One edit at a time, at the times of the reverse process itself: exact for the model's rates (thinning: Lewis and Shedler
    1979; uniformization, arXiv 2402.08095).

    Edits are proposed at ``slack`` times the present rate, and kept with the chance that the rate at the proposed time is of
    that. ``clamped`` counts where it was more; where there are none, the law is that of the model.
    """

    class Config(ComponentConfig):
        slack: Annotated[float, pydantic.Field(gt=1, le=100)] = 2.0
        stretch: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
        """Share of the noise after which the network is asked anew, though nothing has happened."""

    @property
    def steps(self) -> int | None:
        return None

    @torch.no_grad()
    def run(
        self,
        rates: EditRates,
        strings: Strings,
        *,
        fixed: Tensor,
        shut: Tensor,
        longest: int,
        kernel: EditKernel,
        schedule: Schedule,
        generator: torch.Generator,
        steps: int | None = None,
        allowed: Tensor | None = None,
        on_step: OnEdit | None = None,
    ) -> Strings:
        way = self.begin(strings, fixed, shut, longest, kernel, generator, allowed)
        rows, device = len(fixed), fixed.device
        sigma = schedule.sigma(torch.ones(rows, device=device, dtype=torch.float64))
        proposed = torch.zeros(rows, dtype=torch.bool, device=device)
        bound = torch.ones(rows, dtype=torch.float64, device=device)
        number = 0
        if on_step:
            on_step(0, strings)
        while bool((sigma > END).any()):
            outputs = rates(way.strings, sigma.float())
            self.evaluations += rows
            weights, going = way.insertions(outputs), way.deletions(outputs).double()
            full = way.strings.lengths >= longest
            each = weights.sum(-1).double() * ~full[:, None]
            pace = kernel.weights(sigma)
            per_edit = torch.cat([each * pace[:, :1], going * pace[:, 1:]], 1)
            total = per_edit.sum(-1)
            self.clamped += int((proposed & (total > bound * (1 + 1e-9))).sum())
            happens = proposed & (way.rand(rows) * bound < total)
            # who has not just been changed draws the next time
            lower = (sigma * (1 - self.config.stretch)).clamp(min=END)
            ahead = kernel.weights(lower)
            highest = self.config.slack * (each.sum(-1) * ahead[:, 0] + going.sum(-1) * ahead[:, 1])
            wait = -torch.log1p(-way.rand(rows)) / highest.clamp(min=1e-300)
            # as the stretch ends before the edit, nothing happens in it
            reached = (sigma - wait > lower) & (sigma > END)
            still = ~happens
            sigma = torch.where(still, torch.where(reached, sigma - wait, lower), sigma)
            bound = torch.where(still & reached, highest, bound)
            proposed = still & reached
            if bool(happens.any()):
                chosen = torch.zeros(rows, dtype=torch.int64, device=device)
                chosen[happens] = categorical(per_edit[happens], generator=generator)
                hit = torch.zeros_like(per_edit, dtype=torch.bool).scatter_(1, chosen[:, None], happens[:, None])
                width = each.shape[1]
                way.edit(hit[:, :width], weights, hit[:, width:])
            number += 1
            if on_step:
                on_step(number, way.strings)
        outputs = rates(way.strings, sigma.float())
        self.evaluations += rows
        self.clamped += way.leap(outputs, kernel.leap(sigma, torch.zeros_like(sigma)).float())
        return self.end(way)


class EditFirstHitting(_Sampler, kind="edit_sampler"):
    """One token at a time, where and what both drawn from the rates, until the length is reached: exact where all strings have
    one length (``dice``), since rates then do not depend on time (DID; arXiv 2409.02908 for masks)."""

    class Config(ComponentConfig):
        pass

    def lacks(self, kernel: EditKernel, objective: EditObjective) -> str | None:
        return None if objective.one_length else "an objective for strings of one known length, such as dice"

    @property
    def steps(self) -> int | None:
        return None

    @torch.no_grad()
    def run(
        self,
        rates: EditRates,
        strings: Strings,
        *,
        fixed: Tensor,
        shut: Tensor,
        longest: int,
        kernel: EditKernel,
        schedule: Schedule,
        generator: torch.Generator,
        steps: int | None = None,
        allowed: Tensor | None = None,
        on_step: OnEdit | None = None,
    ) -> Strings:
        way = self.begin(strings, fixed, shut, longest, kernel, generator, allowed)
        share = -torch.expm1(-schedule.sigma(torch.ones(len(fixed), device=fixed.device, dtype=torch.float64)))
        if on_step:
            on_step(0, strings)
        for number in range(longest):
            left = longest - way.strings.lengths
            if not bool((left > 0).any()):
                break
            # the time of the next of `left` tokens, for a network that looks at it
            share = share * way.rand(len(fixed)) ** (1 / left.clamp(min=1))
            outputs = rates(way.strings, -torch.log1p(-share).float())
            self.evaluations += len(fixed)
            weights = way.insertions(outputs)
            each = weights.sum(-1)
            going = (left > 0) & (each.sum(-1) > 0)
            if not bool(going.any()):
                break
            chosen = torch.zeros(len(fixed), dtype=torch.int64, device=fixed.device)
            chosen[going] = categorical(each[going], generator=generator)
            put = torch.zeros_like(way.fixed).scatter_(1, chosen[:, None], going[:, None])
            way.edit(put, weights, torch.zeros_like(put))
            if on_step:
                on_step(number + 1, way.strings)
        return self.end(way)
