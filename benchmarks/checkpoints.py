"""Asynchronous checkpoints: the time that the training loop loses to one, and the memory that it takes.

    python benchmarks/checkpoints.py stall    # one process whose state has a few hundred MB
    python benchmarks/checkpoints.py memory   # four processes (gloo) with shards of 250 MB: at most 1.2 x of a shard
    python benchmarks/checkpoints.py init     # first weights of one of 64 shards of 1,000 million parameters

Prints a record, appends it to benchmarks/results/parallel.jsonl, and exits with 1 where a bar is missed: 5 % of the time
between checkpoints by default (1,000 steps or half an hour, whichever is first), and 1.2 of a process's share of the state.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from parallel import SMALL, build_text, record, run

from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_model
from sedd_graph.engine.shard_init import ShardInit
from sedd_graph.runs.check import check
from sedd_graph.runs.open import open_run
from sedd_graph.training.config import CheckpointConfig
from sedd_graph.training.distributed import World, local
from sedd_graph.training.parallel import shard_init
from sedd_graph.training.trainer import Trainer

STALLED, HELD = 0.05, 1.2
"""Bars: share of the time between checkpoints, and memory beyond the state by the process's share of it."""


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")  # without pages of files


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Sample this process's memory in a thread; what is yielded returns the peak so far, bytes."""
    found, ended = [resident()], threading.Event()

    def sample() -> None:
        while not ended.wait(0.002):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: max(found[0], resident())
    finally:
        ended.set()
        thread.join()


def wide(dim: int, depth: int, settings: str = "") -> str:
    text = SMALL.replace("MEMORY", "").replace("dim: 32", f"dim: {dim}").replace("depth: 2", f"depth: {depth}")
    return text.replace("steps: 20,", f"steps: 10000, {settings}").replace("heads: 2, depth", "heads: 8, depth")


def trainer_of(path: Path, world: World) -> Trainer:
    opened = open_run(
        path, device="cpu", compile="off", weights="fresh", part=lambda config: shard_init(config.parallel, world)
    )
    return Trainer(opened.engine, opened.data(), opened.report.train, path, world, print)


def state_bytes(trainer: Trainer) -> int:
    """Bytes of this process's share of weights, average and optimizer state."""
    optimizer = [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
    average = [] if trainer.average is None else trainer.average.values
    return sum(local(t.detach()).nbytes for t in (*trainer.model.parameters(), *average, *optimizer))


def step(trainer: Trainer) -> None:
    trainer.model.train()
    trainer.train_step()
    trainer.update(0.0)
    trainer.step += 1


def stall(folder: Path) -> bool:
    """Steps with a checkpoint among steps without, as the training loop runs them."""
    trainer = trainer_of(build_text(folder / "run", wide(512, 10)), World.single())
    for _ in range(3):
        step(trainer)
    stopped, lost, plain = list[dict[str, float]](), list[float](), list[float]()
    for _ in range(5):
        for _ in range(6):
            began = time.monotonic()
            step(trainer)
            plain.append(time.monotonic() - began)
        began, steps, parts = time.monotonic(), 0, {"begin": 0.0, "copy": 0.0, "publish": 0.0}

        def timed(part: str, work: Callable[[], None], parts: dict[str, float] = parts) -> None:
            at = time.monotonic()
            work()
            parts[part] += time.monotonic() - at

        timed("begin", lambda: trainer.save(wait=False))
        while trainer.writer.pending:
            trainer.model.train()
            trainer.train_step()
            timed("copy", trainer.writer.wait_for_copy)
            trainer.update(0.0)
            trainer.step += 1
            steps += 1
            if not trainer.writer.writing:
                timed("publish", trainer.writer.advance)
        lost.append(time.monotonic() - began - steps * statistics.median(plain[-6:]))
        stopped.append(parts)
    one = statistics.median(plain)
    every = CheckpointConfig()
    between = min(every.every * one, every.every_s or float("inf"))
    means = {part: statistics.median(found[part] for found in stopped) for part in stopped[0]}
    longest = max(sum(found.values()) for found in stopped)
    record(
        "stall",
        state_mb=state_bytes(trainer) / 1e6,
        step_s=one,
        stopped_s=means,
        longest_stop_s=longest,
        lost_s=sorted(lost),
        between_s=between,
        share_stopped=longest / between,
        share_lost=statistics.median(lost) / between,
    )
    return max(longest, statistics.median(lost)) / between <= STALLED


def memory_of_rank(path: Path, tiny: Path) -> int:
    world = World.from_environment(torch.device("cpu"))
    trainer_of(tiny, world)  # imports what it needs
    before = resident()
    with peak_memory() as peak:
        trainer = trainer_of(path, world)
        initial = peak() - before
    whole = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    for _ in range(2):
        step(trainer)
    share, beyond, copies = state_bytes(trainer), list[float](), 0
    for _ in range(2):
        held = resident() - copies
        with peak_memory() as peak:
            trainer.save()
            beyond.append((peak() - held) / share)
        copies = sum(block.nbytes for block in trainer.writer._staging._blocks.values())
        step(trainer)
    numbers = [share, initial, whole, *(int(1e6 * found) for found in beyond)]
    ranks = world.gather(numbers)
    good = all(found[at] <= 1e6 * HELD for found in ranks for at in (3, 4))
    if world.rank == 0:
        record(
            "memory",
            processes=world.size,
            share_mb=[found[0] / 1e6 for found in ranks],
            initial_mb=[found[1] / 1e6 for found in ranks],
            weights_mb=whole / 1e6,
            beyond_state_of_share=[[found[3] / 1e6, found[4] / 1e6] for found in ranks],
        )
    world.close()
    return 0 if good else 1


def memory(folder: Path) -> bool:
    large, tiny = (build_text(folder / f"run{dim}", wide(dim, 7, "parallel: {shard: null}, ")) for dim in (1024, 32))
    run(lambda: memory_of_rank(large, tiny), folder / "log", 4)
    return True


def init(folder: Path) -> bool:
    (folder / "large.yaml").write_text(wide(2048, 30))
    report = check(folder / "large.yaml", ())
    before, part = resident(), ShardInit(0, 64)
    with peak_memory() as peak:
        model = build_model(report.graph, report.registry, part)
        most = peak() - before
    count = sum(p.numel() for p in model.parameters())
    own = sum(rows.nbytes for rows in part.named(model).values())
    record("init", parameters=count, weights_mb=4 * count / 1e6, share_mb=own / 1e6, peak_mb=most / 1e6)
    return most < 0.1 * 4 * count


def main() -> None:
    measures = {"stall": stall, "memory": memory, "init": init}
    if len(sys.argv) != 2 or sys.argv[1] not in measures:
        raise SystemExit(__doc__)
    discover()
    with tempfile.TemporaryDirectory() as name:
        raise SystemExit(0 if measures[sys.argv[1]](Path(name)) else 1)


if __name__ == "__main__":
    main()
