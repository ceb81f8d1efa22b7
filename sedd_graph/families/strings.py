"""The engine of a process that changes lengths: strings in, strings out.

It has the methods that training and evaluation call on any engine. Axes: b batch, w positions of a padded string (the
start state first), v data tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.strings.process import StringDraw, StringKernel, StringObjective, Strings
from sedd_graph.diffusion.strings.sampler import StringSampler
from sedd_graph.diffusion.tokens.process import Schedule
from sedd_graph.engine.engine import CompileMode, Engine, mix_seed
from sedd_graph.engine.regions import Model
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.graph.model import Graph

__all__ = ["StringEngine", "StringModule", "StringProcess", "make_string_process"]

HOLE = -1


class StringProcess(NamedTuple):
    """The four components of a process that changes lengths."""

    kernel: StringKernel
    schedule: Schedule
    objective: StringObjective[Any, Any]
    sampler: StringSampler[Any]


def make_string_process(plan: ProcessPlan, registry: Registry, *, states: int | None = None) -> StringProcess:
    """Build the process, for the declared number of states or (for a proof) another. Raises :class:`BlueprintError`."""
    context = Context({"n": states or plan.states})
    noise = registry.component(plan.kernel.contract.op)
    kernel = noise(plan.kernel.config if states is None else noise.toy(plan.kernel.config, states), context)
    schedule, objective, sampler = (
        registry.component(p.contract.op)(p.config, context) for p in (plan.schedule, plan.objective, plan.sampler)
    )
    problems = []
    name = plan.kernel.contract.name

    def refuse(key: str, message: str) -> None:
        problems.append(Problem("blueprint", 0, 0, key, message))

    if schedule.learned:
        refuse(
            "process.schedule",
            f"{plan.schedule.contract.name!r} learns from losses of rows of one length; take another schedule, such as loglinear",
        )
    for output in kernel.reads:
        if output not in plan.edits:
            refuse("process", f"{name!r} cannot be undone without the output {output}: give it, too")
    for output in plan.edits:
        if output not in kernel.reads:
            refuse("process", f"no one reads the output {output} where noise is {name!r}: leave it out")
    if (lack := objective.lacks(kernel)) is not None:
        refuse("objective", f"{plan.objective.contract.name!r} needs {lack}, not {name!r}")
    if (lack := sampler.lacks(kernel, objective)) is not None:
        refuse("sample", f"{plan.sampler.contract.name!r} needs {lack}")
    if problems:
        raise BlueprintError(problems)
    return StringProcess(kernel, schedule, objective, sampler)


class StringModule(nn.Module):
    """Network and objective in one: what is compiled, and what DDP wraps."""

    def __init__(self, model: Model, process: StringProcess) -> None:
        super().__init__()
        self.model = model
        self._process = process

    def forward(self, draw: StringDraw, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats per string [b], and the saved ports. ``key`` int32 [b] turns dropout on."""
        outputs, taps = self.model.run({"tokens": draw.xt, "sigma": draw.sigma, "attend": draw.attend}, key)
        with full_precision(draw.xt):
            return self._process.objective.loss(outputs, draw, self._process.kernel), taps


class StringEngine(Engine):
    """A compiled training and sampling engine for strings that change their length. Make one with :func:`sedd_graph.build`.

    ``cut`` counts the tokens of noisy strings that found no room in training so far.
    """

    def __init__(
        self,
        graph: Graph,
        registry: Registry,
        plan: ProcessPlan,
        *,
        device: torch.device,
        compile: CompileMode = "auto",
        forbidden: Iterable[int] = (),
        on_save: Callable[[Path], None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(graph, registry, None, device=device, compile="off", on_save=on_save, seed=seed)
        self.edits = make_string_process(plan, registry)
        for part in self.edits:
            part.to(device)
        self.edit_module = StringModule(self.model, self.edits)
        allowed = torch.ones(self.edits.kernel.data_tokens, dtype=torch.bool)
        allowed[[i for i in forbidden if i < len(allowed)]] = False
        self.allowed = allowed.to(device)
        self.cut = 0
        self.compile(compile)

    @property
    def caveat(self) -> str | None:
        return self.edits.objective.caveat(self.edits.kernel)

    @property
    def trained(self) -> nn.Module:
        return self.edit_module

    # -- training and evaluation ------------------------------------------------------------------------------------

    def draw(self, batch: Batch, *, random: Randomness, t: Tensor | None = None) -> StringDraw:  # type: ignore[override]
        """One draw of the forward process for ``batch``, with what the heads should say of it."""
        draw: StringDraw = self.edits.objective.corrupt(
            batch, self.edits.kernel, self.edits.schedule, random=random, t=t
        )
        self.cut += draw.cut
        return dataclasses.replace(draw, cut=0)  # what is compiled must not change with it

    def loss(self, x0: Tensor | Batch, *, t: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Nats per string, float32 [b], with gradients: one draw of the objective.

        ``x0`` is int64 [b, l] or a :class:`Batch`, in which rows are padded behind their text. ``t`` float32 [b] fixes
        the time: the value is then the integrand there. Randomness comes from torch's global generator.
        """
        batch = self._batch(x0)
        random = Randomness(torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ()))))
        draw = self.draw(batch, random=random, t=None if t is None else t.to(self.device))
        key = random.keys(len(batch)) if self.model.training else None
        loss: Tensor = self.edit_module(draw, batch, key)[0]
        return loss

    def _batch(self, x0: Tensor | Batch) -> Batch:
        batch = (x0 if isinstance(x0, Batch) else Batch.of(x0)).to(self.device)
        tokens, kernel = batch.tokens, self.edits.kernel
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise UserError(f"tokens must be int64 [batch, length], not {tokens.dtype} {list(tokens.shape)}")
        real = torch.where(batch.attend, tokens, 0)
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= kernel.data_tokens):
            raise UserError(
                f"tokens run from {int(real.min())} to {int(real.max())}; this model has {kernel.data_tokens} (0 to {kernel.data_tokens - 1})"
            )
        kept = batch.attend & ~batch.corrupt
        if not kernel.spares and bool(kept.any()):
            raise UserError("this kernel has no tokens that it spares: every token must be corrupted")
        for role, what in (
            (batch.attend, "padding must come behind the text"),
            (kept, "what is spared must come first"),
        ):
            if bool((role[:, 1:] & ~role[:, :-1]).any()):
                raise UserError(f"a batch of strings: {what}")
        return batch

    @torch.no_grad()
    def bound_rows(  # type: ignore[override]
        self,
        batch: Batch | Tensor,
        *,
        seed: int,
        draws: int = 1,
        on_draw: Callable[[StringObjective[Any, Any], StringDraw, Tensor], None] | None = None,
    ) -> Tensor:
        """The bound of each string, nats, float64 [b] on the CPU, averaged over ``draws``; evaluation mode.

        Strings are whole here, however long noise makes them. ``on_draw(objective, draw, nats [b])`` sees every draw.
        """
        batch = self._batch(batch)
        kernel, schedule, objective, _ = self.edits
        total = torch.zeros(len(batch), dtype=torch.float64)
        with self._evaluating():
            for number in range(draws):
                generator = torch.Generator(self.device).manual_seed(mix_seed(seed, number))
                draw = objective.bound_draw(batch, kernel, schedule, random=Randomness(generator))
                nats = self.edit_module(draw, batch)[0]
                total += nats.double().cpu()
                if on_draw is not None:
                    on_draw(objective, draw, nats)
        return total / draws

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(  # type: ignore[override]  # strings of their own lengths know no conditions on positions
        self,
        batch: int,
        length: int,
        *,
        steps: int | None = None,
        prompt: Tensor | None = None,
        seed: int | None = None,
        attend: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw ``batch`` strings of at most ``length`` tokens, int64 [b, longest of them] on the CPU, padded with the start
        state. With an objective for one length that is their length.

        ``prompt`` int64 [1, p] holds tokens that stay, and -1 where the model may write as much as it likes; elsewhere nothing
        is put in. The same ``seed`` gives the same strings on the same device. ``on_step(number, rows)`` sees every step,
        int64 [b, length]. Raises :class:`UserError`.
        """
        kernel, schedule, objective, sampler = self.edits
        if batch < 1 or length < 1:
            raise UserError(f"sample: batch and length must be at least 1, not {batch} and {length}")
        if steps is not None and (steps < 1 or sampler.steps is None):
            why = "at least 1" if sampler.steps is not None else "left out: this sampler draws its own times"
            raise UserError(f"sample: steps must be {why}, not {steps}")
        if attend is not None:
            raise UserError("sample: strings have no padding to hide: leave attend out")
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator(self.device).manual_seed(mix_seed(chosen))
        if prompt is None:
            strings = kernel.prior(batch, longest=length, generator=generator, allowed=self.allowed)
            fixed = torch.zeros_like(strings.attend)
            fixed[:, 0] = True
            shut = ~strings.attend
        else:
            strings, fixed, shut = self._prompt(prompt, batch, length)

        def rates(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
            found = self.model.run({"tokens": strings.tokens, "sigma": sigma, "attend": strings.attend})[0]
            return objective.rates(found, strings, length)

        def seen(number: int, strings: Strings) -> None:
            if on_step is not None:
                on_step(number, self._rows(strings, length))

        with self._evaluating():
            out = sampler.run(
                rates,
                strings,
                fixed=fixed,
                shut=shut,
                longest=length,
                kernel=kernel,
                schedule=schedule,
                generator=generator,
                steps=steps,
                allowed=self.allowed,
                on_step=seen,
            )
        return self._rows(out, max(1, int(out.lengths.max()))).cpu()

    def _prompt(self, prompt: Tensor, batch: int, length: int) -> tuple[Strings, Tensor, Tensor]:
        """The given tokens alone, all of them fixed, and the gaps in which there is no hole."""
        if (reason := self.edits.kernel.holds_nothing()) is not None:
            raise UserError(f"filling in: {reason}")
        if prompt.dim() != 2 or prompt.shape[0] != 1:
            raise UserError(f"sample: prompt must be one row, [1, p], not {list(prompt.shape)}")
        row = prompt[0].to(self.device)
        given = row[row >= 0]
        self._batch(given[None])
        if len(given) >= length:
            raise UserError(f"sample: the prompt has {len(given)} tokens; nothing is free of {length}")
        gap = (row >= 0).cumsum(0)[row < 0]  # a hole behind j tokens is gap j
        tokens = torch.cat([given.new_full((1,), self.edits.kernel.start), given]).repeat(batch, 1)
        shut = torch.ones_like(tokens, dtype=torch.bool)
        shut[:, gap] = False
        every = torch.ones_like(shut)
        return Strings(tokens, every), every.clone(), shut

    def _rows(self, strings: Strings, width: int) -> Tensor:
        """Tokens without the start, int64 [b, width]."""
        rows = strings.tokens[:, 1 : width + 1]
        return nn.functional.pad(rows, (0, width - rows.shape[1]), value=self.edits.kernel.start)
