"""``--from``: weights by name, the table of what matched, rows of a vocabulary that has grown, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd_graph.cli import main as cli
from sedd_graph.runs.open import open_run
from sedd_graph.training.checkpoint import latest_checkpoint
from tests.runs.test_import_mapped import SMALL, TABLE, theirs

CPU = torch.device("cpu")
QUICK = [
    "train.steps=3",
    "train.batch=8",
    "train.compile=off",
    "train.evaluate=null",
    "data.length=512",
    "train.warmup=1",
]


def command(verb: str, out: Path, *words: str) -> list[str]:
    return [verb, "learn", *SMALL, *QUICK, *words, "--runs", str(out), "--device", "cpu"]


def only(folder: Path) -> Path:
    """Return the only run folder of the blueprint ``learn``."""
    (found,) = (folder / "learn").iterdir()
    return found


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are proved elsewhere, which takes seconds."""
    monkeypatch.setattr("sedd_graph.runs.build.prove_all", lambda report, **options: ([], []))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Weights under our own names, as a file of safetensors, and their values."""
    folder = tmp_path_factory.mktemp("source")
    state = theirs(folder / "theirs.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "own.safetensors")
    (folder / "map.yaml").write_text(TABLE)
    return folder, state


def test_a_run_starts_from_weights_and_resumes_without_them(
    source: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = source
    words = ["--from", str(folder / "theirs.safetensors"), "--map", str(folder / "map.yaml")]
    assert cli.run(command("build", tmp_path, *words)) == 0
    run = only(tmp_path)
    found = weights_of(run)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    out = capsys.readouterr().out
    assert f"weights     {len(state)} of {len(state)} tensors" in out
    facts = json.loads((run / "run.json").read_text())["weights"]
    assert (facts["from"], facts["matched"], facts["new"], facts["left"]) == ("theirs.safetensors", len(state), 0, 0)
    import hashlib

    digest = hashlib.sha256((folder / "theirs.safetensors").read_bytes()).hexdigest()
    assert facts["sha256"] == {"theirs.safetensors": digest}
    # the run goes on without the source, and its average starts at the weights
    opened = open_run(run, device=CPU, compile="off")
    assert opened.weights == "model.safetensors"
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    after, average = (load_file(checkpoint / f"{kind}.safetensors") for kind in ("model", "ema"))
    for name, value in state.items():
        assert not torch.equal(after[name], value)
        distance = float((after[name] - value).norm() / value.norm())
        assert distance < 0.2, f"{name} is far from where it started"
        assert float((average[name] - value).norm()) < float((after[name] - value).norm()) * 1.01
    assert cli.run(["train", str(run), "train.steps=4", "--resume", "--device", "cpu"]) == 0


def test_a_run_starts_from_a_run(source: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """The newest averaged weights of a run, by its own names, with its tokenizer."""
    folder, _ = source
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run(command("build", first, "--from", str(folder / "own.safetensors"))) == 0
    run = only(first)
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    words = ["data.tokenizer=pretrained", "--from", str(run)]
    assert cli.run([w for w in command("build", second, *words) if w != SMALL[-1]]) == 0
    averaged = open_run(run, device=CPU, compile="off").engine.model.state_dict()
    found = weights_of(only(second))
    assert all(torch.equal(found[name], value) for name, value in averaged.items())
    assert (only(second) / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    facts = json.loads((only(second) / "run.json").read_text())["weights"]
    assert facts["kind"] == "run"
    assert list(facts["sha256"]) == ["checkpoints/step-00000003/ema.safetensors"]


def test_rows_of_a_vocabulary_that_has_grown(
    source: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights without the mask: the rows of their tokens are kept, the mask's are the mean, and the table says so."""
    folder, state = source
    del folder
    fewer = {k: (v[:-1] if v.shape[0] == 21 else v).contiguous() for k, v in state.items() if k != "norm.weight"}
    assert len([k for k, v in state.items() if v.shape[0] == 21]) >= 2
    save_file({**fewer, "visual.patch.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    assert cli.run(command("build", tmp_path, "--from", str(tmp_path / "w.safetensors"))) == 0
    found = weights_of(only(tmp_path))
    for name, value in fewer.items():
        if value.shape != state[name].shape:
            assert torch.equal(found[name][:-1], value)
            assert torch.allclose(found[name][-1], value.mean(0))
    assert torch.equal(found["norm.weight"], torch.ones(16))  # new: as initialised
    out = capsys.readouterr().out
    assert "in part   embed.embed.weight [21, 16]: 20 rows; 1 new, the mean of the others" in out
    assert "new       norm.weight [16]" in out
    assert "left over visual.patch.weight [2]" in out
    table = json.loads((only(tmp_path) / "weights.json").read_text())
    assert (table["new"], table["left"]) == (1, 1)


def test_refusals(source: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, state = source
    own = str(folder / "own.safetensors")

    def refused(*words: str, verb: str = "build") -> str:
        assert cli.run(command(verb, tmp_path / "runs", *words)) == 2
        return capsys.readouterr().err

    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "no tensor has a name of the model" in refused("--from", str(tmp_path / "other.safetensors"))
    assert "do not fit the model" in refused("params.dim=32", "--from", own)
    assert "refused   embed.embed.weight" not in capsys.readouterr().err
    wide = {**state, "norm.weight": torch.full((16,), float("nan"))}
    save_file({k: v.contiguous() for k, v in wide.items()}, tmp_path / "nan.safetensors")
    assert "NaN or infinite: norm.weight" in refused("--from", str(tmp_path / "nan.safetensors"))
    assert "holds neither" in refused("--from", str(tmp_path))
    assert "neither a file nor a shipped table (did you mean 'llama'?)" in refused("--from", own, "--map", "lama")
    assert "--map names the weights of --from" in refused("--map", "llama")
    assert "name them with --from" in refused("data.tokenizer=pretrained")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_takes_no_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Any) -> None:
    assert cli.run(["build", str(small()), "--runs", str(tmp_path), "--compile", "off"]) == 0
    (run,) = (tmp_path / "small").iterdir()
    assert cli.run(["train", str(run), "--from", str(run)]) == 2
    assert "--from takes a blueprint" in capsys.readouterr().err
