"""``sedd-graph distill``: a student is a run like any other, resumes exactly, changes its teacher in rounds; and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sedd_graph.cli import main as cli
from sedd_graph.component.check import Check
from sedd_graph.runs.open import open_run
from sedd_graph.training.checkpoint import latest_checkpoint
from tests.runs.unproved import built

CPU = ["--device", "cpu"]
QUICK = [
    "train.steps=4",
    "train.batch=4",
    "train.compile=off",
    "train.evaluate=null",
    "train.warmup=1",
    "train.log_every=1",
    "train.ema=0.5",
    "train.checkpoint.every=1",
    "train.checkpoint.keep=9",
]
ROUNDS = ["distill.rounds=2", "distill.steps=4"]


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are proved elsewhere, and held-out text is evaluated elsewhere."""
    monkeypatch.setattr("sedd_graph.runs.build.prove_all", lambda report, **options: ([], []))
    monkeypatch.setattr(
        "sedd_graph.runs.build.prove_student", lambda report, say: [Check("distill.pairs", "", True, "", "")]
    )
    monkeypatch.setattr("sedd_graph.runs.train.evaluate_opened", lambda *arguments, **options: None)
    monkeypatch.setattr("sedd_graph.runs.train.numbers", lambda found: {})


def teacher(folder: Path, name: str, *overrides: str) -> Path:
    return built(folder / "teacher", name, "data.length=32", *overrides).path


def distilled(folder: Path, path: Path, *overrides: str) -> Path:
    at = folder / "at"
    words = ["distill", str(path), *QUICK, *overrides, "--runs", str(folder / "runs"), "--path-to", str(at), *CPU]
    assert cli.run(words) == 0
    return Path(at.read_text())


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


SIX = {
    "mdlm-tiny": [],
    "sedd-uniform-tiny": [],
    "mixture-tiny": [],
    "power-tiny": ["sample.positions=systematic"],
    "bd3lm-tiny": [],
    "did-tiny": ["data.rows=stream"],
}


@pytest.mark.parametrize("name", SIX)
def test_a_student_of_each_process_is_a_run_like_any_other(name: str, tmp_path: Path) -> None:
    path = teacher(tmp_path, name)
    run = distilled(tmp_path, path, "train.steps=2", "distill.rounds=1", *SIX[name])
    assert len(losses(run)) == 2
    opened = open_run(run, device="cpu", compile="off")
    assert opened.report.name == f"{name}-distilled"
    assert opened.report.distillation is not None
    assert opened.engine.sample(1, 32, seed=1).shape[0] == 1
    moved = opened.engine.model.state_dict()
    start = open_run(path, device="cpu", compile="off").engine.model.state_dict()
    assert moved.keys() == start.keys()
    assert any(not torch.equal(moved[k], start[k]) for k in start)
    facts = json.loads((run / "run.json").read_text())
    assert facts["teacher"] == path.name
    assert json.loads((run / "certificate.json").read_text())["checks"][0]["name"] == "distill.pairs"


def test_the_teacher_of_a_round_is_the_average_of_the_student_before(tmp_path: Path) -> None:
    run = distilled(tmp_path, teacher(tmp_path, "mdlm-tiny"), *ROUNDS)
    start = load_file(run / "model.safetensors")
    found = {step: run / "checkpoints" / f"step-{step:08d}" for step in (1, 2, 3)}
    first, last = (load_file(found[step] / "helpers.safetensors") for step in (2, 3))
    average = load_file(found[2] / "ema.safetensors")
    assert int(first["round"]) == 0
    assert int(last["round"]) == 1
    for name, value in start.items():
        assert torch.equal(first[f"teacher.{name}"], value)
        assert torch.equal(last[f"teacher.{name}"], average[name])


@pytest.mark.parametrize("op", ["consistency", "idlm"])
def test_a_student_resumes_from_any_step_as_if_nothing_had_happened(op: str, tmp_path: Path) -> None:
    words = [f"distill.op={op}", *(ROUNDS if op == "consistency" else [])]
    run = distilled(tmp_path, teacher(tmp_path, "mdlm-tiny"), *words)
    whole = latest_checkpoint(run / "checkpoints")
    assert whole is not None
    expected = {kind: load_file(whole / f"{kind}.safetensors") for kind in ("model", "ema", "helpers")}
    for step in (1, 2, 3):
        again = tmp_path / f"again{step}"
        shutil.copytree(run, again)
        for later in range(step + 1, 5):
            shutil.rmtree(again / "checkpoints" / f"step-{later:08d}")
        assert cli.run(["train", str(again), "--resume", *CPU]) == 0
        for kind, tensors in expected.items():
            found = load_file(again / "checkpoints" / whole.name / f"{kind}.safetensors")
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], value) for name, value in tensors.items()), (step, kind)


def test_accumulation_does_not_change_what_is_learned(tmp_path: Path) -> None:
    path = teacher(tmp_path, "mdlm-tiny")
    whole, parts = (
        load_file(
            distilled(tmp_path, path, "train.steps=1", "train.clip=null", f"train.accumulate={n}")
            / "checkpoints/step-00000001/model.safetensors"
        )
        for n in (1, 2)
    )
    assert all(torch.allclose(whole[name], value, atol=2e-5) for name, value in parts.items())


REFUSED = [
    ("mdlm-tiny", ["distill.op=nothing"], "unknown op 'nothing'"),
    ("mdlm-tiny", ["distill.round=2"], "unknown key (did you mean 'rounds'?)"),
    ("mdlm-tiny", ["train.parallel.shard=2"], "train.parallel.shard"),
    ("indel-tiny", [], "the kernel 'indel' has no coupled noise"),
    ("did-tiny", ["distill.op=idlm"], "'idlm' needs rows of a fixed length"),
    ("did-tiny", ["distill.pairs=student"], "'consistency' needs rows of a fixed length"),
    ("d3pm-gaussian-tiny", [], "'consistency' needs a kernel in continuous time"),
    ("genmd4-tiny", [], "'consistency' needs a kernel and a schedule without trained parameters"),
    ("elf-tiny", [], "a process of vectors has no coupled noise of discrete states, and cannot be distilled"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=[f"{n} {' '.join(o)}" for n, o, _ in REFUSED])
def test_what_cannot_be_distilled_is_refused(
    name: str, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built(tmp_path / "teacher", name).path
    assert cli.run(["distill", str(path), "train.steps=1", *overrides, "--runs", str(tmp_path / "runs"), *CPU]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_that_was_not_trained_teaches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = teacher(tmp_path, "mdlm-tiny")
    (path / "model.safetensors").unlink()
    (path / "manifest.json").unlink()
    assert cli.run(["distill", str(path), *CPU]) == 2
    assert "has not been trained: there is no teacher to distil" in capsys.readouterr().err


def test_a_student_is_built_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["distill", "runs/any", "--runs", str(tmp_path / "runs"), *CPU]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
