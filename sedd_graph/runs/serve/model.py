"""The model that is served: requests become jobs, and rows of jobs are sampled together. Axes: b batch, l length."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.engine.process import Process, Prompt, SampleRequest, TextWithHoles
from sedd_graph.errors import UserError, suggest
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.prompts import answer_seed
from sedd_graph.runs.sample import read_prompt
from sedd_graph.runs.sample_section import sampler_settings, samplers
from sedd_graph.runs.serve.jobs import Row, Settings, Tokens
from sedd_graph.runs.serve.texts import Texts
from sedd_graph.runs.serve.wire import Completion, Limits, Refused

__all__ = ["DEFAULT_TOKENS", "Sampled", "ServedModel"]

DEFAULT_TOKENS = 16
"""Number of tokens that the model writes if a request does not say, as in OpenAI's interface."""
_HOLE = re.compile(r"\[\[\d*\]\]")
_SMALLEST = 16
"""Smallest bucket of lengths."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Sampled rows.

    Attributes:
        tokens: Tokens of each row, int64 [l].
        given: True at given tokens of each row, bool [l].
        evaluations: Number of evaluations of the network, summed over rows.
    """

    tokens: list[Tokens]
    given: list[npt.NDArray[np.bool_]]
    evaluations: int


class ServedModel:
    """An opened run folder, as a server uses it.

    :meth:`rows` and :meth:`settings` may be called by any thread, :meth:`sample` by one.

    Args:
        run: The opened run folder.
        name: Name of the model for clients.
        limits: Limits on requests.
        kv_cache: False to generate text in blocks without a KV cache (:attr:`SampleRequest.kv_cache`).

    Raises:
        UserError: The run has no tokenizer, or its rows are no text.
    """

    def __init__(self, run: Run, *, name: str, limits: Limits, kv_cache: bool = True) -> None:
        process = run.engine.process
        if not process.trains or not process.text:
            raise UserError(f"serve: {run.path} is no model of text: serve a run of tokens, strings or vectors")
        self.run, self.name, self.limits, self._kv_cache = run, name, limits, kv_cache
        self.tokenizer, self.runs = run.text_tokenizer(), samplers(run)
        self.sampler = next(iter(self.runs))
        try:
            pieces, self.playable = process.draft_tokens(self.tokenizer), "on_step" not in process.refuses
        except UserError:  # the bytes of a token depend on the tokens beside it
            pieces, self.playable = None, False
        self.texts = Texts(run, pieces)
        self._longest = max((len(p) for p in (pieces or {}).values() if p), default=0)
        self._pads = process.block is None and "attend" in run.engine.network.model.input_names
        self.infilling, self.takes = self._infilling(), self._conditions_taken()

    @property
    def process(self) -> Process:
        """The process of the run."""
        return self.run.engine.process

    # -- requests -------------------------------------------------------------------------------------------------

    def settings(self, request: Completion) -> Settings:
        """Return how the rows of a request are sampled.

        Raises:
            Refused: A setting is not one of this model's, or beyond the limits.
        """
        name = request.sampler or self.sampler
        if name not in self.runs:
            known = ", ".join(self.runs)
            raise Refused(
                400,
                f"there is no sampler {name[:60]!r} for this model{suggest(name, self.runs)}; it has {known}",
                param="sampler",
            )
        process = self.runs[name].engine.process
        if request.steps is not None and process.steps is None:
            raise Refused(400, f"the sampler {name!r} takes no number of steps: leave steps out", param="steps")
        if request.steps is not None and request.steps > self.limits.steps:
            raise Refused(400, f"steps may be up to {self.limits.steps:,} here, not {request.steps:,}", param="steps")
        keys, chosen = self.keys(name), dict[str, float | None](temperature=None, top_p=None)
        for key in chosen:
            if (value := getattr(request, key)) is not None and key not in keys and value != 1:
                raise Refused(400, f"the sampler {name!r} has no {key}: leave it out", param=key)
            chosen[key] = value if key in keys else None
        return Settings(name, request.steps, chosen["temperature"], chosen["top_p"], self._conditions(process, request))

    def keys(self, sampler: str) -> frozenset[str]:
        """Return the keys of the Config of a sampler."""
        process: Any = self.runs[sampler].engine.process
        return frozenset(type(process.sampler.config).model_fields)

    def _conditions(self, process: Process, request: Completion) -> Conditions | None:
        changes = dict[str, Any]()
        for key in ("matching", "forbid", "guidance"):
            if (value := getattr(request, key)) is not None:
                changes[key] = value
        if request.allow:
            try:
                changes["allow"] = {int(place): pattern for place, pattern in request.allow.items()}
            except ValueError:
                raise Refused(400, 'allow: positions must be integers, such as "0" or "-1"', param="allow") from None
        try:
            return process.conditions(changes)
        except UserError as error:
            raise Refused(400, told(error), param=next(iter(changes), None)) from None

    def rows(self, request: Completion, settings: Settings, seed: int) -> list[Row]:
        """Return the rows of a request, those of the first prompt first.

        Args:
            request: The request.
            settings: How its rows are sampled.
            seed: Seed of the request, from which, with the prompt and the number of the choice, that of each row follows.

        Raises:
            Refused: A prompt cannot be filled in, or the rows are too many or too long.
        """
        prompts, count = request.prompts(), request.n or 1
        if len(prompts) * count > self.limits.choices:
            raise Refused(
                400,
                f"n for each of {len(prompts)} prompts makes more than the {self.limits.choices} choices of a request",
                param="n",
            )
        found = list[Row]()
        for prompt in prompts:
            given, whole = self._prompt(prompt, request, settings)
            tokens = given.tokens[0].numpy()
            around = ("", "")
            if request.echo and not whole:
                around = (prompt if isinstance(prompt, str) else self.texts.decode(prompt), request.suffix or "")
            for sample in range(count):
                own = answer_seed(seed, given, sample)
                bucket = self._bucket(given.length, settings.conditions)
                found.append(Row(len(found), tokens, given.length, bucket, own, whole, around))
        return found

    def _prompt(self, prompt: str | list[int], request: Completion, settings: Settings) -> tuple[Prompt, bool]:
        """Return a prompt as tokens, and whether it is a text with holes."""
        most, limit = request.max_tokens or DEFAULT_TOKENS, self.limits.length
        for part in (prompt, request.suffix or ""):
            size = len(part.encode(errors="replace")) / max(1, self._longest) if isinstance(part, str) else len(part)
            if size > limit and (self._longest or not isinstance(part, str)):
                raise _too_long(f"the prompt has more than {limit:,} tokens, which is the limit of a row")
        observed = "clamp" if settings.conditions is None else settings.conditions.observed
        whole = isinstance(prompt, str) and request.suffix is None and _HOLE.search(prompt) is not None
        try:
            if whole:
                found = read_prompt(self.run, TextWithHoles(text=str(prompt)), observed=observed)
            else:
                found = self._continued(prompt, request.suffix or "", most, observed)
        except UserError as error:
            raise Refused(400, told(error), param="prompt") from None
        given = int((found.tokens >= 0).sum())
        if self.process.chooses_lengths:
            found = found._replace(length=given + most)
        elif whole and request.max_tokens is not None and found.length - given > most:
            raise Refused(
                400, f"the holes have {found.length - given:,} tokens, more than max_tokens", param="max_tokens"
            )
        if found.length > limit:
            raise _too_long(
                f"{given:,} given tokens and {found.length - given:,} to write are more than the {limit:,} of a row"
            )
        if whole and request.stop:
            raise Refused(400, "stop cuts what follows it: leave it out where a prompt has holes", param="stop")
        return found, whole

    def _continued(self, prompt: str | list[int], suffix: str, most: int, observed: str) -> Prompt:
        """Return a prompt of a text before and one after a single hole of at most ``most`` tokens."""
        before, after = (self._ids(part) for part in (prompt, suffix))
        if not before and not after:
            holes = 1 if self.process.chooses_lengths else most
            return Prompt(torch.full((1, holes), -1), most, True, "nothing is given")
        length = len(before) + most + len(after)
        if length > 2**20:
            raise _too_long(f"the row has {length:,} tokens")
        return read_prompt(self.run, TextWithHoles(prefix=before, suffix=after, length=length), observed=observed)

    def _ids(self, part: str | list[int]) -> list[int]:
        """Return the token ids of a part of a prompt, which may be its ids."""
        if not isinstance(part, str):
            return part
        return [int(i) for i in self.tokenizer.encode(part)] if part else []

    def _bucket(self, length: int, conditions: Conditions | None) -> int:
        """Return the bucket of rows of a length. Rows of a bucket may be sampled together."""
        if conditions is not None and (conditions.matching is not None or conditions.allow):
            return length  # positions are counted from the end, too
        if (block := self.process.block) is not None:
            return -(-length // block) * block
        return max(_SMALLEST, 1 << (length - 1).bit_length()) if self._pads else length

    # -- sampling -------------------------------------------------------------------------------------------------

    def most(self, settings: Settings) -> int:
        """Return how many rows of equal settings and buckets may be sampled together."""
        if self._shares_noise(settings):
            return 1
        return max(1, self.limits.batch // (1 if settings.conditions is None else settings.conditions.particles))

    def _shares_noise(self, settings: Settings) -> bool:
        """Return whether the noise of a row would depend on the other rows of its batch."""
        noisy = settings.conditions is not None and settings.conditions.observed == "renoise"
        return noisy or "seeds" in self.process.refuses

    def sample(
        self,
        rows: Sequence[Row],
        settings: Settings,
        *,
        on_step: Callable[[int, Tensor], None] | None = None,
        on_block: Callable[[Tensor], None] | None = None,
    ) -> Sampled:
        """Sample rows of equal buckets together.

        Args:
            rows: The rows, at most :meth:`most`.
            settings: Their settings.
            on_step: Callback of the steps (:attr:`SampleRequest.on_step`).
            on_block: Callback of the blocks (:attr:`SampleRequest.on_block`).

        Raises:
            UserError: The rows cannot be sampled with these settings.
        """
        run, conditions = self.runs[settings.sampler], settings.conditions
        changed = {"temperature": settings.temperature, "top_p": settings.top_p}
        many = conditions is not None and conditions.particles > 1  # most of their rows are not returned
        request = dataclasses.replace(
            self._request(rows, settings),
            on_step=None if many or "on_step" in self.process.refuses else on_step,
            on_block=on_block,
        )
        with sampler_settings(run, **{key: value for key, value in changed.items() if value is not None}):
            samples = run.engine.generate(request)
        tokens, given = list[Tokens](), list[npt.NDArray[np.bool_]]()
        told = np.zeros(samples.rows.shape, np.bool_) if samples.given is None else samples.given.numpy()
        for row, made, fixed in zip(rows, samples.rows.numpy(), told, strict=True):
            tokens.append(made[: row.length])
            given.append(fixed[: row.length])
        return Sampled(tokens, given, int(samples.facts.get("evaluations", 0)))

    def _request(self, rows: Sequence[Row], settings: Settings) -> SampleRequest:
        """Return the sampling request of rows of equal buckets, shorter ones padded to the longest."""
        length, attend = max(row.length for row in rows), None
        if self.process.block is not None:
            length = rows[0].bucket
        prompt = torch.full((len(rows), length), -1)
        if self.process.chooses_lengths:
            prompt = torch.from_numpy(rows[0].prompt)[None]
        else:
            for place, row in enumerate(rows):
                prompt[place, : row.length] = torch.from_numpy(row.prompt)
        if self._pads and any(row.length != length for row in rows):
            attend = torch.arange(length) < torch.tensor([row.length for row in rows])[:, None]
        return SampleRequest(
            batch=len(rows),
            length=length,
            steps=settings.steps,
            seed=rows[0].seed,
            seeds=None if self._shares_noise(settings) else torch.tensor([row.seed for row in rows]),
            prompt=prompt if bool((prompt >= 0).any()) else None,
            attend=attend,
            conditions=settings.conditions,
            kv_cache=self._kv_cache,
        )

    # -- what the model can do ------------------------------------------------------------------------------------

    def require_memory(self, *, ignore: bool, say: Callable[[str], None]) -> None:
        """Compare the memory of the largest batch with what the device has. Raises :class:`UserError` if it is too much."""
        rows = 1 if "seeds" in self.process.refuses else self.limits.batch
        request = SampleRequest(batch=rows, length=self.limits.length)
        require_sampling_memory(self.run, request, trajectory=False, ignore=ignore, say=say)

    def _infilling(self) -> Prompt | None:
        """Return an encoded text with a hole; None if the model cannot fill in text."""
        known = next(i for i in range(self.tokenizer.size) if i not in self.tokenizer.forbidden)
        text = TextWithHoles(prefix=[known], length=2)
        with contextlib.suppress(UserError):
            return read_prompt(self.run, text, observed=getattr(self.process.conditions({}), "observed", "clamp"))
        return None

    def _conditions_taken(self) -> frozenset[str]:
        """Return which conditions the model takes, by sampling a short text under each. This warms the network up, too."""
        found = set[str]()
        length = min(self.limits.length, 2 if self.process.block is None else self.process.block)
        steps = None if self.process.steps is None else 1
        changes: dict[str, dict[str, Any]] = {
            "": {},
            "matching": {"matching": "(.|\\n)*"},
            "forbid": {"forbid": ["\N{REPLACEMENT CHARACTER}"]},
            "allow": {"allow": {0: "(.|\\n)*"}},
        }
        for name, change in changes.items():
            try:
                conditions = self.process.conditions(change)
                request = SampleRequest(batch=1, length=length, steps=steps, seed=0, conditions=conditions)
                self.run.engine.generate(request)
                found.add(name)
            except UserError:
                if not name:
                    raise
        return frozenset(found - {""})


def _too_long(message: str) -> Refused:
    return Refused(
        400, f"{message}: take a shorter prompt, or fewer max_tokens", code="context_length_exceeded", param="prompt"
    )


def told(error: Exception) -> str:
    """Return a message that was written for the command line in the words of a request."""
    text = re.sub(r"^(infill|sample): ", "", str(error))
    return re.sub(
        r"--([a-z-]+)", lambda match: "the prompt" if match[1] == "text" else match[1].replace("-", "_"), text
    )
