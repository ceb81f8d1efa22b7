"""Processes on token rows of a fixed length (the family ``tokens``).

The kernel noises each position independently; the network predicts scores or the clean tokens.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.bitstream.reversible import ReversibleNoise, TokenNoise
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.distillation import Distillation
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import FittedSchedule
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.conditions import lacks
from sedd_graph.diffusion.tokens.guidance import lacks_scores
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import DrawRequest
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.schedule_loss import steadied
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import KERNEL, SCHEDULE, Setup
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import Prompt, SampleRequest, Samples, Stored, TextWithHoles
from sedd_graph.engine.tail import Tail
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.text import (
    FREE,
    BoundDraw,
    TextProcess,
    all_but,
    check_row,
    check_tokens,
    document_lengths,
    fill_holes,
    make_components,
    problem,
)
from sedd_graph.families.token_loss import TokenLoss
from sedd_graph.graph.model import Graph

if TYPE_CHECKING:
    from sedd_graph.families.token_distillation import TokenDistillable

__all__ = ["TokenProcess", "make_parts", "prove"]

RECONSTRUCTED = 8
"""The part of the bound below the lowest noise is evaluated on one row in so many, which takes that share more time."""


def make_parts(plan: ProcessPlan, registry: Registry, states: int | None = None) -> TokenParts:
    """Construct the kernel, schedule, objective, sampler and classifier of a process on token rows.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        states: Number of states of a small example for verification, for which no classifier is constructed. None for
            the number that the blueprint declares.

    Returns:
        The components, on the CPU.

    Raises:
        BlueprintError: The components are incompatible. The error lists every reason.
    """
    kernel, schedule, objective, sampler = made = make_components(plan, registry, states=states)
    parts = TokenParts(*made, _make_classifier(plan, registry) if states is None else None)
    problems = [
        problem(key, f"{part.name!r} cannot work with the output {plan.output!r}; it reads {' or '.join(reads)}")
        for key, part, reads in (
            ("objective", plan.objective, objective.reads),
            ("sample", plan.sampler, sampler.reads),
        )
        if plan.output not in reads
    ]
    problems += [
        problem(key, f"{part.name!r} needs {lack}, not {plan.kernel.name!r}")
        for key, part, lack in (
            ("objective", plan.objective, objective.lacks(kernel)),
            ("sample", plan.sampler, sampler.lacks(kernel)),
            ("sample", plan.sampler, lacks(sampler.config, kernel, sampler)),
        )
        if lack is not None
    ]
    if isinstance(schedule, FittedSchedule):
        message = f"{plan.schedule.name!r} is fitted to losses of vectors: take another schedule, such as loglinear"
        problems.append(problem("process.schedule", message))
    elif schedule.learned and not objective.steady:
        message = (
            f"{plan.schedule.name!r} learns from losses that are integrals over time, such as nelbo's and "
            f"score_entropy's; {plan.objective.name!r} is not one: take another schedule, such as loglinear"
        )
        problems.append(problem("process.schedule", message))
    if plan.classifier is not None and (lack := _classifier_lacks(parts)) is not None:
        problems.append(problem("sample.classifier", f"{plan.classifier.name!r} needs {lack}"))
    if problems:
        raise BlueprintError(problems)
    return parts


def _make_classifier(plan: ProcessPlan, registry: Registry) -> NoisyClassifier | None:
    """Construct the classifier, if one is declared.

    Raises:
        BlueprintError: The file of the classifier is unreadable, or the declared label does not exist.
    """
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


def _classifier_lacks(parts: TokenParts) -> str | None:
    """Return the requirement of classifier guidance that the components do not meet, in words, or None."""
    if parts.classifier is None:
        return None
    if parts.objective.block is not None:
        return "text that is drawn as a whole, not in blocks"
    return lacks_scores(parts.kernel, parts.sampler) or parts.classifier.lacks(parts.kernel)


def prove(plan: ProcessPlan, registry: Registry, proof: Proof = "full") -> list[Check]:
    """Verify the process on all short sequences over a vocabulary of three tokens, which takes seconds on a CPU.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks of schedule, kernel, objective and sampler.
    """
    from sedd_graph.verify.tokens import prove_process

    return prove_process(partial(make_parts, plan, registry), plan.output, proof)


class TokenProcess(TextProcess):
    """Process on token rows of a fixed length.

    Args:
        plan: Validated description of the process.
        setup: Graph, registry and device of the process.

    Attributes:
        parts: The components below, as one named tuple.
        kernel: Forward (noising) process.
        schedule: Noise schedule of the forward process.
        objective: Training objective.
        sampler: Sampler of the reverse process.
        classifier: Classifier that guides samples; None without guidance.
    """

    family = "tokens"
    kernel: Kernel

    def __init__(self, plan: ProcessPlan, setup: Setup) -> None:
        self.parts = make_parts(plan, setup.registry)
        super().__init__(plan, setup, self.parts)
        self.kernel, self.schedule, self.objective, self.sampler, self.classifier = self.parts
        self._nats = TokenLoss(self.kernel, self.schedule, setup.graph)

    @cached_property
    def allowed(self) -> Tensor:
        """Mask of the states that samples may contain, bool [n]: all but the mask state and forbidden tokens."""
        masks = [] if self.kernel.mask is None else [self.kernel.mask]
        return all_but([*self._forbidden, *masks], self.kernel.states).to(self._device)

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        return {n: p for n, p in ((KERNEL, self.kernel), (SCHEDULE, self.schedule)) if p.learned}

    def batch(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        batch = self.tokens(rows, device)
        check_tokens(batch.tokens, self.kernel.data_tokens)
        return batch

    def draw(self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Draw:
        return self.objective.corrupt(batch, self.kernel, self.schedule, random=random, t=t, xt=xt)

    def loss(self, model: Model, draw: Draw, batch: Batch, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if key is not None and (copies := len(draw.xt) // len(key)) > 1:
            key = torch.cat([key] * copies)
        loss, saved = self._nats(model, self.objective, draw, batch, key=key)
        if self.schedule.learned:
            with full_precision(draw.xt):
                # the variance term is scaled to the loss, relative to the nats of a uniform guess
                guess = batch.counted.clamp(min=1) * math.log(self.kernel.states)
                loss = loss + steadied(loss, draw.t, self.schedule) / guess
        return loss, saved

    @classmethod
    def has_tail(cls, plan: ProcessPlan, registry: Registry) -> bool:
        kernel, objective = (registry.component(part.contract.op) for part in (plan.kernel, plan.objective))
        return bool(objective.sums_positions and not kernel.tabular)

    def tail(self, model: Model) -> Tail | None:
        return self._nats.tail(model, self.objective)

    def bound_draws(self, network: Network, batch: Batch, parts: Sequence[range], seed: int) -> Iterator[BoundDraw]:
        for part in parts:
            own, random = batch.part(part), self.randomness(batch, part, seed)
            objective, draw = self.objective.bound_draw(own, self.kernel, self.schedule, random=random)
            nats, _ = self._nats(network.model, objective, draw, own, use="bound")
            yield BoundDraw(objective.over, draw.t, nats, self._left_out(network, batch, part, random))

    def distillable(self) -> TokenDistillable:
        from sedd_graph.families.token_distillation import TokenDistillable  # here: few commands distil

        return TokenDistillable(self.parts, self.plan.output, self.setup.graph)

    @property
    def row_multiple(self) -> int:
        return self.objective.block or 1

    def row_bounds(self, network: Network, batch: Batch, *, seeds: Sequence[int], draws: int, at_once: int) -> Tensor:
        objective = self.objective.evaluated(self.kernel)
        if objective.over != "masked":
            return super().row_bounds(network, batch, seeds=seeds, draws=draws, at_once=at_once)
        from sedd_graph.families.token_bounds import masked_bounds  # here: checking a blueprint does without it

        return masked_bounds(
            self._nats, objective, self.kernel, network, batch, seeds=seeds, draws=draws, at_once=at_once
        )

    def _left_out(self, network: Network, batch: Batch, part: range, random: Randomness) -> Tensor | None:
        """Estimate the reconstruction term of the rows ``part`` of a batch, on one row of it in so many.

        Args:
            network: The network, in evaluation mode.
            batch: The clean rows whose noise is drawn together.
            part: The rows that are evaluated.
            random: Random numbers after those of the bound.

        Returns:
            Nats, float64 [len(part)]; None if the objective counts all noise.
        """
        rows = len(batch)
        chosen = -(-rows // RECONSTRUCTED)
        # evenly spaced rows with one random offset: every row is chosen with the same probability
        steps = torch.arange(chosen, device=batch.tokens.device) * rows // chosen
        random = Randomness(random.generator)
        offset = (random.rand(1) * rows).long().to(steps.device)
        index = (offset + steps) % rows
        every = batch.take(index)
        objective = self.objective.evaluated(self.kernel)
        draw = objective.reconstruction_draw(DrawRequest(every, self.kernel, self.schedule, random))
        if draw is None:
            return None
        # the chosen rows within the part come first; their number is at most this, without asking the device for it
        most = min(chosen, -(-len(part) * chosen // rows) + 1)
        place = (index - part.start) % rows
        nearest = torch.argsort(place)[:most]
        own = every.take(nearest)
        drawn = Draw(*(getattr(draw, f.name)[nearest] for f in dataclasses.fields(draw)))
        nats, _ = self._nats(network.model, objective, drawn, own, use="reconstruction")
        place = place[nearest]
        inside = place < len(part)
        found = torch.zeros(len(part), dtype=torch.float64, device=nats.device)
        return found.index_add_(
            0, torch.where(inside, place, 0), torch.where(inside, nats.double() * (rows / chosen), 0.0)
        )

    def noised(self, over: str, t: Tensor) -> Tensor:
        if over != "time":
            return t
        if self.kernel.steps is not None:  # the share of the kernel's steps that are taken
            return t
        inside = t.float().clamp(1e-4, 1 - 1e-6).to(self.allowed.device)
        return torch.from_numpy(-np.expm1(-self.schedule.sigma(inside).detach().double().cpu().numpy()))

    def reversible_noise(self) -> ReversibleNoise:
        return TokenNoise(self.kernel, self.schedule)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def evaluations(self, request: SampleRequest) -> int | None:
        steps, block = super().evaluations(request), self.objective.block
        return steps and steps * (1 if block is None else -(-(request.length or 0) // block))

    @property
    def block(self) -> int | None:
        return self.objective.block

    def span(self, request: SampleRequest) -> int | None:
        return request.length if self.block is None else self.block

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw rows of ``request.length`` tokens.

        Under a block objective (BD3-LM, arXiv 2503.09573) blocks are sampled from left to right, with ``request.steps``
        steps in each block. All prompt tokens must then lie before or in the first block with a free position. If the
        length is no multiple of the block size, the last block is sampled whole and then truncated.

        Args:
            network: The network.
            request: The request. ``prompt`` is int64 [b, l] or [1, l]: given token ids, and -1 at free positions, which
                are sampled.

        Returns:
            Token ids int64 [b, l], l being ``request.length``. Free positions get neither the mask nor forbidden
            tokens.

        Raises:
            UserError: The request has no length, or has conditions or guidance that the components do not support.
        """
        from sedd_graph.families.token_sampling import TokenSampling  # here: checking a blueprint does without it

        sampling = TokenSampling(self.parts, self.allowed, self._pieces, network, request)
        rows, conditions = sampling.rows()
        facts: dict[str, Any] = {"mask": self.kernel.mask, "clamped": self.sampler.clamped}
        told = conditions.model_dump(mode="json", include=set(Conditions.model_fields), exclude_defaults=True)
        facts |= {"conditions": told} if told else {}
        facts |= {} if sampling.effective is None else {"effective_particles": sampling.effective}
        if self.plan.classifier is not None:
            facts["classifier"] = {k: v for k, v in self.plan.classifier.record().items() if k != "counts"}
        given = None if request.prompt is None else (request.prompt >= 0).cpu().expand(*rows.shape)
        return Samples(rows, facts | {"evaluations": self.sampler.evaluations}, given=given)

    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        arrays, text = samples.arrays(), self.texts(samples.rows, tokenizer)
        pad, end = (None, None) if tokenizer is None else (tokenizer.pad, tokenizer.end)
        return Stored({**arrays, "lengths": document_lengths(arrays["tokens"], pad=pad, end=end)}, text)

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
        self, text: TextWithHoles, tokenizer: Tokenizer, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """Encode text with holes of known sizes as a prompt.

        Args:
            text: Either ``text.text``, in which ``[[N]]`` stands for N tokens to fill in, or ``text.prefix`` and
                ``text.suffix``, with one unmarked hole between them, which fills the row.
            tokenizer: Tokenizer of the model.
            length: Number of tokens of the row for a prefix and a suffix, if ``text.length`` is None.
            prompts_trained: True if rows of the training data begin with clean prompts.
            observed: ``clamp`` to fix the given tokens, ``renoise`` to noise them anew at each step.

        Returns:
            The prompt, token ids int64 [1, l] with -1 at positions to fill in. ``exact`` is True if samples follow the
            model's distribution given the prompt.

        Raises:
            UserError: The text has no position to fill in, is too long, or has tokens that the tokenizer forbids.
        """
        text.check("The [[12]] is")
        row = fill_holes(text, tokenizer, text.length or length)
        if text.length is not None and text.length != len(row):
            if text.length < len(row):
                raise UserError(f"infill: the text has {len(row)} tokens, more than --length {text.length}")
            row += [FREE] * (text.length - len(row))
        check_row(row, tokenizer)
        if FREE not in row:
            raise UserError("infill: nothing is free: write [[N]] with N of at least 1 where the model is to write")
        exact, how = self._exactness(prompts_trained, observed)
        return Prompt(torch.tensor([row], dtype=torch.int64), len(row), exact, how)

    def _exactness(self, prompts_trained: bool, observed: str) -> tuple[bool, str]:
        """Return True if samples given a prompt follow the model's conditional distribution, and the reason."""
        if self.kernel.clamp_safe:
            return True, "exact: the given text is held fixed, and with this kernel a visible token is a clean token"
        if observed == "clamp" and prompts_trained:
            how = "as trained: the given text is held fixed, and the model was trained on rows with clean prompts"
            return True, how
        done = "holding the given text fixed" if observed == "clamp" else "noising the given text anew at each step"
        return False, (
            f"the kernel {self.plan.kernel.name!r} can move every token, so {done} is a heuristic: "
            "samples do not follow the model's distribution given that text"
        )

    # -- verification -----------------------------------------------------------------------------------------------

    @classmethod
    def prove(cls, plan: ProcessPlan, graph: Graph, registry: Registry, proof: Proof) -> list[Check]:
        from sedd_graph.verify.block_diffusion import prove_blocks

        checks, parts = prove(plan, registry, proof), make_parts(plan, registry)
        return checks + ([] if parts.objective.block is None else prove_blocks(graph, parts, registry, plan.output))

    @classmethod
    def prove_distillation(cls, plan: ProcessPlan, registry: Registry, objective: Distillation) -> list[Check]:
        from sedd_graph.families.token_distillation import TokenDistillable
        from sedd_graph.verify.distillation import prove_distillation
        from sedd_graph.verify.token_distillation import token_case
        from sedd_graph.verify.toy import PAIR, TRIPLE, make_toy

        make = partial(make_parts, plan, registry)
        toy = make_toy(make, TRIPLE if make(None).objective.block is None else PAIR)
        return prove_distillation(token_case(toy, TokenDistillable(toy.parts, plan.output), plan.output), objective)

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        yield from super().check_data(data)
        block = self.objective.block
        if block is not None and isinstance(data, DataConfig) and data.length % block:
            message = f"rows of {data.length} tokens are no whole number of blocks of {block} (objective.block)"
            yield "data.length", message

    def check_network(self, network: Network) -> list[Check]:
        from sedd_graph.verify.classifier import check_classifier
        from sedd_graph.verify.output import check_output

        found = [check_output(network, self.kernel, self.objective)]
        if self.classifier is not None:
            found += check_classifier(self.classifier, self.kernel.states)
        return found
