"""Rows of tokens: a kernel noises each position by itself, and a network scores or predicts the tokens.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Pieces
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.conditions import lacks
from sedd_graph.diffusion.tokens.guidance import lacks_scores
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.schedule_loss import steadied
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import (
    KERNEL,
    SCHEDULE,
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
from sedd_graph.families.text import (
    FREE,
    all_but,
    check_row,
    check_tokens,
    fill_holes,
    token_count,
    too_many_tokens,
)
from sedd_graph.families.token_sampling import TokenSampling
from sedd_graph.graph.model import Graph
from sedd_graph.store.arrays import document_lengths

__all__ = ["TokenProcess", "make_parts", "prove"]


def make_parts(plan: ProcessPlan, registry: Registry, states: int | None = None) -> TokenParts:
    """Make the components, for the declared number of states or (for a proof) another.

    Raises:
        BlueprintError: with every reason why they do not go together.
    """
    kernel, schedule, objective, sampler = made = make_components(plan, registry, states=states)
    # a proof is of the sampler without it
    classifier = _make_classifier(plan, registry) if states is None else None
    parts = TokenParts(*made, classifier)
    name = plan.kernel.name
    problems = [
        problem(key, f"{part.name!r} cannot work with the output {plan.output!r}; it reads {' or '.join(reads)}")
        for key, part, reads in (
            ("objective", plan.objective, objective.reads),
            ("sample", plan.sampler, sampler.reads),
        )
        if plan.output not in reads
    ]
    problems += [
        problem(key, f"{part.name!r} needs {lack}, not {name!r}")
        for key, part, lack in (
            ("objective", plan.objective, objective.lacks(kernel)),
            ("sample", plan.sampler, sampler.lacks(kernel)),
            ("sample", plan.sampler, lacks(sampler.config, kernel)),
        )
        if lack is not None
    ]
    if schedule.learned and not objective.steady:
        message = (
            f"{plan.schedule.name!r} learns from losses that are integrals over time, such as nelbo's and "
            f"score_entropy's; {plan.objective.name!r} is none: take another schedule, such as loglinear"
        )
        problems.append(problem("process.schedule", message))
    if plan.classifier is not None and (lack := _hinders(parts)) is not None:
        problems.append(problem("sample.classifier", f"{plan.classifier.name!r} needs {lack}"))
    if problems:
        raise BlueprintError(problems)
    return parts


def _make_classifier(plan: ProcessPlan, registry: Registry) -> NoisyClassifier | None:
    """The declared classifier, which predicts the declared label. Raises :class:`BlueprintError`."""
    if plan.classifier is None:
        return None
    try:
        context = Context({"n": plan.states})
        made: NoisyClassifier = registry.component(plan.classifier.contract.op)(plan.classifier.config, context)
    except UserError as error:  # a file that cannot be read, or is of another model
        raise BlueprintError([problem("sample.classifier", str(error))]) from None
    label = made.config.label
    if label >= made.labels:
        message = f"there is no label {label}: this classifier has {made.labels}, from 0 to {made.labels - 1}"
        raise BlueprintError([problem("sample.classifier.label", message)])
    return made


def _hinders(parts: TokenParts) -> str | None:
    """What guidance by the process's classifier needs and does not have here."""
    if parts.classifier is None:
        return None
    if parts.objective.block is not None:
        return "text that is drawn as a whole, not in blocks"
    return lacks_scores(parts.kernel, parts.sampler) or parts.classifier.lacks(parts.kernel)


def prove(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Verify the declared combination on an enumerable toy. Takes a few seconds on a CPU."""
    from sedd_graph.verify.tokens import prove_process

    return prove_process(partial(make_parts, plan, registry), plan.output)


class TokenProcess(Process):
    """Kernel, schedule, objective and sampler of rows of tokens.

    The ``forbidden`` tokens and the mask are never generated. ``pieces`` gives the bytes of each token, where there is a tokenizer.
    """

    family = "tokens"
    batch_type = Batch
    refuses: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        plan: ProcessPlan,
        parts: TokenParts,
        *,
        device: torch.device,
        forbidden: Sequence[int] = (),
        pieces: Pieces | None = None,
    ) -> None:
        self.plan, self.parts = plan, parts
        self.kernel, self.schedule, self.objective, self.sampler, self.classifier = parts
        for part in parts:
            if part is not None:
                part.to(device)
        self._device, self._forbidden, self._pieces = device, forbidden, pieces

    @cached_property
    def allowed(self) -> Tensor:
        """Tokens that may be generated, bool [n]."""
        masks = [] if self.kernel.mask is None else [self.kernel.mask]
        return all_but([*self._forbidden, *masks], self.kernel.states).to(self._device)

    @classmethod
    def make(
        cls,
        plan: ProcessPlan,
        registry: Registry,
        *,
        graph: Graph,
        device: torch.device,
        forbidden: Sequence[int] = (),
        pieces: Pieces | None = None,
    ) -> TokenProcess:
        """Make the process that ``plan`` declares. Raises :class:`BlueprintError`."""
        return cls(plan, make_parts(plan, registry), device=device, forbidden=forbidden, pieces=pieces)

    def describe(self) -> str:
        return self.plan.describe()

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        return {n: p for n, p in ((KERNEL, self.kernel), (SCHEDULE, self.schedule)) if p.learned}

    def batch(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        batch = (rows if isinstance(rows, Batch) else Batch.of(rows)).to(device)
        check_tokens(batch.tokens, self.kernel.data_tokens)
        return batch

    def draw(self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Draw:
        return self.objective.corrupt(batch, self.kernel, self.schedule, random=random, t=t, xt=xt)

    def loss(self, model: Model, draw: Draw, batch: Batch, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if key is not None and (copies := len(draw.xt) // len(key)) > 1:
            key = torch.cat([key] * copies)
        found, taps = model.run(self.objective.inputs(draw, batch), key)
        with full_precision(draw.xt):
            outputs = self.kernel.translate(found, draw.xt, draw.sigma)
            loss = self.objective.loss(outputs, draw, batch, self.kernel, self.schedule)
            if self.schedule.learned:
                # in the units of the loss: nats per sequence, times the share of a guess's that each token costs
                guess = batch.counted.clamp(min=1) * math.log(self.kernel.states)
                loss = loss + steadied(loss, draw.t, self.schedule) / guess
        return loss, taps

    def bound_rows(
        self, network: Network, batch: Batch, *, seeds: Sequence[int], on_draw: OnDraw | None = None
    ) -> Tensor:
        total = torch.zeros(len(batch), dtype=torch.float64)
        for seed in seeds:
            random = Randomness(torch.Generator(network.device).manual_seed(seed))
            objective, draw = self.objective.bound_draw(batch, self.kernel, self.schedule, random=random)
            outputs = network.run(objective.inputs(draw, batch))
            outputs = self.kernel.translate(outputs, draw.xt, draw.sigma)
            nats = objective.loss(outputs, draw, batch, self.kernel, self.schedule)
            total += nats.double().cpu()
            if on_draw is not None:
                # each block of a row is at a level of its own, and the nats are of them all
                on_draw(objective.over, draw.t if objective.block is None else None, nats)
        return total / len(seeds)

    def noised(self, over: str, t: Tensor) -> Tensor:
        if over != "time":
            return t
        inside = t.float().clamp(1e-4, 1 - 1e-6).to(self.allowed.device)
        return torch.from_numpy(-np.expm1(-self.schedule.sigma(inside).detach().double().cpu().numpy()))

    # -- sampling ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        return self.sampler.steps

    def evaluations(self, request: SampleRequest) -> int | None:
        steps, block = super().evaluations(request), self.objective.block
        return steps and steps * (1 if block is None else -(-(request.length or 0) // block))

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """As the interface says. The mask and forbidden tokens are never drawn (unless a prompt holds them).

        Under an objective of blocks the sampler runs in each block from left to right, with ``steps`` of its own; a prompt
        may hold nothing behind the first block that is open. Rows that end within a block are the beginning of a whole one.
        """
        rows, conditions = TokenSampling(self.parts, self.allowed, self._pieces, network, request).rows()
        facts: dict[str, Any] = {"mask": self.kernel.mask, "clamped": self.sampler.clamped}
        told = conditions.model_dump(mode="json", include=set(Conditions.model_fields), exclude_defaults=True)
        facts |= {"conditions": told} if told else {}
        if self.plan.classifier is not None:
            facts["classifier"] = {k: v for k, v in self.plan.classifier.record().items() if k != "counts"}
        return Samples(rows, facts | {"evaluations": self.sampler.evaluations})

    def stored(self, samples: Samples, tokenizer: Text | None) -> Stored:
        rows, text = samples.rows.numpy(), self.texts(samples.rows, tokenizer)
        pad, end = (None, None) if tokenizer is None else (tokenizer.pad, tokenizer.end)
        return Stored({"tokens": rows, "lengths": document_lengths(rows, pad=pad, end=end)}, text)

    def conditions(self, changes: Mapping[str, Any]) -> Conditions:
        held = {name: getattr(self.sampler.config, name) for name in Conditions.model_fields}
        for name, value in changes.items():
            if name == "forbid":
                value = [*held[name], *value]
            elif name == "allow":
                value = {**held[name], **value}
            held[name] = value
        try:
            return Conditions(**held)
        except pydantic.ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise UserError(f"--{where}: {found['msg'].removeprefix('Value error, ')}") from None

    def prompt(
        self, text: TextWithHoles, tokenizer: Text, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """``text`` with ``[[N]]`` for N free tokens, or prefix and suffix around what ``length`` leaves free."""
        text.check("The [[12]] is")
        row = fill_holes(text, tokenizer, text.length or length)
        if text.length is not None and text.length != len(row):
            if text.length < len(row):
                raise UserError(f"infill: the text has {len(row)} tokens, more than --length {text.length}")
            row += [FREE] * (text.length - len(row))
        check_row(row, tokenizer)
        if FREE not in row:
            raise UserError("infill: nothing is free: write [[N]] with N of at least 1 where the model is to write")
        exact, how = self._law(prompts_trained, observed)
        return Prompt(torch.tensor([row], dtype=torch.int64), len(row), exact, how)

    def _law(self, prompts_trained: bool, observed: str) -> tuple[bool, str]:
        """Whether samples have the model's law given a prompt, and how the prompt is held."""
        if self.kernel.clamp_safe:
            return True, "exact: the given text is held fixed, and with this kernel a token that is seen is a clean one"
        if observed == "clamp" and prompts_trained:
            return (
                True,
                "as trained: the given text is held fixed, and the model has learned from rows with clean prompts",
            )
        done = "holding the given text fixed" if observed == "clamp" else "noising the given text anew at each step"
        return (
            False,
            f"the kernel {self.plan.kernel.name!r} can move every token, so {done} is a heuristic: "
            "what is written is not drawn from the model's law given that text",
        )

    # -- verification -----------------------------------------------------------------------------------------------

    @classmethod
    def prove(cls, plan: ProcessPlan, graph: Graph, registry: Registry) -> list[Check]:
        from sedd_graph.verify.block_diffusion import prove_blocks

        checks = prove(plan, registry)
        parts = make_parts(plan, registry)
        return (
            checks if parts.objective.block is None else [*checks, *prove_blocks(graph, parts, registry, plan.output)]
        )

    def check_data(self, data: DataFacts) -> Iterator[tuple[str, str]]:
        yield from super().check_data(data)
        block = self.objective.block
        if block is not None and data.length % block:
            yield (
                "data.length",
                f"rows of {data.length} tokens are no whole number of blocks of {block} (objective.block)",
            )
        yield from token_count(data, self.kernel.data_tokens)

    def check_tokenizer(self, size: int) -> str | None:
        return too_many_tokens(size, self.kernel.data_tokens)

    def check_network(self, network: Network) -> list[Check]:
        from sedd_graph.verify.classifier import check_classifier
        from sedd_graph.verify.output import check_output

        found = [check_output(network, self.kernel, self.objective)]
        if self.classifier is not None:
            found += check_classifier(self.classifier, self.kernel.states)
        return found
