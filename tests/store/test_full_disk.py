"""No more room: every writer says so in one sentence, and what was whole before stays whole and goes on.

The kernel's own limit on the size of a file stands in for a disk that fills up, in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from sedd_graph.cli import main as cli
from sedd_graph.runs.check import digest
from sedd_graph.runs.open import write_run_manifest
from sedd_graph.store.manifest import entry_of
from sedd_graph.training.checkpoint import latest_checkpoint
from tests.conftest import SMALL

pytest.importorskip("resource")

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from sedd_graph.cli.main import main
main()
"""
NO_ROOM = "File too large; earlier files are intact\n"


def limited(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with no file larger than ``limit`` bytes."""
    command = [sys.executable, "-c", LIMITED, str(limit), *arguments, "--device", "cpu"]
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=quiet, capture_output=True, text=True, check=False, timeout=300)


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 24 steps that keeps activations, untrained and trained: for tests to copy."""
    folder = tmp_path_factory.mktemp("disk")
    text = SMALL.replace("repeat:", "save: {ports: [x], every: 1, chunk: 16}, repeat:").replace(
        "steps: 6,", "steps: 24,"
    )
    text = text.replace("length: 32}", "length: 32, holdout: 0.002}")  # so that metrics are larger than evaluations
    (folder / "small.yaml").write_text(text)
    arguments = [str(folder / "small.yaml"), "--runs", str(folder), "--device", "cpu", "--path-to", str(folder / "at")]
    assert cli.run(["build", *arguments]) == 0
    fresh, trained = folder / "fresh", folder / "trained"
    shutil.move((folder / "at").read_text(), fresh)
    shutil.copytree(fresh, trained)
    assert cli.run(["train", str(trained), "--device", "cpu"]) == 0
    return fresh, trained


def change_lock(run: Path, old: str, new: str) -> None:
    """Change the lock file, and the digest and hashes by which such a change is refused."""
    lock, facts = run / "blueprint.lock.yaml", run / "run.json"
    assert old in lock.read_text()
    lock.write_text(lock.read_text().replace(old, new))
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "blueprint": digest(lock.read_text())}))
    write_run_manifest(run)
    for folder in (run / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["run"][lock.name] = entry_of(lock).model_dump()
        (folder / "manifest.json").write_text(json.dumps(manifest))


def goes_on(run: Path, trained: Path) -> None:
    """The run is resumed with room enough, and ends as if nothing had been."""
    assert cli.run(["train", str(run), "--resume", "--device", "cpu"]) == 0
    assert losses(run) == losses(trained)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (r / "checkpoints" / "step-00000024" / name for r in (run, trained))
        assert ours.read_bytes() == theirs.read_bytes()


def test_no_room_for_activations(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    done = limited(75_000, "train", str(run))
    assert done.returncode == 1
    assert done.stderr == f"activations.zarr could not be written to {run / 'activations.zarr'}: {NO_ROOM}"
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    whole = zarr.open_group(str(run / "activations.zarr"), mode="r")
    steps, values = np.asarray(whole["trunk/x/step"]), np.asarray(whole["trunk/x/value"])
    assert steps.tolist() == list(range(1, len(steps) + 1))
    assert 0 < int(newest.name.split("-")[1]) <= len(steps) <= len(values) < 24
    assert not list(run.rglob("*.part*"))
    goes_on(run, runs[1])
    for name in ("trunk/x/step", "trunk/x/value"):
        ours, theirs = (
            np.asarray(zarr.open_array(str(r / "activations.zarr" / name), mode="r")) for r in (run, runs[1])
        )
        assert np.array_equal(ours, theirs)
    assert len(ours) == 24


def test_no_room_for_a_checkpoint(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[1], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000024")
    shutil.rmtree(run / "activations.zarr")
    change_lock(run, "every: 1, ", "every: 1000, ")  # the checkpoint is to be what is too large
    done = limited(20_000, "train", str(run), "--resume")
    assert done.returncode == 1
    assert done.stderr == f"a checkpoint could not be written to {run / 'checkpoints'}: {NO_ROOM}"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000021"]
    goes_on(run, runs[1])


def test_no_room_for_samples(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[1], tmp_path / "run")
    before = sorted(p.name for p in run.iterdir())
    done = limited(20_000, "sample", str(run), "--batch", "32", "--length", "1024", "--steps", "1")
    assert done.returncode == 1
    assert done.stderr == f"samples.zarr could not be written to {run}: {NO_ROOM}"
    assert sorted(p.name for p in run.iterdir()) == before


def test_no_room_for_metrics(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[1], tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    done = limited(len(text) - 10, "train", str(run), "--resume")
    assert done.returncode == 1
    assert done.stderr == f"metrics.jsonl could not be written to {run}: {NO_ROOM}"
    assert (run / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:-1])


def test_no_room_for_an_export(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = limited(20_000, "export", str(runs[1]), "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr == f"model.safetensors could not be written to {tmp_path / 'out'}: {NO_ROOM}"
