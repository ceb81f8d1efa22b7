"""Losses are printed, recorded and plotted in the unit that the objective declares."""

import json
from pathlib import Path

import pytest

from sedd_graph.cli.main import run
from tests.runs.unproved import SIZES

TRAIN = "train={steps: 2, batch: 64, warmup: 1, compile: 'off', log_every: 1, optimizer: {op: adamw}}"


def test_a_loss_that_is_not_in_nats_is_reported_in_its_own_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "at"
    made = ["build", "diffusion-lm-tiny", "--proof", "quick", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    assert run([*made, "--path-to", str(where), *SIZES, TRAIN]) == 0
    folder = Path(where.read_text())
    capsys.readouterr()
    assert run(["train", str(folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    said = [line for line in out if line.startswith("step ") and "  loss " in line]
    assert said
    assert all(" squared error + nats per token  lr " in line for line in said)
    assert any("nats per token" in line and "bits per character" in line for line in out)  # the bound is in nats
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any("bits_per_character" in record for record in records if "loss" in record)
    assert any("final_bits_per_character" in record for record in records)
    assert "in the unit of the objective, which is not nats" in (folder / "report.html").read_text()
