"""Power cuts: what was reported as done is on the disk, and a run resumes from what is there.

In the suite on a disk that keeps only what was flushed; as a slow test on images of a real file system.
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sedd_graph.cli import main as cli
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.manifest import read_manifest, verify_files
from sedd_graph.training.checkpoint_writer import CheckpointWriter
from tests.conftest import SMALL
from tests.store.strict_disk import StrictDisk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and mounts images")
CPU = ["--device", "cpu"]
CUTS = int(os.environ.get("SEDD_GRAPH_CUTS", "50"))
"""Number of power cuts of the slow test."""


def build(folder: Path, steps: int, every: int) -> Path:
    """A run that saves activations at each step, with two records in a chunk."""
    text = SMALL.replace("repeat:", "save: {ports: [x], every: 1, rows: 2, chunk: 2}, repeat:")
    text = text.replace("steps: 6,", f"steps: {steps},").replace("{every: 3}", f"{{every: {every}}}")
    (folder / "small.yaml").write_text(text)
    arguments = [str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(folder / "at"), *CPU]
    assert cli.run(["build", *arguments]) == 0
    return Path((folder / "at").read_text())


def newest(run: Path) -> int:
    """The step of the newest checkpoint, all of which are whole; 0 without one."""
    found = sorted((run / "checkpoints").glob("step-*"))
    for path in found:
        verify_files(path, read_manifest(path).files)
    return int(found[-1].name[5:]) if found else 0


def records(run: Path, steps: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The activations up to a step, as anybody reads them, of which none is missing.

    Chunks of later records may be torn until the run is resumed, and are not read.
    """
    group = run / "activations.zarr" / "trunk" / "x"
    assert np.asarray(zarr.open_array(group / "step", mode="r")[:steps]).tolist() == list(range(1, steps + 1))
    return np.asarray(zarr.open_array(group / "value", mode="r")[:steps])


def check(run: Path, whole: Path, reported: int, steps: int) -> None:
    """What was reported by step ``reported`` is on the disk, and the run ends as the unbroken one."""
    step = newest(run)
    assert step >= reported
    if step:
        assert np.array_equal(records(run, step), records(whole, step))
        assert cli.run(["train", str(run), "--resume", *CPU]) == 0
    else:
        assert cli.run(["train", str(run), *CPU]) == 0
    final = f"step-{steps:08d}"
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (run / "checkpoints" / final / name).read_bytes() == (whole / "checkpoints" / final / name).read_bytes()
    assert np.array_equal(records(run, steps), records(whole, steps))
    losses = [[json.loads(line).get("loss") for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole)]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StrictDisk, list[tuple[int, int]], Path]]:
    """The disk of a training run of six steps; after how many flushes a step was reported as saved; and the run."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run = build(tmp_path, 6, 2)
    disk, reported, publish = StrictDisk(run), list[tuple[int, int]](), CheckpointWriter._publish

    def published(self: CheckpointWriter, *arguments: Any) -> None:
        publish(self, *arguments)
        reported.append((len(disk.flushed), arguments[0].state.step))

    monkeypatch.setattr(CheckpointWriter, "_publish", published)
    reported.append((len(disk.flushed), 0))
    with disk.recording():
        assert cli.run(["train", str(run), *CPU]) == 0
    monkeypatch.undo()
    yield disk, reported, run
    disk.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cuts(disk: StrictDisk, reported: list[tuple[int, int]], numbers: list[int], whole: Path, folder: Path) -> None:
    for number in numbers:
        done = max(step for count, step in reported if count <= number)
        run = disk.after(number, folder / str(number))
        check(run, whole, done, 6)
        shutil.rmtree(run)


def test_a_power_cut_loses_nothing_that_was_reported(
    cut: tuple[StrictDisk, list[tuple[int, int]], Path], tmp_path: Path
) -> None:
    disk, reported, whole = cut
    assert [step for _, step in reported] == [0, 2, 4, 6]
    begin, last = reported[0][0], reported[-1][0]
    chosen = random.Random(0).sample(range(begin, last), 4)
    cuts(disk, reported, [*chosen, reported[2][0], last], whole, tmp_path / "cuts")


@pytest.mark.slow
def test_a_power_cut_after_each_flush(cut: tuple[StrictDisk, list[tuple[int, int]], Path], tmp_path: Path) -> None:
    disk, reported, whole = cut
    cuts(disk, reported, list(range(reported[0][0], len(disk.flushed) + 1)), whole, tmp_path / "cuts")


def test_chunks_reach_the_disk_at_a_flush(tmp_path: Path) -> None:
    """Few flushes for each record, all at :meth:`Activations.flush`, and none of what was flushed is lost later."""
    place, name = tmp_path / "disk", "trunk/0/x"
    place.mkdir()
    disk, tap = StrictDisk(place), TapSpec(name, 1, "float32", None, 2)
    counts = []
    with disk.recording():
        store = Activations(place / "activations.zarr", [tap])
        for step in range(1, 8):
            store.put(name, step, np.full((2, 3), step))
            if step in (3, 7):
                before = len(disk.flushed)
                store.flush()  # the fourth record replaces the chunk of the third
                counts.append((before, len(disk.flushed)))
        store.close()
    for cut in range(counts[0][1], len(disk.flushed) + 1):
        left, said = disk.after(cut, tmp_path / str(cut)) / "activations.zarr", list[str]()
        reported = 7 if cut >= counts[1][1] else 3
        Activations(left, [tap], resume_step=reported, say=said.append).close()
        assert said == []
        values = np.asarray(zarr.open_array(left / name / "value", mode="r"))
        assert values[:, 0, 0].tolist() == list(range(1, reported + 1))
    disk.close()


@pytest.mark.parametrize(("chunk", "last", "flushes"), [(1, 11, 10 * 6), (2, 2, 6 + 2)])
def test_a_record_takes_few_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, last: int, flushes: int
) -> None:
    """The names and contents of the steps and of the metadata of both arrays, and of a chunk that replaces a flushed one."""
    count, fsync = [0], os.fsync

    def counted(number: int) -> None:
        count[0] += 1
        fsync(number)

    store = Activations(tmp_path / "activations.zarr", [TapSpec("x", 1, "float32", None, chunk)])
    store.put("x", 1, np.zeros((2, 3)))
    store.flush()
    monkeypatch.setattr("os.fsync", counted)
    for step in range(2, last + 1):
        store.put("x", step, np.zeros((2, 3)))
    store._writer.flush()
    assert count == [flushes]
    store.close()


def test_a_build_that_has_returned_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk = StrictDisk(tmp_path / "disk")
    with disk.recording():
        run = build(tmp_path / "disk", 6, 2)
    left = disk.after(len(disk.flushed), tmp_path / "left")
    again = left / run.relative_to(tmp_path / "disk")
    verify_files(again, read_manifest(again).files)
    assert {p.name for p in again.iterdir()} == {p.name for p in run.iterdir()}
    disk.close()


def mounted(image: Path, place: Path) -> bool:
    place.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_power_cuts_by_images_of_a_file_system(tmp_path: Path) -> None:
    """The image is copied while training is stopped: what the file system had not written is lost, as with the power."""
    image, place = tmp_path / "image", tmp_path / "place"
    with image.open("wb") as stream:
        stream.truncate(192 * 2**20)
    made = shutil.which("mkfs.ext4") and subprocess.run(["mkfs.ext4", "-q", image], check=False).returncode == 0
    if os.geteuid() or not made or not mounted(image, place):
        pytest.skip("needs root, mkfs.ext4 and loop devices")
    steps, rng = 100, random.Random(time.time_ns())
    (tmp_path / "whole").mkdir()
    whole = build(tmp_path / "whole", steps, 5)
    run = shutil.copytree(whole, place / "run")
    assert cli.run(["train", str(whole), *CPU]) == 0
    command = [sys.executable, "-m", "sedd_graph", "train", "run", *CPU]
    done = 0
    try:
        while done < CUTS:
            subprocess.run(["sync"], check=True)
            log = tmp_path / "log"
            with log.open("w") as stream:
                process = subprocess.Popen(command, cwd=place, stdout=stream, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
            try:
                while done < CUTS and process.poll() is None:
                    time.sleep(rng.uniform(0.2, 2.0))
                    process.send_signal(signal.SIGSTOP)
                    step = max([0, *(int(line.split()[1].split("/")[0]) for line in log.read_text().splitlines() if line.startswith("step "))])  # fmt: skip
                    if not step or process.poll() is not None:
                        process.send_signal(signal.SIGCONT)
                        continue
                    shutil.copyfile(image, tmp_path / "copy")
                    process.send_signal(signal.SIGCONT)
                    assert mounted(tmp_path / "copy", tmp_path / "cut")
                    try:
                        # a checkpoint is written while training goes on, and is whole before the next is begun
                        check(tmp_path / "cut" / "run", whole, max(0, (step - 1) // 5 * 5 - 5), steps)
                    finally:
                        gc.collect()  # of what maps files of the run into memory
                        subprocess.run(["umount", tmp_path / "cut"], check=True)
                    done += 1
                    print(f"{done} power cuts: nothing lost, every run resumed", flush=True)
            finally:
                process.kill()
                process.wait()
            shutil.rmtree(run)
            shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints", "activations.zarr", "metrics.jsonl"))  # fmt: skip
    finally:
        subprocess.run(["umount", place], check=True)
