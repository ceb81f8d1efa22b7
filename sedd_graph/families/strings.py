"""Processes on strings (the family ``strings``), which insert, delete and replace tokens, so that lengths change.

A string is stored as a padded row that begins with the BOS (beginning-of-string) token, which is also the padding.

Axes: b batch, l length, p prompt length, w positions of a padded string (position 0 holds the BOS token), v data
tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.bitstream.reversible import ReversibleNoise
from sedd_graph.diffusion.bitstream.string_noise import StringNoise
from sedd_graph.diffusion.distillation import Distillable, Distillation
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.strings.kernel import StringDraw, StringKernel
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings, wide
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import Setup
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import Prompt, SampleRequest, Samples, Stored, TextWithHoles
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.text import (
    FREE,
    BoundDraw,
    TextProcess,
    all_but,
    check_row,
    check_tokens,
    ids_of,
    make_components,
    problem,
    split_holes,
)
from sedd_graph.graph.model import Graph

__all__ = ["StringProcess", "make_parts", "prove"]

_HOLE = re.compile(r"\[\[\]\]")
_NUMBERED = re.compile(r"\[\[\d+\]\]")


def make_parts(plan: ProcessPlan, registry: Registry, states: int | None = None) -> StringParts:
    """Construct the kernel, schedule, objective and sampler of a process on strings.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        states: Number of states of a small example for verification; None for the number that the blueprint declares.

    Returns:
        The components, on the CPU.

    Raises:
        BlueprintError: The components are incompatible. The error lists every reason.
    """
    kernel, schedule, objective, sampler = made = make_components(plan, registry, states=states)
    problems = []
    if schedule.learned:
        message = (
            f"{plan.schedule.name!r} learns from losses of rows of one length; take another schedule, such as loglinear"
        )
        problems.append(problem("process.schedule", message))
    if (lack := objective.lacks(kernel)) is not None:
        problems.append(problem("objective", f"{plan.objective.name!r} needs {lack}, not {plan.kernel.name!r}"))
    if (lack := sampler.lacks(kernel, objective)) is not None:
        problems.append(problem("sample", f"{plan.sampler.name!r} needs {lack}"))
    if problems:
        raise BlueprintError(problems)
    return StringParts(*made)


def prove(plan: ProcessPlan, registry: Registry, proof: Proof = "full") -> list[Check]:
    """Verify the process on all short strings over vocabularies of two and three tokens; takes seconds on a CPU.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks of schedule, kernel, objective and sampler.
    """
    from sedd_graph.verify.strings import prove_strings

    return prove_strings(partial(make_parts, plan, registry), proof)


class StringProcess(TextProcess):
    """Process on strings whose length changes.

    Args:
        plan: Validated description of the process.
        setup: Graph, registry and device of the process.

    Attributes:
        kernel: Forward (noising) process.
        schedule: Noise schedule of the forward process.
        objective: Training objective.
        sampler: Sampler of the reverse process.
        cut: Number of tokens cut off in training so far, from noised strings that were longer than their padded rows.
    """

    family = "strings"
    chooses_lengths = True
    kernel: StringKernel
    refuses: ClassVar[Mapping[str, str]] = {
        "attend": "strings have no padding to hide",
        "conditions": "conditions on positions need rows of a fixed length",
        "allowed": "tokens can be restricted by position only in rows of a fixed length",
        "classifier": "classifiers guide rows of a fixed length",
        "seeds": "a step may insert and delete anywhere, so that the noise of a row is not that of its tokens",
        "tape": "a step may insert and delete anywhere, and the noise of a given text is not known for such steps",
    }

    def __init__(self, plan: ProcessPlan, setup: Setup) -> None:
        parts = self.kernel, self.schedule, self.objective, self.sampler = make_parts(plan, setup.registry)
        super().__init__(plan, setup, parts)
        self.cut = 0

    @cached_property
    def allowed(self) -> Tensor:
        """Mask of the tokens that samples may contain, bool [v]."""
        return all_but(self._forbidden, self.kernel.data_tokens).to(self._device)

    # -- training and evaluation ------------------------------------------------------------------------------------

    def batch(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        """Return token rows as a batch on ``device``.

        Args:
            rows: Token ids, int64 [b, l], or a batch. In each row the prompt comes first, then the text, then padding.
            device: Device of the result.

        Raises:
            UserError: Ids are out of range, prompt or padding tokens are in another order, or there are prompt tokens
                but the kernel supports no prompts.
        """
        batch = self.tokens(rows, device)
        check_tokens(batch.tokens.where(batch.attend, 0), self.kernel.data_tokens)
        kept = batch.attend & ~batch.corrupt
        if not self.kernel.supports_prompts and bool(kept.any()):
            raise UserError("this kernel spares no tokens: every token must be corrupted, so there can be no prompt")
        for role, what in (
            (batch.attend, "padding must come behind the text"),
            (kept, "the prompt must come first"),
        ):
            if bool((role[:, 1:] & ~role[:, :-1]).any()):
                raise UserError(f"a batch of strings: {what}")
        return batch

    def draw(
        self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None
    ) -> StringDraw:
        if xt is not None:
            raise UserError("loss: noised strings cannot be given: leave xt out")
        draw: StringDraw = self.objective.corrupt(batch, self.kernel, self.schedule, random=random, t=t)
        self.cut += draw.cut
        return dataclasses.replace(draw, cut=0)  # a compiled step would be compiled again for each value

    def loss(
        self, model: Model, draw: StringDraw, batch: Batch, key: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, saved = model.run({"tokens": draw.xt, "sigma": draw.sigma, "attend": draw.attend}, key)
        with full_precision(draw.xt):
            return self.objective.loss(outputs, draw, self.kernel), saved

    def bound_draws(self, network: Network, batch: Batch, parts: Sequence[range], seed: int) -> Iterator[BoundDraw]:
        # noised strings are not cut here, however long they are: the longest of the batch determines what is drawn
        random = self.randomness(batch, range(len(batch)), seed)
        drawn: StringDraw = self.objective.bound_draw(batch, self.kernel, self.schedule, random=random)
        for part in parts:
            draw = drawn.part(part)
            yield BoundDraw(self.objective.over, draw.t, self.loss(network.model, draw, batch.part(part), None)[0])

    def distillable(self) -> Distillable:
        found = self.kernel.distillable(self.schedule, self.objective)
        if found is None:
            raise UserError(
                f"the kernel {self.plan.kernel.name!r} has no coupled noise x_s, x_t whose predictions can be compared; of strings, "
                "those of 'delete' can be distilled"
            )
        return found

    @property
    def caveat(self) -> str | None:
        return self.objective.caveat(self.kernel)

    def warnings(self) -> list[str]:
        if not self.cut:
            return []
        return [f"{self.cut:,} tokens of noised strings did not fit into their rows and were cut: raise objective.room"]

    def reversible_noise(self) -> ReversibleNoise:
        return StringNoise(self.kernel, self.schedule)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def span(self, request: SampleRequest) -> None:
        """Return None: lengths are in general unknown before sampling, and mostly far below ``request.length``."""

    def positions(self, request: SampleRequest) -> int | None:
        return None if request.length is None else request.length + 1  # the BOS token first

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw strings of at most ``request.length`` tokens.

        If the objective is for strings of one known length (its attribute ``one_length`` is True), ``request.length``
        is taken as that length.

        Args:
            network: The network.
            request: The request. ``prompt`` is int64 [1, p]: the ids of fixed tokens, and -1 for each hole, a place
                where any number of tokens may be inserted. ``on_step`` receives the current rows, int64 [b, length].

        Returns:
            Token ids int64 [b, l], l being the length of the longest drawn string. Shorter strings are padded with the
            id of the BOS token, ``kernel.start``.

        Raises:
            UserError: The request has no length, sets ``steps`` for a sampler that chooses its own times, or has a
                prompt that is invalid or too long.
        """
        if request.length is None:
            raise UserError("sample: give a length: the most tokens of a string")
        if request.steps is not None and self.steps is None:
            raise UserError("sample: steps must be left out: this sampler draws its own times")
        batch, length = request.batch, request.length
        generator = request.generator(network.device)
        if request.prompt is None:
            strings = self.kernel.prior(batch, longest=length, generator=generator, allowed=self.allowed)
            fixed = torch.zeros_like(strings.attend)
            fixed[:, 0] = True  # the BOS token
            shut = ~strings.attend
        else:
            strings, fixed, shut = self._prompt(request.prompt.to(network.device), batch, length)

        def rates(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
            found = network.run({"tokens": strings.tokens, "sigma": sigma, "attend": strings.attend})
            return self.objective.rates(found, strings, length)

        def on_step(number: int, strings: Strings) -> None:
            if request.on_step is not None:
                request.on_step(number, self._rows(strings, length))

        def on_confidence(number: int, sure: Tensor) -> None:
            if request.on_confidence is not None:
                found = sure[:, 1 : length + 1]
                request.on_confidence(number, F.pad(found, (0, length - found.shape[1]), value=torch.nan))

        settings = StringSettings(
            fixed=fixed,
            shut=shut,
            longest=length,
            one_length=self.objective.one_length,
            kernel=self.kernel,
            schedule=self.schedule,
            generator=generator,
            allowed=self.allowed,
            on_step=on_step,
            on_confidence=None if request.on_confidence is None else on_confidence,
        )
        with network.evaluating():
            out = self.sampler.run(rates, strings, settings, steps=request.steps)
        width, sampler = max(1, int(out.lengths.max())), self.sampler
        given = None if request.prompt is None else wide(sampler.fixed[:, 1:], width).cpu()
        facts = {"mask": None, "start": self.kernel.start, "cut": sampler.cut, "clamped": sampler.clamped}
        return Samples(self._rows(out, width).cpu(), facts | {"evaluations": sampler.evaluations}, given=given)

    def _prompt(self, row: Tensor, batch: int, length: int) -> tuple[Strings, Tensor, Tensor]:
        """Return the initial strings of a prompt, and bool masks [b, w] of fixed tokens and of gaps without a hole.

        Entry i of the second mask is the gap after position i.
        """
        if (reason := self.kernel.refuses_prompts()) is not None:
            raise UserError(f"infill: {reason}")
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
        """Return the tokens of strings after the BOS token, int64 [b, width], padded with the BOS token."""
        rows = strings.tokens[:, 1 : width + 1]
        return F.pad(rows, (0, width - rows.shape[1]), value=self.kernel.start)

    def texts(self, rows: Tensor, tokenizer: Tokenizer | None) -> list[str]:
        decode = partial(super().texts, tokenizer=tokenizer)
        return [text for row in rows for text in decode(row[None, row != self.kernel.start])]

    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        lengths = (samples.rows != self.kernel.start).sum(-1).numpy()
        return Stored({**samples.arrays(), "lengths": lengths}, self.texts(samples.rows, tokenizer))

    def conditions(self, changes: Mapping[str, Any]) -> None:
        if changes:
            raise UserError(
                "this model chooses lengths itself: --forbid, --allow, --matching, --particles, --guidance and --observed are for "
                "models of rows of a fixed length"
            )

    @classmethod
    def prove(cls, plan: ProcessPlan, graph: Graph, registry: Registry, proof: Proof) -> list[Check]:
        return prove(plan, registry, proof)

    @classmethod
    def prove_distillation(cls, plan: ProcessPlan, registry: Registry, objective: Distillation) -> list[Check]:
        from sedd_graph.verify.distillation import prove_distillation
        from sedd_graph.verify.string_distillation import string_case
        from sedd_graph.verify.string_table import EnumeratedTable

        declared = make_parts(plan, registry)
        parts = make_parts(
            plan, registry, min(declared.kernel.toys) + declared.kernel.states - declared.kernel.data_tokens
        )
        # strings of all lengths: what noise leaves of one may then be clean itself
        table, process = parts.kernel.table(one_length=False), parts.kernel.distillable(parts.schedule, parts.objective)
        if not isinstance(table, EnumeratedTable) or process is None:
            return []
        return prove_distillation(string_case(table, process, parts.schedule), objective)

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        yield from super().check_data(data)
        if not isinstance(data, DataConfig):
            return
        if self.objective.one_length and data.rows != "stream":
            message = "the objective is for strings of one known length: take rows: stream, or the objective dise"
            yield "data.rows", message
        if data.corpus.prompted and not self.kernel.supports_prompts:
            message = "this kernel spares no token, so there can be no prompt: leave it out, or take the kernel delete"
            yield "data.corpus.prompt", message

    def prompt(
        self, text: TextWithHoles, tokenizer: Tokenizer, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """Encode text with holes as a prompt. Any number of tokens may be inserted into a hole.

        Args:
            text: Either ``text.text``, in which ``[[]]`` marks each hole, or ``text.prefix`` and ``text.suffix``, with
                one unmarked hole between them.
            tokenizer: Tokenizer of the model.
            length: Maximum number of tokens of a sample, prompt included, if ``text.length`` is None.
            prompts_trained: Ignored: prompts of strings are always a heuristic.
            observed: Ignored: prompt tokens are always fixed.

        Returns:
            The prompt, token ids int64 [1, p] with -1 for each hole. Its field ``exact`` is False.

        Raises:
            UserError: The kernel supports no prompts, or the text has no hole, a hole with a size, or too many tokens.
        """
        if (reason := self.kernel.refuses_prompts()) is not None:
            raise UserError(f"infill: {self.plan.kernel.name!r} cannot hold text fixed: {reason}")
        text.check("The [[]] is")
        if text.text is not None and _NUMBERED.search(text.text):
            raise UserError("infill: this model chooses lengths itself: write [[]] for a hole, without a number")
        form = "[[]] where the model is to write, such as 'The [[]] is'"
        parts: Sequence[str | Sequence[int]] = (
            [text.prefix or "", text.suffix or ""] if text.text is None else split_holes(text.text, _HOLE, form)
        )
        row: list[int] = []
        for number, part in enumerate(parts):
            row += ([FREE] if number else []) + ids_of(part, tokenizer)
        check_row(row, tokenizer)
        how = (
            "nothing is inserted within the given text, which is a heuristic: "
            "the model was not trained with the knowledge that nothing is missing there"
        )
        return Prompt(
            torch.tensor([row], dtype=torch.int64), length if text.length is None else text.length, False, how
        )
