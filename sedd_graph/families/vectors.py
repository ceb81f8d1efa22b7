"""Processes on tokens as vectors (the family ``vectors``): Gaussian diffusion of the embeddings of token rows.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import Registry
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Batch, Randomness, nothing_hidden
from sedd_graph.diffusion.conditions.allowed import allowed_tokens
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.flow import Flow
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import VectorDraw
from sedd_graph.diffusion.vectors.reversible import ReversibleSampler
from sedd_graph.diffusion.vectors.sampler import VectorWalkSettings
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import KERNEL, SCHEDULE, Setup
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import Prompt, SampleRequest, Samples, Stored, TextWithHoles
from sedd_graph.errors import UserError
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
)
from sedd_graph.families.vectors_inversion import VectorInversion
from sedd_graph.families.vectors_parts import make_parts
from sedd_graph.graph.model import Graph

__all__ = ["VectorProcess", "make_parts", "prove"]


def prove(plan: ProcessPlan, registry: Registry, proof: Proof = "full") -> list[Check]:
    """Verify the process on an enumerable toy of few tokens with known vectors; takes seconds on a CPU.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks of schedule, kernel, objective and sampler.
    """
    from sedd_graph.verify.vectors import prove_vectors

    return prove_vectors(partial(make_parts, plan, registry), plan.output, proof)


class VectorProcess(TextProcess):
    """Gaussian diffusion of the embeddings of token rows of a fixed length.

    Args:
        plan: Validated description of the process.
        setup: Graph, registry and device of the process.

    Attributes:
        parts: The components, which are attributes too.
    """

    family = "vectors"
    kernel: VectorKernel
    refuses: ClassVar[Mapping[str, str]] = {
        "classifier": "a classifier of tokens does not guide vectors (declare sample.classifier in the blueprint)",
        "seeds": "its sampler moves real numbers with the noise of the whole batch",
        "tape": "its sampler moves real numbers, whose road is exact only for a sampler with exact steps, such as "
        "reversible_heun",
        "on_confidence": "its sampler moves real numbers, and draws no token from a distribution",
    }

    def __init__(self, plan: ProcessPlan, setup: Setup) -> None:
        self.parts = make_parts(plan, setup.registry)
        super().__init__(plan, setup, self.parts)
        self.kernel, self.schedule, self.objective, self.sampler, self.classifier = self.parts

    @cached_property
    def allowed(self) -> Tensor:
        """Mask of the tokens that samples may contain, bool [v]."""
        return all_but(self._forbidden, self.kernel.data_tokens).to(self._device)

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        return {n: p for n, p in ((KERNEL, self.kernel), (SCHEDULE, self.schedule)) if p.learned}

    @property
    def loss_unit(self) -> str:
        return self.objective.unit

    def batch(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        batch = self.tokens(rows, device)
        check_tokens(batch.tokens, self.kernel.data_tokens)
        return batch

    def draw(
        self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None
    ) -> VectorDraw:
        if xt is not None:
            raise UserError(
                "loss: noisy vectors cannot be given, since they depend on trained embeddings: leave xt out"
            )
        return self.objective.draw(batch, self.kernel, self.schedule, random=random, t=t)

    def denoiser(self, run: Any, model: Model, attend: Tensor, key: Tensor | None = None) -> Denoiser:
        """Return the network as a function of noisy vectors and time.

        Args:
            run: Evaluates the graph, given its inputs by name and the dropout keys of the rows, if there are any.
            model: Module of the network; with an input ``estimate`` it is self-conditioned.
            attend: Positions that may be attended to, bool [b, l].
            key: Dropout key of each row, int32 [b]; None turns dropout off.
        """
        own = "estimate" in model.input_names
        return Denoiser(run, self.kernel, self.schedule, attend, self_conditioned=own, key=key)

    def loss(
        self, model: Model, draw: VectorDraw, batch: Batch, key: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}

        def run(inputs: Mapping[str, Tensor], key: Tensor | None = None) -> Mapping[str, Tensor]:
            outputs, saved = model.run(inputs, key)
            kept.update(saved)
            return outputs

        denoise = self.denoiser(run, model, batch.attend, key)
        return self.objective.loss(denoise, draw, batch, self.kernel, self.schedule).float(), kept

    def bound_draws(self, network: Network, batch: Batch, parts: Sequence[range], seed: int) -> Iterator[BoundDraw]:
        flow, fixed = self._flow(), (self.kernel, self.schedule)
        for part in parts:
            own, random = batch.part(part), self.randomness(batch, part, seed)
            denoise = self.denoiser(network.run, network.model, own.attend)
            if flow is not None:
                yield BoundDraw(self.objective.over, None, flow.likelihood(denoise, own, random).nats)
                continue
            draw = self.objective.bound_draw(own, *fixed, random=random)
            nats = self.objective.bound(denoise, draw, own, *fixed)
            below = self.objective.reconstruction(denoise, own, *fixed, random=random)
            yield BoundDraw(self.objective.over, draw.t, nats, None if below is None else below.double())

    def measures(self, network: Network, batch: Batch, part: range, *, seed: int) -> Mapping[str, Tensor]:
        """Return the number of tokens of each row that the network recovers at the lowest noise, float [len(part)]."""
        random, batch = self.randomness(batch, part, seed), batch.part(part)
        denoise = self.denoiser(network.run, network.model, batch.attend)
        parts = self.kernel, self.schedule
        return {"rounding_accuracy": self.objective.recovered(denoise, batch, *parts, random=random)}

    def _flow(self) -> Flow | None:
        """Return the ODE whose likelihood is computed; None for the bound."""
        return self.objective.flow(self.kernel, self.schedule) if self.likelihood == "ode" else None

    @property
    def likelihoods(self) -> tuple[str, ...]:
        found = self.objective.flow(self.kernel, self.schedule)
        return ("bound",) if found is None else ("bound", "ode")

    @property
    def caveat(self) -> str | None:
        flow = self._flow()
        return self.objective.caveat() if flow is None else flow.caveat

    def noised(self, over: str, t: Tensor) -> Tensor:
        if over != "time":
            return t
        inside = t.double().clamp(1e-4, 1 - 1e-6).to(self._device)
        return -torch.expm1(-self.schedule.sigma(inside).detach().double().cpu())

    # -- sampling ---------------------------------------------------------------------------------------------------

    def evaluations(self, request: SampleRequest) -> int | None:
        return request.steps or self.steps

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw rows of ``request.length`` tokens.

        Args:
            network: The network.
            request: The request. ``prompt`` is int64 [b, l] or [1, l]: given token ids, and -1 at free positions.

        Returns:
            Token ids int64 [b, l], l being ``request.length``.

        Raises:
            UserError: The request has no length, or its prompt, conditions or number of steps do not fit the process.
        """
        if request.length is None:
            raise UserError("sample: give a length: the number of tokens of each row")
        shape, device = (request.batch, request.length), network.device
        tokens = torch.full(shape, FREE, device=device)
        if request.prompt is not None:
            prompt = request.prompt
            if prompt.dim() != 2 or prompt.shape[1] != shape[1] or prompt.shape[0] not in (1, shape[0]):
                raise UserError(f"sample: prompt must be {list(shape)} (or one row), not {list(prompt.shape)}")
            check_tokens(prompt.clamp(min=0), self.kernel.data_tokens)
            tokens = prompt.to(device).expand(shape)
        free = tokens < 0
        conditions = request.conditions or self.conditions({})
        settings = VectorWalkSettings(
            kernel=self.kernel,
            schedule=self.schedule,
            generator=request.generator(device),
            tokens=tokens.clamp(min=0),
            free=free,
            renoise=conditions.observed == "renoise",
            allowed=self._may(request, conditions),
            classifier=self.classifier,
            on_step=request.on_step,
        )
        attend = nothing_hidden(*shape, device) if request.attend is None else request.attend.to(device).expand(shape)
        with network.evaluating():
            denoise = self.denoiser(network.run, network.model, attend)
            rows = self.sampler.run(denoise, settings, steps=request.steps).cpu()
        facts: dict[str, Any] = {"mask": None, "evaluations": self.sampler.evaluations}
        told = conditions.model_dump(mode="json", include={"forbid", "allow"}, exclude_defaults=True)
        facts |= {"conditions": told} if told else {}
        if self.plan.classifier is not None:
            facts["classifier"] = {k: v for k, v in self.plan.classifier.record().items() if k != "counts"}
        return Samples(rows, facts, given=None if request.prompt is None else (~free).cpu())

    def inversion(self, steps: int | None = None) -> VectorInversion | None:
        if not isinstance(self.sampler, ReversibleSampler):
            return None
        return VectorInversion(self.parts, self.sampler, self.allowed, steps)

    def _may(self, request: SampleRequest, conditions: Conditions) -> Tensor:
        """Return the tokens that may be sampled, bool [v], [l, v] or [b, l, v]."""
        may, allowed, length = self.allowed, request.allowed, request.length or 0
        if allowed is not None:
            shape = (request.batch, length, len(may))
            if allowed.dtype != torch.bool or allowed.shape not in (shape, shape[1:], shape[2:]):
                raise UserError(
                    f"sample: allowed must be bool {list(shape[2:])}, {list(shape[1:])} or {list(shape)}, "
                    f"not {allowed.dtype} {list(allowed.shape)}"
                )
            may = may & allowed.to(self._device)
        return allowed_tokens(conditions, may, length, self._spelled)

    def _spelled(self) -> list[bytes | None]:
        """Return the bytes of each token (None without text). Raises :class:`UserError` without a tokenizer."""
        if self._pieces is None:
            raise UserError("there is no tokenizer, so tokens have no text: build from a run folder that has one")
        pieces, tokens = self._pieces(), self.kernel.data_tokens
        return [*pieces, *[None] * (tokens - len(pieces))][:tokens]

    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        arrays, text = samples.arrays(), self.texts(samples.rows, tokenizer)
        pad, end = (None, None) if tokenizer is None else (tokenizer.pad, tokenizer.end)
        return Stored({**arrays, "lengths": document_lengths(arrays["tokens"], pad=pad, end=end)}, text)

    def conditions(self, changes: Mapping[str, Any]) -> Conditions:
        config = self.sampler.config
        held: dict[str, Any] = {name: getattr(config, name) for name in ("forbid", "allow", "observed")}
        for name, value in changes.items():
            if name not in held:
                raise UserError(
                    f"vectors are rounded to tokens at the end, so --{name} cannot be observed: leave it out"
                )
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
        """Encode text with holes of known sizes as a prompt; arguments as for the family ``tokens``.

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
        if prompts_trained and observed == "clamp":
            how = (
                "as trained: the embeddings of the given text are held fixed, as in training on rows with clean prompts"
            )
            return Prompt(torch.tensor([row], dtype=torch.int64), len(row), True, how)
        done = "holding its embeddings fixed" if observed == "clamp" else "noising its embeddings anew at each step"
        how = f"{done} is a heuristic: samples do not follow the model's distribution given that text"
        return Prompt(torch.tensor([row], dtype=torch.int64), len(row), False, how)

    # -- verification -----------------------------------------------------------------------------------------------

    @classmethod
    def prove(cls, plan: ProcessPlan, graph: Graph, registry: Registry, proof: Proof) -> list[Check]:
        return prove(plan, registry, proof)

    def check_network(self, network: Network) -> list[Check]:
        from sedd_graph.verify.vectors import check_vector_output

        return [check_vector_output(network, self)]
