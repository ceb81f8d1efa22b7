"""Kills at random moments (SIGKILL): what was whole stays whole, and runs end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr

from sedd_graph.store.manifest import read_manifest, verify_files
from tests.conftest import SMALL
from tests.runs.forked import Forked

KILLS = int(os.environ.get("SEDD_GRAPH_KILLS", "400"))
"""Number of kills."""
CPU = ["--device", "cpu"]
QUICK = ["--proof", "quick", *CPU]
STEPS = 20
TAPS = ("repeat:", "save: {ports: [x], every: 1, rows: 2, chunk: 4}, repeat:")
BPE = [("{op: characters, size: 128}", "{op: bpe, size: 300}"), ("tokens: 128", "tokens: 300")]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def build(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL.replace("steps: 6,", f"steps: {STEPS},").replace("{every: 3}", "{every: 2, keep: 1}")
    text = text.replace("log_every: 1", "log_every: 3")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "small.yaml").write_text(text)
    arguments = [str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(folder / "at"), *QUICK]
    assert Forked(["build", *arguments], folder / "log").wait() == 0, (folder / "log").read_text()
    return Path((folder / "at").read_text())


def student(folder: Path) -> Path:
    """Build a student of two rounds that has not been trained."""
    teacher = build(folder)
    places = ["--runs", str(folder / "students"), "--path-to", str(folder / "at")]
    rounds = ["distill.rounds=2", f"train.steps={STEPS}"]
    for arguments in (["train", str(teacher)], ["distill", str(teacher), *rounds, *places]):
        command = Forked([*arguments, *CPU], folder / "log")
        assert command.wait() == 0, command.text()
    run = Path((folder / "at").read_text())
    built = {*read_manifest(run).files, "manifest.json"}
    for path in run.rglob("*"):
        if path.is_file() and path.relative_to(run).as_posix() not in built:
            path.unlink()
    shutil.rmtree(run / "checkpoints")
    return run


def losses(run: Path) -> list[dict[str, float]]:
    """The records of the metrics, without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds" and not k.endswith("_per_second")} for r in found]


class Training:
    """Training by one or two processes, which are killed together or one at a time.

    Args:
        name: Name under which kills are counted.
        whole: A run folder that has not been trained.
        processes: Number of processes.
    """

    def __init__(self, name: str, whole: Path, processes: int) -> None:
        self.name, self.whole, self.processes = name, whole, processes
        self.fresh = shutil.copytree(whole, whole.with_name("fresh"))
        began = time.monotonic()
        self.changes = self.finish(whole)
        self.seconds = time.monotonic() - began
        self.number = 0

    def start(self, run: Path, die_at: int | None = None) -> list[Forked]:
        arguments = ["train", str(run), *CPU]
        if any((run / "checkpoints").glob("step-*")):
            arguments.append("--resume")
        if self.processes == 1:
            return [Forked(arguments, run.with_name("log"), die_at=die_at)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        return [
            Forked(arguments, run.with_name(f"log{rank}"), {**shared, "RANK": str(rank)}, die_at if rank == 0 else None)
            for rank in range(2)
        ]

    def finish(self, run: Path) -> int:
        """Train to the end, and return the number of changes that the first process made to files and folders."""
        ranks = self.start(run)
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * self.processes, "\n".join(rank.text() for rank in ranks)
        return ranks[0].changes

    def kill(self, rng: random.Random, moment: str, counts: Counter[str]) -> None:
        """Train a copy, kill it up to four times, and compare its end with the unbroken run."""
        self.number += 1
        run = shutil.copytree(self.fresh, self.whole.with_name(f"copy{self.number}"))
        kills = 0
        for _ in range(rng.randint(1, 4)):
            ranks = self.start(run, rng.randint(1, self.changes) if moment == "change" else None)
            self._wait(run, ranks, rng, moment)
            if any(rank.poll() and rank.code != -signal.SIGKILL for rank in ranks):
                break
            rng.shuffle(ranks)
            for rank in ranks:  # the second dies after the first, as by a supervisor
                rank.kill()
            kills += 1
            for path in (run / "checkpoints").glob("step-*"):
                verify_files(path, read_manifest(path).files)  # never torn
        for rank in ranks:
            rank.wait()
        if not (run / "checkpoints" / f"step-{STEPS:08d}").exists() or kills:
            self.finish(run)
        self.compare(run)
        shutil.rmtree(run)
        counts[f"{moment}, {self.name}"] += kills

    def _wait(self, run: Path, ranks: list[Forked], rng: random.Random, moment: str) -> None:
        """Wait for a random moment, or for one at which a checkpoint is being written or removed."""
        end = time.monotonic() + (60 * self.seconds if moment == "change" else rng.uniform(0, self.seconds))
        hidden = {"writing": ".step-*.part", "metrics": ".metrics.jsonl.*"}.get(moment)
        while time.monotonic() < end and not any(rank.poll() for rank in ranks):
            time.sleep(0.0005)
        if hidden is not None:
            folder = run / "checkpoints" if moment == "writing" else run
            late = time.monotonic() + 5
            while time.monotonic() < late and not any(rank.poll() for rank in ranks):
                if any(folder.glob(hidden)):
                    time.sleep(rng.uniform(0, 0.01))
                    return

    def compare(self, run: Path) -> None:
        final = Path("checkpoints") / f"step-{STEPS:08d}"
        stored = sorted(path.name for path in (self.whole / final).glob("*.safetensors"))
        assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors"} <= {*stored}
        for name in stored:
            assert (run / final / name).read_bytes() == (self.whole / final / name).read_bytes(), name
        assert losses(run) == losses(self.whole)
        assert {p.name for p in (run / "checkpoints").iterdir()} == {final.name}
        assert not [p for p in run.rglob("*") if p.name.endswith((".part", ".partial"))]
        if (self.whole / "activations.zarr").exists():
            for name in ("step", "value"):
                place = Path("activations.zarr/trunk/x") / name
                ours, theirs = (np.asarray(zarr.open_array(r / place, mode="r")) for r in (run, self.whole))
                assert np.array_equal(ours, theirs)


def sampling(run: Path, die_at: int | None = None) -> Forked:
    arguments = ["sample", str(run), "--batch", "16", "--length", "64", *CPU]
    return Forked(arguments, run.with_name("log"), die_at=die_at)


def kill_sampling(run: Path, rng: random.Random, changes: int) -> int:
    """Kill ``sample``; then the run holds whole samples only, and draws those that it would have drawn."""
    before = {p.name for p in run.iterdir()}
    killed = sampling(run, rng.randint(1, changes)).wait() == -signal.SIGKILL
    for path in run.glob("samples*.zarr"):
        group = zarr.open_group(path, mode="r")
        assert np.asarray(group["tokens"]).shape == (16, 64)
        assert np.asarray(group["text"]).shape == (16,)
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} - before <= {"samples.zarr", "report.html"}
    again = sampling(run)
    assert again.wait() == 0, again.text()
    assert not list(run.glob(".samples.zarr.*"))
    for path in run.glob("samples*.zarr"):
        shutil.rmtree(path)
    return int(killed)


def building(folder: Path, die_at: int | None = None) -> Forked:
    arguments = ["build", str(folder / "small.yaml"), "--runs", str(folder / "cut"), *QUICK]
    return Forked(arguments, folder / "log", die_at=die_at)


def kill_build(folder: Path, rng: random.Random, seconds: float, changes: int) -> int:
    """Kill ``build``, which tokenizes; then each folder is a whole run or is refused as none."""
    die_at = rng.choice([None, rng.randint(1, changes)])
    command = building(folder, die_at)
    if die_at is None:
        time.sleep(rng.uniform(0, seconds))
        killed = not command.poll()
        command.kill()
    else:
        killed = command.wait() == -signal.SIGKILL
    for run in (folder / "cut" / "small").glob("*") if (folder / "cut").exists() else ():
        if (run / "manifest.json").exists():
            verify_files(run, read_manifest(run).files)
    shutil.rmtree(folder / "cut", ignore_errors=True)
    return int(killed)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_kills_lose_nothing(tmp_path: Path) -> None:
    rng, counts = random.Random(time.time_ns()), Counter[str]()
    trainings = [
        Training(name, build(tmp_path / name, *changes), processes)
        for name, processes, changes in (
            ("plain", 1, []),
            ("taps", 1, [TAPS]),
            ("two", 2, []),
            ("two with taps", 2, [TAPS]),
        )
    ]
    trainings.append(Training("student", student(tmp_path / "student"), 1))
    sampled = shutil.copytree(trainings[0].whole, tmp_path / "sampled" / "run")
    built = tmp_path / "tokenizing"
    build(built, *BPE)
    unbroken = {"sampling": sampling(sampled), "building": building(built)}
    assert {name: command.wait() for name, command in unbroken.items()} == {"sampling": 0, "building": 0}
    changes = {name: command.changes for name, command in unbroken.items()}
    shutil.rmtree(sampled / "samples.zarr")
    shutil.rmtree(built / "cut")
    while counts.total() < KILLS:
        training = rng.choices(trainings, weights=[3, 3, 1, 1, 3])[0]
        training.kill(rng, rng.choice(["random", "writing", "change", "change", "metrics"]), counts)
        counts["sampling"] += kill_sampling(sampled, rng, changes["sampling"])
        counts["tokenizing"] += kill_build(built, rng, 2 * trainings[0].seconds, changes["building"])
        print(f"{counts.total()} kills: {dict(counts)}", flush=True)
