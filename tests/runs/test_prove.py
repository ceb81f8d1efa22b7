"""The certificate from Python, and the record of a block that falls back to checkpointing in training."""

import json
from pathlib import Path

import pytest

import sedd_graph
from sedd_graph.blueprint.shipped import find_blueprint
from sedd_graph.cli import main as cli
from sedd_graph.engine.drift import DriftWarning
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.errors import UserError
from sedd_graph.report.html import write_report

CHANGES = ["params.depth=2", "data.length=16"]


def test_python_proves_as_the_command_line_does(tmp_path: Path) -> None:
    blueprint = find_blueprint("sedd-reversible-tiny")
    marker = tmp_path / "marker"
    command = ["build", str(blueprint), *CHANGES, "--compile", "off", "--path-to", str(marker), "--runs", str(tmp_path)]
    assert cli.run(command) == 0
    written = json.loads((Path(marker.read_text()) / "certificate.json").read_text())["checks"]
    engine = sedd_graph.build(blueprint, CHANGES, device="cpu", compile="off", prove=True)
    assert [(c.name, c.holds) for c in engine.checks] == [(c["name"], c["holds"]) for c in written]
    assert not sedd_graph.build(marker.read_text(), device="cpu", compile="off").checks


def test_python_refuses_what_the_proof_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    inverted = LayerRun.invert

    def wrong(run: LayerRun) -> None:
        inverted(run)
        value = run.layout.inputs[run.layout.streams[0]]
        run.values[value] = run.values[value] * 1.01

    monkeypatch.setattr(LayerRun, "invert", wrong)
    with pytest.raises(UserError, match="round_trip"):
        sedd_graph.build(find_blueprint("sedd-reversible-tiny"), CHANGES, device="cpu", compile="off", prove=True)


def test_training_records_the_step_at_which_a_block_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    command = ["build", str(find_blueprint("sedd-reversible-tiny")), *CHANGES, "train.steps=4", "train.log_every=1"]
    command += [
        "train.budget_s=null",
        "--proof",
        "quick",
        "--compile",
        "off",
        "--path-to",
        str(marker),
        "--runs",
        str(tmp_path),
    ]
    assert cli.run(command) == 0
    inverted, calls = LayerRun.invert, 0

    def wrong(run: LayerRun) -> None:
        nonlocal calls
        inverted(run)
        calls += 1
        if calls > 2:  # from the second step on, with two layers
            value = run.layout.inputs[run.layout.streams[0]]
            run.values[value] = run.values[value] * 1.01

    monkeypatch.setattr(LayerRun, "invert", wrong)
    run = Path(marker.read_text())
    with pytest.warns(DriftWarning):
        assert cli.run(["train", str(run)]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (found,) = ({k: v for k, v in r.items() if k != "seconds"} for r in records if any("drift" in k for k in r))
    ((name, error),) = ((k, v) for k, v in found.items() if k != "step")
    assert (found["step"], name) == (2, "drift_trunk")
    assert error > 1e-3
    page = write_report(run).read_text()
    assert "Step 2: block trunk reconstructed its inputs with a relative error of" in page
