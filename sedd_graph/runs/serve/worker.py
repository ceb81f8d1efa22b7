"""The thread that samples: it takes rows that fit together from the queue of jobs, and posts what is sampled."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from sedd_graph.errors import UserError
from sedd_graph.runs.serve.jobs import Job, Row, Settings, Update
from sedd_graph.runs.serve.metrics import Metrics
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.reading import told
from sedd_graph.runs.serve.wire import Refused

__all__ = ["Worker"]

LOG = logging.getLogger("sedd_graph.serve")
Member = tuple[Job, Row]
"""A row of a batch, with its job."""


class _Abandoned(Exception):
    """Exception that ends a batch of which no row is needed any more."""


class Worker(threading.Thread):
    """The sampling thread, which alone evaluates the network, and its queue.

    The oldest job determines the settings and the bucket of a batch; rows of other jobs that fit fill it up. A job of
    which rows are left goes to the end of the queue, so that a large one does not keep others waiting.

    Args:
        model: The model.
        metrics: Counters of the server.
    """

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        super().__init__(name="sampling", daemon=True)
        self.model, self._metrics = model, metrics
        self._queue, self._running = deque[Job](), list[Member]()
        self._changed, self._stopping, self._seconds = threading.Condition(), False, 1.0

    # -- called by the event loop ---------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            Refused: The queue is full, or the server stops.
        """
        with self._changed:
            if self._stopping:
                raise Refused(503, "the server is stopping", code="stopping")
            if len(self._queue) >= self.model.limits.queue:
                wait = min(60, math.ceil(self._seconds * len(self._queue) / self.model.limits.batch))
                raise Refused(
                    429,
                    f"{len(self._queue)} requests are waiting, which is the limit",
                    code="queue_full",
                    retry_after=max(1, wait),
                )
            self._queue.append(job)
            self._metrics.gauge("queue_requests", len(self._queue))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job, if it is not finished. Rows that are being sampled are dropped at the next step, or discarded."""
        with self._changed:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                self._metrics.gauge("queue_requests", len(self._queue))

    def refuse(self) -> None:
        """Refuse new jobs from now on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """Refuse new jobs, fail those that wait or run, and end the thread after the current step."""
        with self._changed:
            self._stopping = True
            left = {id(job): job for job in [*self._queue, *(job for job, _ in self._running)]}
            self._queue.clear()
            for job in left.values():
                job.cancelled = True
                job.mailbox.fail(Refused(503, "the server is stopping", code="stopping"))
            self._changed.notify()

    # -- the thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Sample batches until the server stops and the queue is empty."""
        while (batch := self._next()) is not None:
            if batch:
                self._attempt(batch)
            with self._changed:
                self._running = []
            self._metrics.gauge("running_rows", 0)

    def _next(self) -> list[Member] | None:
        """Wait for jobs, and take a batch of rows from them. Return None if the server stops."""
        with self._changed:
            while not self._queue:
                if self._stopping:
                    return None
                self._changed.wait()
            batch = self._taken()
            self._running = batch
            self._metrics.gauge("queue_requests", len(self._queue))
            return batch

    def _taken(self) -> list[Member]:
        """Take a batch of rows that fit together from the queue: first those of the oldest job."""
        for job in [job for job in self._queue if job.over()]:  # cancelled ones were removed
            self._queue.remove(job)
        if not self._queue:
            return []
        first = self._queue.popleft()
        settings, bucket = first.settings, first.rows[0].bucket
        most, batch, emptied = self.model.most(settings), list[Member](), list[Job]()
        for job in (first, *self._queue):
            if job.settings != settings:
                continue
            for row in [row for row in job.rows if row.bucket == bucket][: most - len(batch)]:
                job.rows.remove(row)
                batch.append((job, row))
            if not job.rows:
                emptied.append(job)
            if len(batch) == most:
                break
        for job in emptied:
            if job is not first:
                self._queue.remove(job)
        if first.rows:
            self._queue.append(first)
        return batch

    def _attempt(self, batch: Sequence[Member]) -> None:
        """Sample a batch. If it fails, sample the rows of each job by themselves, so that only that at fault fails."""
        batch = [(job, row) for job, row in batch if not job.over() and not row.ended]
        if not batch:
            return
        jobs = list(dict.fromkeys(job for job, _ in batch))
        try:
            self._sample(batch, jobs[0].settings)
        except _Abandoned:
            return
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._attempt([member for member in batch if member[0] is job])
                return
            self._fail(jobs[0], error)

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            if job in self._queue:  # rows of it are left
                self._queue.remove(job)
        if isinstance(error, UserError):
            job.mailbox.fail(Refused(400, told(error)))
            return
        LOG.error("%s failed", job.name, exc_info=error)
        job.mailbox.fail(Refused(500, "internal error: the server's log has more", code="internal_error"))

    def _sample(self, batch: Sequence[Member], settings: Settings) -> None:
        """Sample a batch of rows, and post the results."""
        started = time.monotonic()
        self._metrics.batch(len(batch))
        self._metrics.gauge("running_rows", len(batch))
        plays = any(job.drafts for job, _ in batch)
        ends = any(job.stops or job.partial or self.model.tokenizer.end is not None for job, _ in batch)

        def check() -> None:
            if all(row.ended or job.over() for job, row in batch):
                raise _Abandoned

        taken = 0

        def on_step(number: int, rows: Tensor) -> None:
            nonlocal taken
            taken = number
            check()
            if plays:
                for (job, row), tokens in zip(batch, rows.cpu().numpy(), strict=True):
                    if job.drafts and not row.ended:
                        job.mailbox.post(row.index, Update(step=number, draft=tokens[: row.length].copy()))

        def on_block(before: Tensor) -> None:
            if ends and before.shape[1]:
                self._post_blocks(batch, before)
            check()

        found = self.model.sample([row for _, row in batch], settings, on_step=on_step, on_block=on_block)
        self._metrics.add("network_evaluations", found.evaluations)
        for (job, row), tokens, given in zip(batch, found.tokens, found.given, strict=True):
            if not row.ended:
                done = Update(step=taken, written=tokens.copy(), given=given.copy(), final=True)
                job.mailbox.post(row.index, done)
        self._seconds = 0.5 * self._seconds + 0.5 * (time.monotonic() - started)

    def _post_blocks(self, batch: Sequence[Member], before: Tensor) -> None:
        """Post the finished blocks of the rows, and end those whose text has ended."""
        for (job, row), tokens in zip(batch, before.cpu().numpy(), strict=True):
            if row.ended:
                continue
            done, given = tokens[: row.length].copy(), row.given[: min(len(tokens), row.length)]
            row.ended = self.model.texts.written(done, given, job.stops).finish == "stop" and not row.whole
            if row.ended or job.partial:
                job.mailbox.post(row.index, Update(written=done, given=given, final=row.ended))
