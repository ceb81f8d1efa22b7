"""Requests on their way through the server: a job has rows to sample, with settings, and a mailbox for what is sampled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.runs.serve.wire import Refused

__all__ = ["Job", "Mailbox", "Row", "Settings", "Tokens", "Update"]

Tokens = npt.NDArray[np.int64]
"""Type of an array of token ids, int64 [l]."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows are sampled. Rows of equal settings may share a batch.

    Attributes:
        sampler: Name of the sampler.
        steps: Number of steps; None: that of the run.
        temperature: Sampling temperature; None: that of the run.
        top_p: Nucleus sampling; None: that of the run.
        conditions: Conditions on the text; None for a model that has none.
    """

    sampler: str
    steps: int | None
    temperature: float | None
    top_p: float | None
    conditions: Conditions | None


@dataclasses.dataclass(eq=False)
class Row:
    """A row to be sampled, which becomes one choice of an answer.

    Attributes:
        index: Number of the choice.
        prompt: Given tokens, and -1 where the model writes, int64 [p]; one -1 for a hole of any length.
        length: Number of tokens of the row; the largest number if the model chooses lengths.
        bucket: Rows of equal buckets may share a batch.
        seed: Seed of the row.
        whole: Whether its answer is the whole text: the prompt has holes. Otherwise it is what the model wrote.
        around: Text before and after what the model writes.
        ended: Whether the row needs no more sampling.
    """

    index: int
    prompt: Tokens
    length: int
    bucket: int
    seed: int
    whole: bool = False
    around: tuple[str, str] = ("", "")
    ended: bool = False

    @property
    def given(self) -> npt.NDArray[np.bool_]:
        """True at given tokens, bool [p]."""
        return self.prompt >= 0


@dataclasses.dataclass(frozen=True)
class Update:
    """What is known of a row. Each array replaces that of earlier updates, so that any of these may be left out.

    Attributes:
        step: Number of steps taken.
        draft: The row after the last step, int64 [l]; None if it was not asked for.
        written: Tokens of the finished blocks, or of the whole row, int64 [m]; None: none are finished.
        given: True at given tokens of ``written``, bool [m]; None: those of the prompt, position by position.
        final: Whether ``written`` is the whole row.
    """

    step: int = 0
    draft: Tokens | None = None
    written: Tokens | None = None
    given: npt.NDArray[np.bool_] | None = None
    final: bool = False

    def after(self, other: Update | None) -> Update:
        """Return this update with what only the earlier update ``other`` has."""
        if other is None:
            return self
        return dataclasses.replace(
            self,
            step=max(self.step, other.step),
            draft=other.draft if self.draft is None and not self.final else self.draft,
            written=other.written if self.written is None else self.written,
        )


class Mailbox:
    """Updates of a job's rows, from the sampling thread to the event loop.

    The sampling thread never waits: it replaces the updates that were not read yet, so that a mailbox holds at most one
    for each row, however slow the client is.

    Args:
        loop: Event loop of the reader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock, self._news = loop, threading.Lock(), asyncio.Event()
        self._updates, self._error = dict[int, Update](), None  # type: dict[int, Update], Refused | None

    def post(self, index: int, update: Update) -> None:
        """Replace the update of a row. Called by the sampling thread."""
        with self._lock:
            self._updates[index] = update.after(self._updates.get(index))
        self._wake()

    def fail(self, error: Refused) -> None:
        """End the job with an error. May be called by any thread."""
        with self._lock:
            self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def read(self) -> list[tuple[int, Update]]:
        """Wait for updates, and return them by number of the row. Raises :class:`Refused` if the job has failed."""
        await self._news.wait()
        with self._lock:
            self._news.clear()
            found, self._updates, error = self._updates, {}, self._error
        if error is not None:
            raise error
        return sorted(found.items())


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was read and checked: its rows wait in the queue, are sampled, and are posted to its mailbox.

    Attributes:
        name: Name of the request, which its answer repeats.
        rows: The rows that are still to be sampled.
        settings: How they are sampled.
        mailbox: Receives what is sampled.
        stops: Texts before the first of which a written text ends.
        drafts: Whether the client plays the rows after each step.
        partial: Whether the client reads blocks as they are finished.
        deadline: Time of :func:`time.monotonic` at which the request is refused.
        cancelled: Whether the client has gone.
    """

    name: str
    rows: list[Row]
    settings: Settings
    mailbox: Mailbox
    stops: Sequence[str] = ()
    drafts: bool = False
    partial: bool = False
    deadline: float = float("inf")
    cancelled: bool = False

    def over(self) -> bool:
        """Return whether nobody waits for the job any more: it was cancelled, or its time is over."""
        return self.cancelled or time.monotonic() > self.deadline
