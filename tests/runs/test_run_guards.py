"""What a run folder is guarded against: a corpus that changes, a lesser evaluation, what a kill leaves, odd file modes."""

import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sedd_graph.cli import main as cli
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import part_folder
from sedd_graph.training.trainer import Trainer
from tests.conftest import SMALL

CPU = ["--device", "cpu"]
TEXT = "".join(f"sentence number {i}. " for i in range(600))


def built(folder: Path, *changes: tuple[str, str]) -> Path:
    """A run folder of the small blueprint on a text of its own."""
    (folder / "own.txt").write_text(TEXT)
    text = SMALL.replace("data: {", "data: {corpus: {op: text, files: [own.txt]}, ")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "small.yaml").write_text(text)
    arguments = ["build", str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    assert cli.run([*arguments, *CPU]) == 0
    return Path((folder / "at").read_text())


def test_a_corpus_that_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = built(tmp_path)
    assert cli.run(["train", str(run), *CPU]) == 0
    full = (run / "evaluation.json").read_text()
    said = f"the corpus has changed since {run} was built"
    (tmp_path / "own.txt").write_text(TEXT.replace("number 7.", "number 8."))  # as many characters, the same ones
    capsys.readouterr()
    assert cli.run(["train", str(run), "--resume", *CPU]) == 2
    assert capsys.readouterr().err == f"{said}; put the old one back, or build a new run\n"
    assert cli.run(["eval", str(run), *CPU]) == 0
    assert f"warning     {said}: the bound is that of the changed corpus\n" in capsys.readouterr().out
    (tmp_path / "own.txt").write_text(TEXT)
    assert cli.run(["train", str(run), "--resume", *CPU]) == 0
    assert cli.run(["eval", str(run), *CPU]) == 0
    assert "changed" not in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text()).keys() == json.loads(full).keys()


def test_checkpoints_on_another_disk_need_to_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = built(tmp_path)
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert cli.run(["train", str(run), *CPU]) == 2
    assert f"{run}/checkpoints leads to {tmp_path}/disk, outside the run folder" in capsys.readouterr().err
    assert not list((tmp_path / "disk").iterdir())
    assert cli.run(["train", str(run), "--allow-outside", *CPU]) == 0
    assert [path.name for path in (tmp_path / "disk").iterdir()]


def test_a_partial_evaluation_leaves_a_fuller_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = built(tmp_path)
    file = run / "evaluation.json"
    assert cli.run(["eval", str(run), "--batches", "1", *CPU]) == 0
    part = json.loads(file.read_text())
    assert cli.run(["eval", str(run), *CPU]) == 0  # a fuller one takes its place
    whole = file.read_text()
    count = json.loads(whole)["sequences"]
    assert count > part["sequences"] == 8
    capsys.readouterr()
    assert cli.run(["eval", str(run), "--batches", "1", *CPU]) == 0
    assert (
        f"evaluation.json is not replaced: it covers {count} rows, this evaluation only 8\n" in capsys.readouterr().out
    )
    assert file.read_text() == whole


LEFT = """
import sys, time
from pathlib import Path
from sedd_graph.store.files import part_folder
with part_folder(Path(sys.argv[1])) as part:
    (part / "half").write_text("")
    print(part.name, flush=True)
    time.sleep(600)
"""


def test_what_a_kill_left_of_samples_goes_and_what_lives_stays(tmp_path: Path) -> None:
    path = tmp_path / "samples.zarr"
    command = [sys.executable, "-c", LEFT, str(path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    name = other.stdout.readline().strip()
    (tmp_path / ".other.zarr.0123.part").mkdir()
    write_samples(path, {"tokens": np.zeros((1, 2), np.int64)}, text=["a"], attributes={})
    assert (tmp_path / name / "half").exists()  # its process is alive
    other.kill()
    other.communicate()
    assert (tmp_path / name / "half").exists()
    write_samples(path, {"tokens": np.zeros((1, 2), np.int64)}, text=["a"], attributes={})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.zarr.0123.part", "samples-2.zarr", "samples.zarr"]


def test_a_part_goes_with_an_error_and_stays_renamed(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), part_folder(tmp_path / "a") as part:
        (part / "file").write_text("")
        raise KeyError
    assert not part.exists()
    with part_folder(tmp_path / "a") as part:
        part.rename(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_weights_have_the_mode_of_other_files(small: Callable[..., Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = built(tmp_path)
        assert cli.run(["train", str(run), *CPU]) == 0
        assert cli.run(["export", str(run), "-o", str(tmp_path / "out"), *CPU]) == 0
    finally:
        os.umask(before)
    files = [*run.rglob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")]
    assert len(files) >= 4
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o640}


def test_infilling_says_where_it_is_a_heuristic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Holding text fixed is exact with absorb, which moves a token once, and not with uniform, which may move it again."""
    uniform = (
        ("op: absorb", "op: uniform"),
        ("log_x0: head", "log_score: head"),
        ("op: x0_head", "op: score_head"),
        ("in: {x: trunk, tokens: tokens}", "in: {x: trunk, tokens: tokens, sigma: sigma}"),
        ("attend: bool b l}\noutputs: {log_s", "attend: bool b l, sigma: float b}\noutputs: {log_s"),
        ('v: "${params.tokens}+1"', 'v: "${params.tokens}"'),
        ("masked_count", "score_entropy"),
        ("op: ancestral", "op: analytic"),
    )
    for name, changes in (("absorb", ()), ("uniform", uniform)):
        (tmp_path / name).mkdir()
        run = built(tmp_path / name, *changes)
        capsys.readouterr()
        assert cli.run(["infill", str(run), "--text", "sen[[3]]ce", "--batch", "2", "--steps", "2", *CPU]) == 0
        said = capsys.readouterr().err
        if name == "absorb":
            assert said == ""
        else:
            assert said.startswith(
                "warning: the kernel 'uniform' can move every token, so holding the given text fixed"
            )
            assert said.count("\n") == 1


def test_a_first_step_that_spends_the_budget_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(tmp_path, ("steps: 6", "steps: 6, budget_s: 5"))
    clock, offset = time.perf_counter, [0.0]
    monkeypatch.setattr("sedd_graph.training.loop.time.perf_counter", lambda: clock() + offset[0])
    whole = Trainer.train_step

    def slow(self: Trainer) -> object:
        offset[0] += 60  # as a compilation would take
        return whole(self)

    monkeypatch.setattr(Trainer, "train_step", slow)
    capsys.readouterr()
    assert cli.run(["train", str(run), *CPU]) == 0
    said = capsys.readouterr().out
    assert (
        "warning     the first step, compilation included, took 60 s, all of train.budget_s: "
        "increase it, or set train.compile=off\n" in said
    )
    assert "budget at step 1 after 60 s of training" in said
