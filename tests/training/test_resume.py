"""A run that is stopped and resumed writes the records of the unbroken one; what stops it, and when it saves."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.errors import EnvironmentFault
from sedd_graph.runs.open import open_run
from sedd_graph.store.files import write_text
from sedd_graph.training.checkpoint_writer import CheckpointWriter
from sedd_graph.training.trainer import Trainer
from tests.conftest import SMALL

CPU = ["--device", "cpu"]
TEXT = "".join(f"sentence number {i}. " for i in range(600))


def build(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "small.yaml").write_text(text)
    arguments = [str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(folder / "at"), *CPU]
    assert cli.run(["build", *arguments]) == 0
    return Path((folder / "at").read_text())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that has not been trained, for tests to copy."""
    return build(tmp_path_factory.mktemp("fresh"))


def records(run: Path) -> list[dict[str, float]]:
    """The records of the metrics, without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds" and not k.endswith("_per_second")} for r in found]


@pytest.mark.parametrize("log_every", [4, 100])
def test_records_after_a_resume_are_those_of_the_unbroken_run(tmp_path: Path, log_every: int) -> None:
    """Checkpoints lie within the steps of one record: its loss is still the mean over all of them, to the last bit."""
    changes = [
        ("log_every: 1", f"log_every: {log_every}"),
        ("evaluate: null", "evaluate: {every: 4, batches: 1}"),
        ("{every: 3}", "{every: 3, keep: 9}"),
        ("steps: 6,", "steps: 10,"),
    ]
    whole = build(tmp_path, *changes)
    assert cli.run(["train", str(whole), *CPU]) == 0
    expected = records(whole)
    assert [r["step"] for r in expected if "loss" in r] == [1, *range(log_every, 11, log_every)]
    for step in (3, 9):
        run = shutil.copytree(whole, tmp_path / str(step))
        for path in (run / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        assert cli.run(["train", str(run), "--resume", *CPU]) == 0
        assert records(run) == expected


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_run_with_a_checkpoint(
    fresh: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(fresh, tmp_path / "run")
    step, number = Trainer.train_step, signal.Signals[name]
    publish = CheckpointWriter._publish

    def interrupted(self: Trainer) -> object:
        if self.step == 3:
            os.kill(os.getpid(), number)
        return step(self)

    def write(*arguments: Any) -> None:
        if arguments[1].state.step == 4:
            for again in (signal.SIGTERM, signal.SIGINT):  # a cluster may send more than one, and a user is impatient
                os.kill(os.getpid(), again)
        publish(*arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    monkeypatch.setattr(CheckpointWriter, "_publish", write)
    before = signal.getsignal(number)
    assert cli.run(["train", str(run), *CPU]) == 128 + number
    assert signal.getsignal(number) is before
    said = capsys.readouterr().out
    assert f"{name} at step 4 after" in said
    assert f"checkpoint written; resume with: sedd-graph train {run} --resume\n" in said
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").is_file()


def test_a_signal_during_the_last_write_ends_a_run_that_is_done(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, publish = shutil.copytree(fresh, tmp_path / "run"), CheckpointWriter._publish

    def write(*arguments: Any) -> None:
        if arguments[1].state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        publish(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_publish", write)
    assert cli.run(["train", str(run), *CPU]) == 128 + signal.SIGTERM
    assert "SIGTERM at step 6 after" in capsys.readouterr().out
    assert (run / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    assert not (run / "evaluation.json").exists()


def test_a_signal_that_nohup_ignores_stays_ignored(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = shutil.copytree(fresh, tmp_path / "run"), Trainer.train_step

    def interrupted(self: Trainer) -> object:
        os.kill(os.getpid(), signal.SIGHUP)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.run(["train", str(run), *CPU]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("change", "name"), [((), "ema"), ((("warmup: 2", "warmup: 2, ema: null"),), "model")])
def test_the_evaluation_after_training_names_its_weights(
    tmp_path: Path, change: tuple[tuple[str, str], ...], name: str
) -> None:
    """By the name under which they are opened later."""
    run = build(tmp_path, *change)
    for more in ([], ["--resume"]):
        (run / "evaluation.json").unlink(missing_ok=True)
        assert cli.run(["train", str(run), *more, *CPU]) == 0
        found = json.loads((run / "evaluation.json").read_text())
        assert found["weights"] == f"checkpoints/step-00000006/{name}.safetensors"
    assert open_run(run, device="cpu", compile="off").weights == found["weights"]


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 40 s, a checkpoint every 100 s or every 4 steps: the time counts from the newest checkpoint."""
    run = build(tmp_path, ("{every: 3}", "{every: 4, every_s: 100, keep: 9}"), ("steps: 6,", "steps: 9,"))
    clock, step = [0.0], Trainer.train_step
    monkeypatch.setattr("sedd_graph.training.loop.time.monotonic", lambda: clock[0])

    def slow(self: Trainer) -> object:
        clock[0] += 40
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", slow)
    assert cli.run(["train", str(run), *CPU]) == 0
    assert sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir()) == [3, 4, 7, 8, 9]


def test_a_corpus_that_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "own.txt").write_text(TEXT)
    run = build(tmp_path / "old", ("data: {", "data: {corpus: {op: text, files: [own.txt]}, "))
    run = run.rename(tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "new")
    for verb in ("train", "eval"):
        capsys.readouterr()
        assert cli.run([verb, str(run), *CPU]) == 2
        said = capsys.readouterr().err
        assert f"the folder of the data, {tmp_path / 'old'}, does not exist: if it has moved, name it with --corpus\n" in said  # fmt: skip
        assert cli.run([verb, str(run), "--corpus", str(tmp_path / "nowhere"), *CPU]) == 2
        assert capsys.readouterr().err == f"--corpus {tmp_path / 'nowhere'}: no such folder\n"
        assert cli.run([verb, str(run), "--corpus", str(tmp_path / "new"), *CPU]) == 0
    (tmp_path / "new" / "own.txt").write_text(TEXT.replace("7", "8"))
    assert cli.run(["train", str(run), "--resume", "--corpus", str(tmp_path / "new"), *CPU]) == 2
    assert "the corpus has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"sequences": "many"}', '{"sequences": {}, "rows": null}', "[" * 9999])
def test_a_broken_evaluation_is_replaced(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sedd_graph.runs.evaluate import _rows_of

    path = tmp_path / "evaluation.json"
    said: list[str] = []
    assert _rows_of(path, said.append) == 0
    assert said == []
    path.write_text(text)
    assert _rows_of(path, said.append) == 0
    assert said[-1] == f"warning     {path} is damaged, and is replaced"
    path.write_text('{"sequences": 7, "rows": 2}')
    assert _rows_of(path, said.append) == 7


def test_exhausted_inodes_are_not_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    found = list(os.statvfs(tmp_path))
    monkeypatch.setattr("os.fsync", full)
    for blocks, inodes, said in ((0, 0, "the disk is full"), (9, 0, "no inodes left"), (0, 9, "the disk is full")):
        found[4], found[5], found[7] = blocks, 100, inodes  # f_bavail, f_files, f_favail
        monkeypatch.setattr("os.statvfs", lambda path: os.statvfs_result(found))
        with pytest.raises(EnvironmentFault, match=said):
            write_text(tmp_path / "a", "text")
