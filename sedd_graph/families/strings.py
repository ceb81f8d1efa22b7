"""Strings: processes that insert, delete and replace tokens, so that the model chooses lengths.

Axes: b batch, w positions of a padded string (the start state first), v data tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.strings.kernel import StringDraw
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import (
    DataFacts,
    OnDraw,
    Process,
    Prompt,
    SampleRequest,
    Samples,
    Stored,
    Text,
    TextWithHoles,
)
from sedd_graph.engine.regions import Model
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families.parts import make_components, problem
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.text import FREE, all_but, check_row, check_tokens, split_holes, token_count, too_many_tokens
from sedd_graph.graph.model import Graph

__all__ = ["StringProcess", "make_parts", "prove"]

_HOLE = re.compile(r"\[\[\]\]")
_NUMBERED = re.compile(r"\[\[\d+\]\]")


def make_parts(plan: ProcessPlan, registry: Registry, states: int | None = None) -> StringParts:
    """Make the components, for the declared number of states or (for a proof) another.

    Raises:
        BlueprintError: with every reason why they do not go together.
    """
    kernel, schedule, objective, sampler = made = make_components(plan, registry, states=states)
    problems, name = [], plan.kernel.name
    if schedule.learned:
        message = (
            f"{plan.schedule.name!r} learns from losses of rows of one length; take another schedule, such as loglinear"
        )
        problems.append(problem("process.schedule", message))
    if (lack := objective.lacks(kernel)) is not None:
        problems.append(problem("objective", f"{plan.objective.name!r} needs {lack}, not {name!r}"))
    if (lack := sampler.lacks(kernel, objective)) is not None:
        problems.append(problem("sample", f"{plan.sampler.name!r} needs {lack}"))
    if problems:
        raise BlueprintError(problems)
    return StringParts(*made)


def prove(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Verify the declared combination on the enumerable toy of its kernel. Takes some seconds on a CPU."""
    from sedd_graph.verify.strings import prove_strings

    return prove_strings(partial(make_parts, plan, registry))


class StringProcess(Process):
    """Kernel, schedule, objective and sampler of strings that change their length.

    The ``forbidden`` tokens are never generated. ``cut`` counts the tokens of noisy strings for which rows had no
    room in training so far.
    """

    family = "strings"
    batch_type = Batch
    refuses: ClassVar[Mapping[str, str]] = {
        "attend": "strings have no padding to hide",
        "conditions": "conditions on positions need rows of one length",
        "allowed": "tokens are bounded by position in rows of one length alone",
        "classifier": "classifiers guide rows of one length",
    }

    def __init__(
        self, plan: ProcessPlan, parts: StringParts, *, device: torch.device, forbidden: Sequence[int] = ()
    ) -> None:
        self.plan = plan
        self.kernel, self.schedule, self.objective, self.sampler = parts
        for part in parts:
            part.to(device)
        self._device, self._forbidden = device, forbidden
        self.cut = 0

    @cached_property
    def allowed(self) -> Tensor:
        """Tokens that may be generated, bool [v]."""
        return all_but(self._forbidden, self.kernel.data_tokens).to(self._device)

    @classmethod
    def make(
        cls,
        plan: ProcessPlan,
        registry: Registry,
        *,
        graph: Graph,
        device: torch.device,
        forbidden: Sequence[int] = (),
        pieces: Callable[[], Sequence[bytes | None]] | None = None,
    ) -> StringProcess:
        """Make the process that ``plan`` declares. Raises :class:`BlueprintError`."""
        return cls(plan, make_parts(plan, registry), device=device, forbidden=forbidden)

    def describe(self) -> str:
        return self.plan.describe()

    # -- training and evaluation ------------------------------------------------------------------------------------

    def batch(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        """Rows int64 [b, l] that are padded behind their text."""
        batch = (rows if isinstance(rows, Batch) else Batch.of(rows)).to(device)
        check_tokens(batch.tokens.where(batch.attend, 0), self.kernel.data_tokens)
        kept = batch.attend & ~batch.corrupt
        if not self.kernel.supports_prompts and bool(kept.any()):
            raise UserError("this kernel has no tokens that it spares: every token must be corrupted")
        for role, what in (
            (batch.attend, "padding must come behind the text"),
            (kept, "what is spared must come first"),
        ):
            if bool((role[:, 1:] & ~role[:, :-1]).any()):
                raise UserError(f"a batch of strings: {what}")
        return batch

    def draw(
        self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None
    ) -> StringDraw:
        if xt is not None:
            raise UserError("loss: noisy strings cannot be given: leave xt out")
        draw: StringDraw = self.objective.corrupt(batch, self.kernel, self.schedule, random=random, t=t)
        self.cut += draw.cut
        return dataclasses.replace(draw, cut=0)  # a compiled step must not depend on it

    def loss(
        self, model: Model, draw: StringDraw, batch: Batch, key: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, taps = model.run({"tokens": draw.xt, "sigma": draw.sigma, "attend": draw.attend}, key)
        with full_precision(draw.xt):
            return self.objective.loss(outputs, draw, self.kernel), taps

    def bound_rows(
        self, network: Network, batch: Batch, *, seeds: Sequence[int], on_draw: OnDraw | None = None
    ) -> Tensor:
        """As the interface says. Strings are whole here, however long noise makes them."""
        total = torch.zeros(len(batch), dtype=torch.float64)
        for seed in seeds:
            random = Randomness(torch.Generator(network.device).manual_seed(seed))
            draw = self.objective.bound_draw(batch, self.kernel, self.schedule, random=random)
            nats = self.loss(network.model, draw, batch, None)[0]
            total += nats.double().cpu()
            if on_draw is not None:
                on_draw(self.objective.over, draw.t, nats)
        return total / len(seeds)

    @property
    def caveat(self) -> str | None:
        return self.objective.caveat(self.kernel)

    def warnings(self) -> list[str]:
        if not self.cut:
            return []
        return [f"{self.cut:,} tokens of noisy strings found no room: raise objective.room"]

    # -- sampling ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        return self.sampler.steps

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Strings of at most ``length`` tokens, int64 [b, longest of them], padded with the start state. With an objective
        for one length that is their length.

        ``prompt`` int64 [1, p] holds tokens that stay, and -1 where the model may write as much as it likes; nothing is inserted
        elsewhere. ``on_step(number, rows)`` gets rows int64 [b, length].
        """
        if request.length is None:
            raise UserError("sample: give a length: the most tokens that a string may have")
        if request.steps is not None and self.steps is None:
            raise UserError("sample: steps must be left out: this sampler draws its own times")
        batch, length = request.batch, request.length
        generator = request.generator(network.device)
        if request.prompt is None:
            strings = self.kernel.prior(batch, longest=length, generator=generator, allowed=self.allowed)
            fixed = torch.zeros_like(strings.attend)
            fixed[:, 0] = True
            shut = ~strings.attend
        else:
            strings, fixed, shut = self._prompt(request.prompt.to(network.device), batch, length)

        def rates(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
            found = network.run({"tokens": strings.tokens, "sigma": sigma, "attend": strings.attend})
            return self.objective.rates(found, strings, length)

        def on_step(number: int, strings: Strings) -> None:
            if request.on_step is not None:
                request.on_step(number, self._rows(strings, length))

        settings = StringSettings(
            fixed=fixed,
            shut=shut,
            longest=length,
            kernel=self.kernel,
            schedule=self.schedule,
            generator=generator,
            allowed=self.allowed,
            on_step=on_step,
        )
        with network.evaluating():
            out = self.sampler.run(rates, strings, settings, steps=request.steps)
        rows = self._rows(out, max(1, int(out.lengths.max()))).cpu()
        sampler = self.sampler
        facts = {"mask": None, "start": self.kernel.start, "cut": sampler.cut, "clamped": sampler.clamped}
        return Samples(rows, facts | {"evaluations": sampler.evaluations})

    def _prompt(self, row: Tensor, batch: int, length: int) -> tuple[Strings, Tensor, Tensor]:
        """The given tokens alone, all of them fixed, and the gaps in which there is no hole."""
        if (reason := self.kernel.refuses_prompts()) is not None:
            raise UserError(f"filling in: {reason}")
        if row.dim() != 2 or row.shape[0] != 1:
            raise UserError(f"sample: prompt must be one row, [1, p], not {list(row.shape)}")
        row = row[0]
        given = row[row >= 0]
        self.batch(given[None], row.device)
        if len(given) >= length:
            raise UserError(f"sample: the prompt has {len(given)} tokens; nothing is free of {length}")
        gap = (row >= 0).cumsum(0)[row < 0]  # a hole behind j tokens is gap j
        tokens = torch.cat([given.new_full((1,), self.kernel.start), given]).repeat(batch, 1)
        shut = torch.ones_like(tokens, dtype=torch.bool)
        shut[:, gap] = False
        every = torch.ones_like(shut)
        return Strings(tokens, every), every.clone(), shut

    def _rows(self, strings: Strings, width: int) -> Tensor:
        """Tokens without the start, int64 [b, width]."""
        rows = strings.tokens[:, 1 : width + 1]
        return F.pad(rows, (0, width - rows.shape[1]), value=self.kernel.start)

    def texts(self, rows: Tensor, tokenizer: Text | None) -> list[str]:
        if tokenizer is None:
            raise UserError("there is no tokenizer: tokens cannot become text")
        return [tokenizer.decode([i for i in row if i != self.kernel.start]) for row in rows.tolist()]

    def stored(self, samples: Samples, tokenizer: Text | None) -> Stored:
        rows = samples.rows.numpy()
        lengths = (samples.rows != self.kernel.start).sum(-1).numpy()
        return Stored({"tokens": rows, "lengths": lengths}, self.texts(samples.rows, tokenizer))

    def conditions(self, changes: Mapping[str, Any]) -> None:
        if changes:
            raise UserError(
                "this model chooses lengths itself: --forbid, --allow, --matching, --guidance and --observed are for models of rows"
            )

    @classmethod
    def prove(cls, plan: ProcessPlan, graph: Graph, registry: Registry) -> list[Check]:
        return prove(plan, registry)

    def check_data(self, data: DataFacts) -> Iterator[tuple[str, str]]:
        yield from super().check_data(data)
        yield from token_count(data, self.kernel.data_tokens)
        if self.objective.one_length and not data.stream:
            yield (
                "data.rows",
                "the objective is for strings of one known length: take rows: stream, or the objective dise",
            )
        if data.prompts and not self.kernel.supports_prompts:
            yield (
                "data.corpus.prompt",
                "this kernel spares no token, so there can be no prompt: leave it out, or take the kernel delete",
            )

    def check_tokenizer(self, size: int) -> str | None:
        return too_many_tokens(size, self.kernel.data_tokens)

    def prompt(
        self, text: TextWithHoles, tokenizer: Text, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """``text`` with ``[[]]`` for a hole of any length, or prefix and suffix around one."""
        if (reason := self.kernel.refuses_prompts()) is not None:
            raise UserError(f"infill: {self.plan.kernel.name!r} holds no text: {reason}")
        text.check("The [[]] is")
        if text.text is not None and _NUMBERED.search(text.text):
            raise UserError("infill: this model chooses lengths itself: write [[]] for a hole, without a number")
        form = "[[]] where the model is to write, such as 'The [[]] is'"
        parts = [text.prefix or "", text.suffix or ""] if text.text is None else split_holes(text.text, _HOLE, form)
        row: list[int] = []
        for number, part in enumerate(parts):
            row += ([FREE] if number else []) + tokenizer.encode(part).tolist()
        check_row(row, tokenizer)
        how = "gaps in the given text are held shut, which is a heuristic: the model has not been told that nothing is missing there"
        return Prompt(torch.tensor([row], dtype=torch.int64), text.length or length, False, how)
