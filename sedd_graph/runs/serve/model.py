"""The model that is served: requests become jobs, and rows of jobs are sampled together. Axes: b batch, l length."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.engine.process import Process
from sedd_graph.engine.samples import Prompt, SampleRequest, TextWithHoles
from sedd_graph.errors import UserError
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.sample import read_prompt
from sedd_graph.runs.sample_section import sampler_settings, samplers
from sedd_graph.runs.serve.jobs import Row, Settings, Tokens
from sedd_graph.runs.serve.texts import Texts
from sedd_graph.runs.serve.wire import Limits

__all__ = ["Sampled", "ServedModel"]

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

    Only one thread calls :meth:`sample`.

    Args:
        run: The opened run folder.
        name: Name of the model for clients.
        limits: Limits on requests.
        kv_cache: False to generate text in blocks without a KV cache (:attr:`SampleRequest.kv_cache`).

    Attributes:
        runs: The run with each sampler that fits it, by name.
        sampler: Name of the run's own sampler.
        texts: Text of its tokens.
        longest: Largest number of bytes of a token; 0 if it is unknown.
        playable: Whether rows between two steps can be shown.
        infilling: An encoded text with a hole; None if the model cannot fill in text.
        takes: Names of the conditions that the model takes.

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
        self.longest = max(4, *(len(p or b"") for p in pieces.values())) if pieces else 0
        self._pads = process.block is None and "attend" in run.engine.network.model.input_names
        self.infilling, self.takes = self._infilling(), self._conditions_taken()

    @property
    def process(self) -> Process:
        """The process of the run."""
        return self.run.engine.process

    def keys(self, sampler: str) -> frozenset[str]:
        """Return the keys of the Config of a sampler."""
        process: Any = self.runs[sampler].engine.process
        return frozenset(type(process.sampler.config).model_fields)

    def bucket(self, length: int, conditions: Conditions | None) -> int:
        """Return the bucket of rows of a length. Rows of equal buckets may be sampled together."""
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
        many = conditions is not None and conditions.particles > 1  # most of their rows are not returned, nor shown
        request = dataclasses.replace(
            self._request(rows, settings),
            on_step=None if many or "on_step" in self.process.refuses else on_step,
            on_block=None if many else on_block,
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
