"""Sweeps: the grid, its folder, and cases that are run once however often the sweep is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from sedd_graph.cli.main import run as command
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.runs.summary import find_runs
from sedd_graph.runs.sweep import DONE, LOG, Sweep, open_sweep, read_grid, run_case, run_sweep, slurm_script
from tests.conftest import SMALL

Write = Callable[..., Path]


def test_the_grid_is_the_product_of_the_values() -> None:
    grid = read_grid(
        ["train.batch=8,16", "train.steps=4", "optimizer={op: adamw, lr: 1e-3}, {op: muon, betas: [0,1]}", "x='a,b'"]
    )
    assert grid.fixed == ["train.steps=4", "x='a,b'"]
    assert [case[2:] for case in grid.cases()] == [
        [f"train.batch={b}", f"optimizer={o}"]
        for b in (8, 16)
        for o in ("{op: adamw, lr: 1e-3}", "{op: muon, betas: [0,1]}")
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch=8"], "two or more values"),
        (["train.batch"], "give key=value"),
        (["=1,2"], "give key=value"),
        (["a=1,,2"], "give key=value"),
        (["a=1,2", "a=3"], "given twice"),
        (["a=1,1"], "the same value twice"),
        ([f"k{i}=1,2,3,4" for i in range(7)], "16,384 cases"),
    ],
)
def test_a_grid_that_is_none_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(overrides)


def test_cases_are_checked_before_any_is_run(small: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch"):
        open_sweep(small(), ["train.batch=8,no"], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_folder_is_of_one_sweep(small: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, grid = small(), ["train.batch=8,16"]
    first = open_sweep(path, grid, None)
    assert open_sweep(path, grid, None).folder == first.folder != open_sweep(path, ["train.batch=8,32"], None).folder
    with pytest.raises(UserError, match="another sweep"):
        open_sweep(path, ["train.batch=8,32"], first.folder)
    path.write_text(path.read_text().replace("steps: 6", "steps: 7"))
    for only in (None, 1):
        with pytest.raises(UserError, match="another sweep"):
            open_sweep(path, grid, first.folder, only=only)
    with pytest.raises(UserError, match="no case 2"):
        open_sweep(path, grid, first.folder, only=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        open_sweep(path, grid, tmp_path / "mine")
    (first.folder / "sweep.json").write_text('{"cases": 3}')
    with pytest.raises(UserError, match="damaged"):
        open_sweep(path, grid, first.folder)


def test_a_case_is_built_trained_and_done_once(
    small: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "sweep",
        str(small()),
        "train.steps=4,5",
        "-o",
        str(tmp_path / "sweep"),
        "--device",
        "cpu",
        "--case",
        "0",
    ]
    # the folder is made by a sweep without --case, or by the first case of a job array
    assert command(arguments) == 0
    case = tmp_path / "sweep" / "0000"
    (run,) = find_runs(case)
    assert json.loads((case / DONE).read_text()) == {"step": 4, "run": str(run.relative_to(case))}
    before = (run / "metrics.jsonl").read_bytes()
    (case / DONE).unlink()  # killed between the end of training and the mark
    assert command(arguments) == 0
    assert list(find_runs(case)) == [run]
    assert (case / DONE).exists()
    capsys.readouterr()
    assert command(arguments) == 0
    assert "trainable" not in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert steps[: len(before.splitlines())] == [json.loads(line)["step"] for line in before.splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    assert steps.count(2) == 1


def test_what_waiting_does_not_change_is_refused(small: Write, tmp_path: Path) -> None:
    sweep = open_sweep(small(), ["train.batch=8,16"], tmp_path / "sweep")
    sweep.case_folder(0).mkdir()
    (sweep.case_folder(0) / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads to"):
        run_case(sweep, 0, device=torch.device("cpu"), say=lambda text: None)


def pretended(sweep: Sweep, code: str) -> Callable[[int], Sequence[str]]:
    """Command lines that do ``code`` instead of training, with the case's folder and number as ``folder`` and ``number``."""
    before = "import sys, os, time, pathlib; folder = pathlib.Path(sys.argv[1]); number = int(sys.argv[2])\n"
    return lambda number: [sys.executable, "-c", before + code, str(sweep.case_folder(number)), str(number)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_cases_run_at_a_time_and_failures_are_tried_again(small: Write, tmp_path: Path, jobs: int) -> None:
    sweep, said = open_sweep(small(), ["train.batch=8,16", "train.steps=3,4,5"], tmp_path / "sweep"), list[str]()
    work = "print('seen', os.environ.get('OMP_NUM_THREADS'))\nif number == 2: sys.exit(2)\n(folder / 'done.json').write_text('{}')"
    assert run_sweep(sweep, pretended(sweep, work), jobs=jobs, say=said.append) == [2]
    assert any(line.startswith("case 2    failed (exit code 2)") for line in said)
    assert [sweep.is_done(n) for n in range(6)] == [True, True, False, True, True, True]
    said.clear()
    assert (
        run_sweep(sweep, pretended(sweep, "(folder / 'done.json').write_text('{}')"), jobs=jobs, say=said.append) == []
    )
    assert [line.split()[1] for line in said] == ["2"]
    assert (sweep.case_folder(2) / LOG).read_text().count("seen") == 1


def test_no_case_is_begun_after_a_signal(small: Write, tmp_path: Path) -> None:
    sweep = open_sweep(small(), ["train.batch=8,16,32"], tmp_path / "sweep")
    with pytest.raises(EnvironmentFault, match="the same command goes on"):
        run_sweep(sweep, pretended(sweep, "sys.exit(143 if number == 1 else 0)"), jobs=1, say=lambda text: None)
    assert sweep.case_folder(1).exists()
    assert not sweep.case_folder(2).exists()


def test_the_job_array_runs_every_case(small: Write, tmp_path: Path) -> None:
    sweep = open_sweep(small(), ["train.batch=8,16"], tmp_path / "a sweep")
    script = slurm_script(sweep, ["sedd-graph", "sweep", "x.yaml", "a=1, 2", "-o", str(sweep.folder)])
    assert "--array=0-1\n" in script
    assert (
        script.splitlines()[-1]
        == f"sedd-graph sweep x.yaml 'a=1, 2' -o '{sweep.folder}' --case \"$SLURM_ARRAY_TASK_ID\""
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="kills process groups")
def test_twelve_runs_killed_twice(tmp_path: Path) -> None:
    """Once the sweep alone is killed, so that a case goes on without it, and once the sweep with its case."""
    path, folder = tmp_path / "small.yaml", tmp_path / "sweep"
    path.write_text(SMALL.replace("steps: 6,", "steps: 40,"))
    arguments = [
        sys.executable,
        "-m",
        "sedd_graph",
        "sweep",
        str(path),
        "train.batch=8,16,24",
        "params.depth=1,2",
        "train.seed=1,2",
    ]
    arguments += ["-o", str(folder), "--device", "cpu", "--jobs", "2", "--json"]
    chance = random.Random(0)
    for whole in (False, True):
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = len(list(folder.glob(f"*/{DONE}")))
        while len(list(folder.glob(f"*/{DONE}"))) < before + 3:
            assert process.poll() is None
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 3))
        if whole:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True)
    rows = json.loads(done.stdout)["cases"]
    assert sorted(row["case"] for row in rows) == list(range(12))
    assert all(row["step"] == 40 for row in rows)
    assert len(list(find_runs(folder))) == 12
    for run in find_runs(folder):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, 41))
        assert all(steps.count(s) == 1 for s in range(1, 40))
