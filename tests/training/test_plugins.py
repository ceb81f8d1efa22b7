"""A plugin brings a corpus, points, a tokenizer, an optimizer, a learning-rate schedule and a tracker of its own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.component.registry import installed
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.testing.conformance import check_component
from tests.conftest import SMALL

PLUGIN = Path(__file__).parents[1] / "data" / "plugins" / "sections"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(PLUGIN)
    yield
    sys.modules.pop("sections_plugin", None)


@pytest.mark.parametrize("op", ["alphabet", "moved", "ring", "sgd", "halving", "csv_log"])
def test_each_keeps_its_contract(op: str) -> None:
    check_component(installed().component(op))


def test_a_run_is_built_trained_resumed_and_sampled_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SMALL.replace(
        "data: {tokenizer: {op: characters, size: 128}", "data: {corpus: {op: alphabet, copies: 100}, tokenizer: moved"
    ).replace("train: {", "train: {optimizer: {op: sgd, lr: 0.5}, schedule: halving, trackers: [{op: csv_log}], ")
    path = tmp_path / "small.yaml"
    path.write_text(text.replace("tokens: 128}", "tokens: 257}"))
    assert (
        cli.run(["build", str(path), "--runs", str(tmp_path), "--device", "cpu", "--path-to", str(tmp_path / "at")])
        == 0
    )
    run = Path((tmp_path / "at").read_text())
    lock = (run / "blueprint.lock.yaml").read_text()
    for line in (
        "op: alphabet.v1, copies: 100",
        "op: moved.v1",
        "op: sgd.v1, lr: 0.5",
        "op: halving.v1",
        "op: csv_log.v1",
    ):
        assert line in lock
    assert load_tokenizer(run).decode([98, 99]) == "ab"
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    rows = [line.split(",") for line in (run / "losses.csv").read_text().splitlines()]
    assert [int(step) for step, *_ in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(lr) for *_, lr in rows] == [
        0.25,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
    ]  # two steps of warm-up, half from step 4 on
    assert cli.run(["train", str(run), "--device", "cpu", "--resume"]) == 0
    assert cli.run(["sample", str(run), "--batch", "1", "--device", "cpu"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["learning_rate"] for r in records if "loss" in r] == [float(lr) for *_, lr in rows]


def test_a_tokenizer_that_does_not_fit_the_graph_is_refused_before_the_text_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("{op: characters, size: 128}", "{op: moved}"))
    assert cli.run(["build", str(path), "--check"]) == 2
    assert "the tokenizer has 257 tokens, but the graph is built for 128" in capsys.readouterr().err
