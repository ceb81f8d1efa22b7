"""The queue and the sampling thread: batches, fairness, faults, clients that leave, and what a row depends on."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sedd_graph.errors import UserError
from sedd_graph.runs.serve.jobs import Job, Mailbox, Row, Settings, Update
from sedd_graph.runs.serve.metrics import Metrics
from sedd_graph.runs.serve.model import Sampled, ServedModel
from sedd_graph.runs.serve.reading import read_rows, read_settings
from sedd_graph.runs.serve.wire import Completion, Limits, Refused
from sedd_graph.runs.serve.worker import Worker

PROMPTS = [
    "The [[14]] statement.",
    "a [[3]] b [[2]]",
    "def [[7]]:",
    "",
    "or [[7]]: ",
    "The statement [[20]]",
    "x[[11]]",
]
LEFT = ["The ", "a", "", "def f(x):", "or a and b", "The statement"]
"""Prompts of a model that writes from left to right."""


def rows_of(model: ServedModel, prompts: Sequence[str], **fields: Any) -> tuple[list[Row], Settings]:
    request = Completion(prompt=list(prompts), seed=7, **fields)
    settings = read_settings(model, request)
    return read_rows(model, request, settings, 7), settings


@pytest.mark.parametrize("name", ["mdlm-tiny", "padded", "sedd-uniform-tiny", "bd3lm-tiny", "did-tiny"])
def test_tokens_do_not_depend_on_other_requests(served: Callable[[str], ServedModel], name: str) -> None:
    """Alone, and in batches of other prompts, in other orders and sizes: the same tokens."""
    model = served(name)
    prompts = LEFT if name in ("bd3lm-tiny", "did-tiny") else PROMPTS
    fields: dict[str, Any] = {} if prompts is PROMPTS else {"max_tokens": 11}
    rows, settings = rows_of(model, prompts, n=2, **fields)
    alone = [model.sample([row], settings).tokens[0].tolist() for row in rows]
    assert len({tuple(tokens) for tokens in alone}) == len(rows)
    assert rows_of(model, prompts, n=2, **fields)[0][3].seed == rows[3].seed
    order, most, mixed = list(range(len(rows))), model.most(settings), 0
    for trial in range(2):
        random.Random(trial).shuffle(order)
        for bucket in sorted({row.bucket for row in rows}):
            batch = [i for i in order if rows[i].bucket == bucket][:most]
            found = model.sample([rows[i] for i in batch], settings)
            mixed += len({rows[i].length for i in batch}) > 1
            for i, tokens in zip(batch, found.tokens, strict=True):
                assert tokens.tolist() == alone[i]
                if rows[i].prompt.shape == tokens.shape:
                    assert (tokens[rows[i].given] == rows[i].prompt[rows[i].given]).all()
    assert (mixed > 0) == (name in ("padded", "bd3lm-tiny"))  # rows of several lengths shared a batch
    assert (most == 1) == (name == "did-tiny")


class Stub:
    """A model that samples what it is told to, and records its batches."""

    def __init__(self, act: Callable[[Sequence[Row], Any], None], **limits: Any) -> None:
        self.limits, self.act = Limits(length=8, **limits), act
        self.batches: list[list[int]] = []
        self.tokenizer = type("T", (), {"end": None})()

    def most(self, settings: Settings) -> int:
        return self.limits.batch

    def sample(self, rows: Sequence[Row], settings: Settings, **calls: Any) -> Sampled:
        self.batches.append([row.seed for row in rows])
        self.act(rows, calls)
        zeros = [np.zeros(row.length, np.int64) for row in rows]
        return Sampled(zeros, [z > 0 for z in zeros], len(rows))


class Bench:
    """A sampling thread with a stub, and jobs whose rows are named by their seeds."""

    def __init__(self, act: Callable[[Sequence[Row], Any], None] = lambda rows, calls: None, **limits: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.model = Stub(act, **limits)
        self.worker = Worker(self.model, Metrics())  # type: ignore[arg-type]  # it has what the thread calls

    def job(self, seeds: Sequence[int], *, steps: int = 1, bucket: int = 8, **fields: Any) -> Job:
        prompt = np.full(8, -1)
        rows = [Row(at, prompt, 8, bucket, seed) for at, seed in enumerate(seeds)]
        return Job("job", rows, Settings("s", steps, None, None, None), Mailbox(self.loop), **fields)

    def drain(self) -> None:
        self.worker.refuse()
        self.worker.start()
        self.worker.join(30)
        assert not self.worker.is_alive()

    def results(self, job: Job) -> list[tuple[int, Update]]:
        return self.loop.run_until_complete(asyncio.wait_for(job.mailbox.read(), 30))

    def close(self) -> None:
        self.loop.close()


@pytest.fixture
def bench() -> Any:
    made: list[Bench] = []

    def make(*arguments: Any, **limits: Any) -> Bench:
        made.append(Bench(*arguments, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_rows_that_fit_share_batches_and_a_large_job_waits_its_turn(bench: Any) -> None:
    b = bench(batch=4)
    jobs = [b.job(range(10)), b.job([20]), b.job([30], steps=2), b.job([40], bucket=16), b.job([50])]
    for job in jobs:
        b.worker.submit(job)
    b.drain()
    # after its first batch the large job stands behind the others; those that fit ride with it
    assert b.model.batches == [[0, 1, 2, 3], [20, 50, 4, 5], [30], [40], [6, 7, 8, 9]]
    for job, count in zip(jobs, (10, 1, 1, 1, 1), strict=True):
        found = b.results(job)
        assert [index for index, _ in found] == list(range(count))
        assert all(update.final for _, update in found)


def test_a_job_at_fault_fails_alone(bench: Any) -> None:
    def act(rows: Sequence[Row], calls: Any) -> None:
        if any(row.seed == 2 for row in rows):
            raise UserError("sample: --matching cannot be")
        if any(row.seed == 3 for row in rows):
            raise ValueError("a defect")

    b = bench(act)
    jobs = [b.job([seed]) for seed in range(1, 5)]
    for job in jobs:
        b.worker.submit(job)
    b.drain()
    assert [len(b.results(jobs[i])) for i in (0, 3)] == [1, 1]
    with pytest.raises(Refused, match=r"^matching cannot be$") as error:
        b.results(jobs[1])
    assert error.value.status == 400
    with pytest.raises(Refused, match="internal error") as error:
        b.results(jobs[2])
    assert (error.value.status, "defect" in error.value.message) == (500, False)


def test_a_full_queue_refuses_and_a_cancelled_job_makes_room(bench: Any) -> None:
    b = bench(queue=2)
    first, second = b.job([1]), b.job([2])
    b.worker.submit(first)
    b.worker.submit(second)
    with pytest.raises(Refused, match="2 requests are waiting") as error:
        b.worker.submit(b.job([3]))
    assert (error.value.status, error.value.retry_after) == (429, 1)
    b.worker.cancel(first)
    b.worker.submit(b.job([4]))
    b.drain()
    assert b.model.batches == [[2, 4]]
    with pytest.raises(Refused, match="stopping"):
        b.worker.submit(b.job([5]))


def test_rows_nobody_waits_for_are_dropped(bench: Any) -> None:
    jobs: list[Job] = []
    steps: list[int] = []

    def act(rows: Sequence[Row], calls: Any) -> None:
        for number in range(100):
            calls["on_step"](number, torch.zeros(len(rows), 8, dtype=torch.int64))
            steps.append(number)
            if number == 5:
                jobs[0].cancelled = True
            if number == 9:
                jobs[1].deadline = 0.0

    b = bench(act)
    jobs += [b.job([1]), b.job([2]), b.job([3], steps=2), b.job([4], steps=2, deadline=time.monotonic() - 1)]
    for job in jobs:
        b.worker.submit(job)
    b.drain()
    assert b.model.batches == [[1, 2], [3]]  # the last was too late before it began
    assert steps[:10] == list(range(10))  # one row left at step 6, and the batch ended when the other did
    assert steps[10:] == list(range(100))


def test_a_slow_reader_gets_the_newest_state_alone(bench: Any) -> None:
    def act(rows: Sequence[Row], calls: Any) -> None:
        for number in range(1000):
            calls["on_step"](number, torch.full((len(rows), 8), number))

    b = bench(act)
    job = b.job([1, 2], drafts=True)
    b.worker.submit(job)
    b.drain()
    found = b.results(job)
    assert len(found) == 2
    assert [(u.final, u.draft) for _, u in found] == [(True, None)] * 2


def test_stopping_fails_what_is_left(bench: Any) -> None:
    begun = threading.Event()

    def act(rows: Sequence[Row], calls: Any) -> None:
        begun.set()
        while True:
            calls["on_step"](0, torch.zeros(len(rows), 8, dtype=torch.int64))
            time.sleep(0.001)

    b = bench(act)
    running, waiting = b.job([1]), b.job([2], steps=2)
    b.worker.submit(running)
    b.worker.submit(waiting)
    b.worker.start()
    assert begun.wait(30)
    b.worker.stop()
    b.worker.join(30)
    assert not b.worker.is_alive()
    for job in (running, waiting):
        with pytest.raises(Refused, match="stopping"):
            b.results(job)
