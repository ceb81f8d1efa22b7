"""A run that has ended is extended: more steps, recorded; anything else about it stays locked."""

import json
import shutil
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.report.facts import provenance
from sedd_graph.runs.extend import extended
from sedd_graph.store.changes import CHANGES, read_changes
from sedd_graph.store.manifest import DamagedError
from tests.conftest import SMALL

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    constant = SMALL.replace("steps: 6,", "steps: 6, schedule: {op: constant},")
    (folder / "small.yaml").write_text(constant)
    where = ["--proof", "quick", "--compile", "off", "--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    assert cli.run(["build", str(folder / "small.yaml"), *where, *CPU]) == 0
    return Path((folder / "at").read_text())


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_an_extended_run_is_the_longer_run(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a constant learning rate a run of 3 steps, extended to 6, is one of 6, to the last bit."""
    whole, run = shutil.copytree(fresh, tmp_path / "whole"), shutil.copytree(fresh, tmp_path / "run")
    assert cli.run(["train", str(whole), "--resume", "auto", *CPU]) == 0  # starts: there is no checkpoint
    assert cli.run(["train", str(run), "train.steps=3", "--resume", "auto", *CPU]) == 0
    assert "changed     at step 0: train.steps=3" in capsys.readouterr().out
    assert max(losses(run)) == 3
    assert cli.run(["train", str(run), "train.steps=6", "train.checkpoint.every=2", "--resume", *CPU]) == 0
    assert "changed     at step 3: train.steps=6 train.checkpoint.every=2" in capsys.readouterr().out
    assert losses(run) == losses(whole)
    name = Path("checkpoints") / "step-00000006" / "optimizer.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [change.step for change in read_changes(run)] == [0, 3]
    # the changes hold for whatever resumes later, and repeating one records nothing
    assert cli.run(["train", str(run), "train.steps=6", "--resume", *CPU]) == 0
    assert len(read_changes(run)) == 2
    assert cli.run(["show", str(run)]) == 0
    assert "training was changed at step 3: train.steps=6 train.checkpoint.every=2" in capsys.readouterr().out
    assert [text.split(" (")[0] for key, text in provenance(run) if key == "changed"] == [str(c) for c in read_changes(run)]  # fmt: skip
    assert "at step 3: train.steps=6" in (run / "report.html").read_text()
    assert cli.run(["train", str(run), "train.steps=5", "--resume", *CPU]) == 2
    assert "the run has done 6 steps already; a run can only be extended" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["params.dim=32", "train.batch=16", "train.seed=1", "nodes.trunk.repeat=3", "train={steps: 9}", "train.stepsize=3"])  # fmt: skip
def test_what_may_not_change(fresh: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", str(fresh), override, "--resume", "auto", *CPU]) == 2
    assert f"{override}: the blueprint of a run folder is locked; only train.steps, " in capsys.readouterr().err
    assert not (fresh / "checkpoints").exists()


def test_a_forged_record_of_changes_is_refused(fresh: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fresh, tmp_path / "run")
    for overrides, said in ((["train.batch=16"], "is locked"), (["params.dim=9"], "String should match"), (3, "list")):
        made = {"format": 1, "changes": [{"step": 0, "overrides": overrides, "at": ""}]}
        (run / CHANGES).write_text(json.dumps(made))
        with pytest.raises((DamagedError, UserError), match=said):
            extended(run, [], step=0)
