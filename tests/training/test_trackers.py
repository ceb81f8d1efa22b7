"""Trackers, through the train command: what arrives, what a resume repeats (nothing), and that no fault of theirs ends a run."""

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sedd_graph.cli import main as cli
from sedd_graph.errors import EnvironmentFault
from sedd_graph.store.manifest import Entry, entry_of
from sedd_graph.training import trackers
from tests.conftest import SMALL

STEPS = [1, 2, 3, 4, 5, 6]


def make_run(folder: Path, kinds: str = "", more: str = "", *overrides: str) -> Path:
    """A run folder of six steps with checkpoints at three and six."""
    path = folder / "small.yaml"
    path.write_text(SMALL.replace("train: {", f"train: {{trackers: [{kinds}], {more}"))
    arguments = ["build", str(path), *overrides, "--runs", str(folder / "runs"), "--device", "cpu"]
    assert cli.run([*arguments, "--path-to", str(folder / "at")]) == 0
    return Path((folder / "at").read_text())


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut_back(run: Path) -> None:
    """As after a kill behind step 6: only the checkpoint of step 3 is left, and the last line is torn."""
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')


def test_a_resume_repeats_no_record(tmp_path: Path) -> None:
    run = make_run(tmp_path, more="sample: {every: 2, steps: 2}, ")
    train = ["train", str(run), "--device", "cpu"]
    assert cli.run(train) == 0
    whole = records(run)
    kinds = [(r["step"], next(k for k in r if k != "step")) for r in whole]
    assert kinds == [(1, "loss"), (2, "loss"), (2, "sample"), (3, "loss"), (4, "loss"), (4, "sample"), (5, "loss"), (6, "loss"), (6, "final_nats_per_token")]  # fmt: skip
    cut_back(run)
    assert cli.run([*train, "--resume"]) == 0
    again = records(run)
    assert [(r["step"], next(k for k in r if k != "step")) for r in again] == kinds
    for key in ("loss", "sample", "final_nats_per_token"):
        assert [r[key] for r in again if key in r] == [r[key] for r in whole if key in r]
    assert cli.run([*train, "--resume"]) == 0  # nothing is left to do: evaluated again, recorded once
    assert records(run) == again


def test_lines_that_are_no_records_go_at_a_resume(tmp_path: Path) -> None:
    lines = ['{"step": 1, "sample": "a\\u2028b\N{LINE SEPARATOR}c"}', "\0\0\0", "[1]", '{"step": "2"}', '{"step": 2}', '{"step": 3}', '{"st']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    found = trackers.Trackers(tmp_path, "name", [])
    found.resume(2, None, said.append)
    found.log(3, {"loss": float("nan")})
    found.close()
    assert said == [
        f"warning     {tmp_path / 'metrics.jsonl'}: 4 lines without a whole record removed; "
        "records after step 2 are written again"
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == "\n".join([lines[0], lines[4], '{"step": 3, "loss": null}']) + "\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_each_damaged_file_is_kept(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    for number, name in enumerate(("damaged-metrics.jsonl", "damaged-metrics-2.jsonl", "damaged-metrics-3.jsonl")):
        path.write_text('{"step": 1}\n')
        written = entry_of(path)
        path.write_text(text := f'{{"step": {number}}}\n')
        found = trackers.Trackers(tmp_path, "name", [])
        found.resume(1, Entry(bytes=written.bytes, xxh3_128="0" * 32), said.append)
        found.close()
        assert said[-1].endswith(f"records are lost or changed; the file as it was is now {name}")
        assert (tmp_path / name).read_text() == text


def test_a_disk_that_refuses_the_last_flush_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trackers.Trackers(tmp_path, "name", [])

    def broken(number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        found._lines.sync()
    found.close()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with all three trackers, cut off and resumed, and where trackio keeps its things.

    In a process of its own: trackio reads where its place is when it is imported, and wandb leaves a service behind.
    """
    folder = tmp_path_factory.mktemp("tracked")
    run = make_run(
        folder, "tensorboard, trackio, wandb", "sample: {every: 2, steps: 2}, ", "train.evaluate={every: 2, batches: 1}"
    )
    ours = {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    for more in ([], ["--resume"]):
        if more:
            cut_back(run)
        command = [sys.executable, "-m", "sedd_graph", "train", str(run), "--device", "cpu", *more]
        done = subprocess.run(command, env={**os.environ, **ours}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return run, folder / "trackio"


def test_tensorboard_holds_each_step_once(tracked: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = tracked
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = {r["step"]: r["loss"] for r in records(run) if "loss" in r}
    assert [e.step for e in events.Scalars("loss")] == STEPS
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(expected)
    assert [e.step for e in events.Scalars("final_bits_per_character")][-1] == 6
    texts = events.Tensors("sample/text_summary")
    assert {e.step for e in texts} == {2, 4}  # tensorboard leaves repeated texts in
    assert texts[0].tensor_proto.string_val[0].decode() == next(r["sample"] for r in records(run) if "sample" in r)


def lock_settings(run: Path) -> dict[str, Any]:
    """Some settings of the run, and the digest of its lock file, each read from the run folder."""
    lock = (run / "blueprint.lock.yaml").read_bytes()
    data = yaml.safe_load(lock)
    return {
        "lock_digest": hashlib.sha256(lock).hexdigest()[:16],
        "name": data["name"],
        "train.batch": data["train"]["batch"],
        "train.steps": data["train"]["steps"],
        "process.op": data["process"]["op"],
    }


def error_bars(run: Path) -> dict[int, tuple[float, float, float]]:
    """Held-out bits per character of each step, with two standard errors below and above."""
    name, error = "heldout_bits_per_character", "heldout_bits_standard_error"
    found = [(r["step"], r[name], r[error]) for r in records(run) if name in r]
    return {step: (value, value - 2 * e, value + 2 * e) for step, value, e in found}


def test_tensorboard_holds_settings_and_error_bars(tracked: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run, _ = tracked
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    name = "heldout_bits_per_character"
    columns = [{e.step: e.value for e in events.Scalars(name + end)} for end in ("", "_low", "_high")]
    assert {step: tuple(c[step] for c in columns) for step in columns[0]} == {
        step: pytest.approx(bars, rel=1e-6) for step, bars in error_bars(run).items()
    }
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.margin.series) for category in layout.category for chart in category.chart}
    assert set(charts) == {"heldout_loss", name}
    assert [(s.value, s.lower, s.upper) for s in charts[name]] == [(name, f"{name}_low", f"{name}_high")]
    raw = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    columns_ = HParamsPluginData.FromString(raw).session_start_info.hparams
    shown = {key: getattr(columns_[key], str(columns_[key].WhichOneof("kind"))) for key in lock_settings(run)}
    assert shown == lock_settings(run)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f'    lock_digest: "{lock_settings(run)["lock_digest"]}"' in text.split("\n")


def test_trackio_and_wandb_hold_settings_and_error_bars(tracked: tuple[Path, Path]) -> None:
    run, place = tracked
    with sqlite3.connect(place / "small.db") as database:
        (config,) = database.execute("select config from configs where run_name = ?", [run.name]).fetchone()
        rows = database.execute("select step, metrics from metrics where run_name = ?", [run.name]).fetchall()
    database.close()
    settings = lock_settings(run)
    assert {key: json.loads(config)[key] for key in settings} == settings
    name = "heldout_bits_per_character"
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    bars = {s: tuple(m[name + end] for end in ("", "_low", "_high")) for s, m in found if name in m}
    assert bars == {step: pytest.approx(expected) for step, expected in error_bars(run).items()}
    for folder in (run / "wandb").glob("offline-run-*"):
        (file,) = folder.glob("*.wandb")
        values = {k: v for record in wandb_records(file) for k, v in config_of(record).items()}
        assert {key: values[key] for key in settings} == settings
        assert any(f"{name}_low" in history_of(record) for record in wandb_records(file))


def test_trackio_holds_the_losses(tracked: tuple[Path, Path]) -> None:
    run, place = tracked
    with sqlite3.connect(place / "small.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    database.close()
    found = [(step, json.loads(metrics)) for name, step, metrics in rows if name == run.name]
    losses = {step: metrics["loss"] for step, metrics in found if "loss" in metrics}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in records(run) if "loss" in r})
    assert [step for step, metrics in found if "sample" in metrics][:2] == [2, 4]
    assert not (run / "trackio").exists()


def wandb_records(file: Path) -> Iterator[Any]:
    """What is in a ``.wandb`` file: LevelDB's log format (blocks of 32 KiB; a record may be in pieces) behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    raw, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        room = 2**15 - place % 2**15
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", raw[place : place + 7])
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def history_of(record: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def config_of(record: Any) -> dict[str, Any]:
    return {
        "/".join(i.nested_key) or i.key: json.loads(i.value_json)
        for i in (*record.config.update, *record.run.config.update)
    }


def wandb_losses(file: Path) -> dict[int, float]:
    found = map(history_of, wandb_records(file))
    return {items["_step"]: items["loss"] for items in found if "loss" in items}


def test_wandb_offline_lies_in_the_run_folder(tracked: tuple[Path, Path]) -> None:
    run, _ = tracked
    found = [wandb_losses(file) for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]
    expected = {r["step"]: r["loss"] for r in records(run) if "loss" in r}
    # wandb has no way to go on offline: a resumed run is a second one
    assert found == [pytest.approx(expected), pytest.approx({step: expected[step] for step in (4, 5, 6)})]


FAKE = """
import types
def setup():
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode="offline"))
class Run:
    def log(self, *_, **__):
        {log}
    def finish(self, *_, **__):
        {finish}
def init(**_):
    {init}
    return Run()
"""


@pytest.mark.parametrize(
    ("where", "what"), [("import", "did not start"), ("init", "did not start"), ("log", "failed"), ("finish", "failed")]
)
def test_a_failing_tracker_is_dropped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    raising = "raise RuntimeError('no API key\\n(and a long story)')"
    bodies = {name: raising if name == where else "pass" for name in ("init", "log", "finish")}
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE.format(**bodies) + (raising if where == "import" else ""))
    monkeypatch.syspath_prepend(tmp_path / "fake")
    for name in [n for n in sys.modules if n.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    run = make_run(tmp_path, "wandb, tensorboard")
    with pytest.warns(UserWarning, match="the tracker") as caught:
        assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    message = f"the tracker 'wandb' {what} and is disabled; training continues without it: no API key"
    assert [str(w.message) for w in caught] == [message]
    assert [r["step"] for r in records(run) if "loss" in r] == STEPS
    assert json.loads((run / "evaluation.json").read_text())["sequences"] > 0
    assert list((run / "tensorboard").iterdir())  # the others go on


def test_a_missing_package_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "tensorboard, wandb")
    find = trackers.importlib.util.find_spec
    missing: Callable[[str], object] = lambda name: None if name == "wandb" else find(name)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    assert cli.run(["train", str(run), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "the tracker 'wandb' needs the package 'wandb': pip install 'sedd_graph[wandb]'\n"
    assert not (run / "checkpoints").exists()
    assert not (run / "tensorboard").exists()
