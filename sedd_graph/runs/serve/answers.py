"""Answers in OpenAI's format: one JSON object, or server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.runs.serve.jobs import Job, Row, Tokens
from sedd_graph.runs.serve.metrics import Metrics
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.texts import Written, safe_length
from sedd_graph.runs.serve.wire import Completion

__all__ = ["Answer"]


class Answer:
    """The answer to one request, which reads the mailbox of its job.

    Args:
        model: The model.
        request: The request.
        job: Its job.
        seed: Seed of the request.
        metrics: Counters of the server.
    """

    def __init__(self, model: ServedModel, request: Completion, job: Job, seed: int, metrics: Metrics) -> None:
        self._model, self._request, self._job, self._seed, self._metrics = model, request, job, seed, metrics
        self._rows, self._count = {row.index: row for row in job.rows}, len(job.rows)
        self._created, self._tokens = int(time.time()), 0
        self._prompt_tokens = sum(int(row.given.sum()) for row in job.rows if row.index % (request.n or 1) == 0)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._job.name,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "seed": self._seed,
        }

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}

    def _written(self, row: Row, tokens: Tokens, given: npt.NDArray[np.bool_] | None) -> Written:
        most = None
        if self._model.process.chooses_lengths:
            most = row.length - int(row.given.sum())
        told = row.given[: len(tokens)] if given is None else given
        return self._model.texts.written(tokens, told, self._job.stops, most=most)

    def _count_tokens(self, written: Written) -> None:
        self._tokens += written.count
        self._metrics.add("completion_tokens", written.count)

    async def whole(self) -> dict[str, Any]:
        """Wait for all rows, and return the answer as a JSON object. Raises :class:`Refused` if the job fails."""
        choices, left = dict[int, dict[str, Any]](), self._count
        while left:
            for index, update in await self._job.mailbox.read():
                if not update.final or update.written is None:
                    continue
                row, left = self._rows[index], left - 1
                written = self._written(row, update.written, update.given)
                self._count_tokens(written)
                text = written.whole if row.whole else row.around[0] + written.text + row.around[1]
                choices[index] = {
                    "index": index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": written.finish,
                    "filled": written.parts,
                }
        self._metrics.add("prompt_tokens", self._prompt_tokens)
        return {**self._head(), "choices": [choices[index] for index in sorted(choices)], "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events. Raises :class:`Refused` if the job fails."""
        sent, drafts, left = dict[int, int](), dict[int, list[str | None]](), self._count
        for index, row in self._rows.items():
            if row.around[0]:
                yield self._event(index, row.around[0])
        while left:
            for index, update in await self._job.mailbox.read():
                draft = update.written if update.final and self._job.drafts else update.draft
                if draft is not None:
                    yield self._draft(index, update.step, draft, drafts)
                if update.written is None:
                    continue
                row = self._rows[index]
                written = self._written(row, update.written, update.given)
                text, start = written.whole if row.whole else written.text, sent.get(index, 0)
                size = len(text) if update.final else safe_length(text, self._job.stops)
                if size > start or update.final:
                    tail = row.around[1] if update.final else ""
                    more: dict[str, Any] = {"filled": written.parts} if update.final else {}
                    yield self._event(index, text[start:size] + tail, written.finish if update.final else None, **more)
                    sent[index] = max(start, size)
                if update.final:
                    left -= 1
                    self._count_tokens(written)
        self._metrics.add("prompt_tokens", self._prompt_tokens)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _event(self, index: int, text: str, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **more}
        return event({**self._head(), "choices": [choice]})

    def _draft(self, index: int, step: int, tokens: Tokens, drafts: dict[int, list[str | None]]) -> bytes:
        """Return the event of a draft: its tokens, and the positions that changed since the last one that was sent."""
        before, now = drafts.get(index), self._model.texts.draft(tokens)
        drafts[index] = now
        changed = [at for at, text in enumerate(now) if before is None or at >= len(before) or before[at] != text]
        more: dict[str, Any] = {"draft": now, "changed": changed, "step": step}
        if before is None and not self._model.process.chooses_lengths:
            more["given"] = np.flatnonzero(self._rows[index].given).tolist()
        return self._event(index, "", **more)


def event(content: dict[str, Any]) -> bytes:
    """Return a server-sent event with a JSON object."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode(errors="replace")
