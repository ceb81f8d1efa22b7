"""Activations along the road: their layout and values, and that they change nothing of the road."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from sedd_graph.cli.main import run as command
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.activations import recording
from sedd_graph.runs.invert import invert_run
from sedd_graph.runs.open import Run
from sedd_graph.runs.restore import restored_texts
from sedd_graph.runs.sample import sample_run
from sedd_graph.store.tape import read_tape
from tests.conftest import SMALL
from tests.runs.folders import placed
from tests.runs.test_tapes import opened

TEXTS = ["a cat", "two cats", "a hat", "the dog"]
PORTS = ["trunk/x", "trunk/norm/out"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return opened(placed(tmp_path_factory.mktemp("activations"), SMALL), save=PORTS)


def arrays(path: Path, port: str) -> tuple[np.ndarray, np.ndarray]:
    group = zarr.open_group(str(path), mode="r")
    return np.asarray(group[f"{port}/value"]), np.asarray(group[f"{port}/step"])


def test_values_are_those_of_the_rows_at_each_step_and_the_tape_is_the_same(run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    tape = invert_run(run, TEXTS, where=tmp_path / "t.zarr", activations=True, say=said.append)
    plain = invert_run(opened(run.path), TEXTS, where=tmp_path / "plain.zarr")
    assert read_tape(tape).facts.digest == read_tape(plain).facts.digest
    path = tmp_path / "t-activations.zarr"
    assert said[-1].endswith(f"evaluations of the network in {path}")
    group = zarr.open_group(str(path), mode="r")
    assert [group[part].attrs["rows"] for part in ("0", "1", "2")] == [[0, 2], [3], [1]]  # of 5, 7 and 8 tokens
    value, number = arrays(path, "0/trunk/x")
    tokens, sigma = arrays(path, "0/tokens")[0], arrays(path, "0/sigma")[0]
    assert number.tolist() == list(range(len(value)))
    assert value.shape[1:] == (2, 5, 16)
    assert tokens.shape[1:] == (2, 5)
    assert (tokens[0] == 128).all()  # the road starts at masks, and ends at the text
    text = [run.text_tokenizer().encode(TEXTS[row]) for row in (0, 2)]
    for record in range(len(value)):
        at = tokens[record, :, 0] >= 0
        assert at.any()
        assert (np.isnan(value[record]).any((1, 2)) == ~at).all()
        assert (np.isnan(sigma[record]) == ~at).all()
        for row in np.flatnonzero(at).tolist():
            seen = tokens[record, row] != 128
            assert (tokens[record, row][seen] == np.asarray(text[row])[seen]).all()
        rows = torch.from_numpy(tokens[record][at]).long()
        with torch.no_grad():
            expected = run.engine.model.run({"tokens": rows, "attend": torch.ones_like(rows, dtype=torch.bool)})[1]
        assert value[record][at] == pytest.approx(expected["trunk.x"].numpy(), abs=1e-6)
    for row in (0, 1):  # noise falls along the road of each text
        assert (np.diff(sigma[:, row][~np.isnan(sigma[:, row])]) < 0).all()
    assert arrays(path, "0/trunk/1/norm/out")[0].shape == value.shape


def test_verbs_write_activations_beside_the_tape_and_overwrite_none(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tape, cpu = tmp_path / "own.zarr", ["--device", "cpu"]
    assert command(["invert", str(run.path), "--text", "a cat", "-o", str(tape), "--activations", "trunk/x", *cpu]) == 0
    assert "own-activations.zarr" in capsys.readouterr().out
    assert command(["restore", str(tape), "--run", str(run.path), *cpu, "--activations", *PORTS]) == 0
    assert "a cat" in capsys.readouterr().out
    first, _ = arrays(tmp_path / "own-activations.zarr", "0/trunk/x")
    again, _ = arrays(tmp_path / "own-activations-2.zarr", "0/trunk/x")
    assert np.array_equal(first, again, equal_nan=True)
    samples = str(tmp_path / "s.zarr")
    assert (
        command(["sample", str(run.path), "--batch", "2", "--tape", samples, "--activations", "embed/out", *cpu]) == 0
    )
    assert arrays(tmp_path / "s-activations.zarr", "0/embed/out")[0].shape[1:] == (2, 32, 16)
    capsys.readouterr()
    for words, message in (
        (["invert", str(run.path), "--text", "a", "--by", "kernel", "--activations"], "evaluates no network"),
        (["invert", str(run.path), "--text", "a", "--activations"], "saves no port"),
        (["invert", str(run.path), "--text", "a", "--activations", "trunc/x"], "did you mean 'trunk'"),
        (["invert", str(run.path), "--text", "a", "--activations", "trunk/norm/x"], "has no 'x'"),
        (["sample", str(run.path), "--activations", "trunk/x"], "give --tape"),
    ):
        assert command([*words, *cpu]) == 2
        assert message in capsys.readouterr().err
    assert not list(run.path.glob("*activations*"))


@pytest.mark.slow
def test_strings_are_padded_and_processes_without_such_evaluations_are_refused(tmp_path: Path) -> None:
    run = opened(placed(tmp_path, "editflow-tiny", "sample.steps=3"), save=["trunk/x"])
    tape = tmp_path / "s.zarr"
    sample_run(run, SampleRequest(batch=3, length=5, seed=1), tape=tape, activations=True)
    value, _ = arrays(tmp_path / "s-activations.zarr", "0/trunk/x")
    assert value.shape[1:3] == (3, 6)
    assert np.isnan(value).any()
    assert not np.isnan(value[:, :, 0]).any()  # the BOS token is always there
    assert (arrays(tmp_path / "s-activations.zarr", "0/tokens")[0][:, :, 0] == run.engine.process.kernel.start).all()
    with recording(run, tape) as recorder:
        restored_texts(run, read_tape(tape), where=tape, recorder=recorder)
    assert np.array_equal(arrays(tmp_path / "s-activations-2.zarr", "0/trunk/x")[0], value, equal_nan=True)
    flow = opened(placed(tmp_path, "flow-tiny"))
    with pytest.raises(UserError, match="saves no port"):
        sample_run(flow, SampleRequest(batch=3, seed=1), tape=tmp_path / "f.zarr", activations=True)
