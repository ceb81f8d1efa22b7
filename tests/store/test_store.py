"""Nothing is lost or torn: kills, full disks, readers while the run goes on."""

import errno
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.families.text import document_lengths
from sedd_graph.store import durable
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import alone, numbered, write_text
from sedd_graph.store.json_lines import JsonLines
from sedd_graph.store.writer import Writer

TAP = TapSpec("trunk/0/x", 1, "float32", None, 2)


def test_the_writer_keeps_order_and_raises_the_faults_of_its_thread() -> None:
    seen: list[int] = []
    with Writer(depth=2) as writer:
        for number in range(50):
            writer.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert seen == list(range(50))
    writer = Writer()

    def full() -> None:
        raise OSError(errno.ENOSPC, "no space")

    writer.put(full)
    with pytest.raises(OSError, match="no space"):
        writer.flush()
    with pytest.raises(OSError, match="no space"):
        writer.close()


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


STREAM = """
import itertools, sys
import numpy as np
from pathlib import Path
from sedd_graph.store.activations import Activations, TapSpec
store = Activations(Path(sys.argv[1]), [TapSpec("trunk/0/x", 1, "float32", None, 3)])
for step in itertools.count(1):
    store.put("trunk/0/x", step, np.full((64, 33), step, dtype="float32"))
    if step % 7 == 0:
        store.flush()  # as at a checkpoint: a chunk that is not full
"""


def records(path: Path) -> tuple[list[int], npt.NDArray[np.float32]]:
    """As anybody reads them, with plain zarr: as many values as there are steps."""
    steps = np.asarray(zarr.open_array(str(path / "trunk/0/x/step"), mode="r"))
    values = np.asarray(zarr.open_array(str(path / "trunk/0/x/value"), mode="r"))
    assert len(values) >= len(steps)
    return steps.tolist(), values[: len(steps)]


def test_whole_records_while_a_run_goes_on_and_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "activations.zarr"
    looks = 0
    steps: list[int] = []
    process = subprocess.Popen([sys.executable, "-c", STREAM, str(path)])
    try:
        end = time.time() + 60
        while time.time() < end and process.poll() is None and (looks < 40 or len(steps) < 100):
            if not (path / "trunk/0/x/step/zarr.json").exists():
                continue
            steps, values = records(path)
            looks += 1
            assert steps == list(range(1, len(steps) + 1))
            assert (values == np.asarray(steps)[:, None, None]).all()
    finally:
        process.kill()
        process.wait()
    assert looks >= 40
    steps, values = records(path)
    assert len(steps) >= 100
    assert (values == np.asarray(steps)[:, None, None]).all()
    again = Activations(path, [TapSpec("trunk/0/x", 1, "float32", None, 3)], resume_step=4)
    again.put("trunk/0/x", 5, np.zeros((64, 33)))
    again.close()
    steps, values = records(path)
    assert steps == [1, 2, 3, 4, 5]
    assert values[:, 0, 0].tolist() == [1, 2, 3, 4, 0]


def test_a_tap_keeps_the_rows_dtype_and_chunks_that_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "activations.zarr"
    data = np.random.default_rng(0).normal(size=(7, 5, 2, 3))
    data[0, 0, 0, 0] = 1e6  # beyond float16
    for part in (data[:2], data[2:]):  # the second time as when a run is resumed
        store = Activations(path, [TapSpec("trunk/0/x", 4, "float16", 3, 3)])
        for record in part:
            store.put("trunk/0/x", 4, record)
        store.close()
    assert [step for step in range(9) if store.due(step)] == [0, 4, 8]
    value = zarr.open_array(str(path / "trunk/0/x/value"), mode="r")
    assert value.chunks == (3, 3, 2, 3)
    with np.errstate(over="ignore"):
        assert np.array_equal(np.asarray(value), data[:, :3].astype(np.float16))


def test_a_tap_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = Activations(tmp_path / "activations.zarr", [TAP])
    for width in (3, 3, 4, 4):
        store.put("trunk/0/x", 1, np.zeros((2, width)))
    with pytest.raises(UserError, match=r"trunk/0/x holds records of shape \(2, 3\), not \(2, 4\)"):
        store.close()
    assert records(tmp_path / "activations.zarr")[0] == [1, 1]


@pytest.mark.parametrize(
    ("pad", "end", "expected"),
    [
        # 9 pads, 8 ends a document
        (9, 8, [6, 4, 3, 0, 1, 6]),
        (9, None, [6, 4, 6, 0, 1, 6]),
        (None, 8, [6, 6, 3, 6, 6, 6]),
        (None, None, [6] * 6),
    ],
)
def test_lengths_count_the_first_document_without_padding(
    pad: int | None, end: int | None, expected: list[int]
) -> None:
    rows = ["123456", "123499", "128568", "999999", "199999", "912348"]
    tokens = np.array([[int(token) for token in row] for row in rows])
    assert document_lengths(tokens, pad=pad, end=end).tolist() == expected


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50_000, (5, 300_000))  # a row is more than one chunk's tokens
    way = rng.integers(0, 50_000, (3, 5, 11)).astype(np.int32)
    arrays = {"tokens": tokens, "lengths": np.full(5, 300_000)}
    path = write_samples(
        tmp_path / "samples.zarr", arrays, text=["a", "", "\0", "\U0001f600", "e"], trajectory=way, attributes={}
    )
    group = zarr.open_group(str(path), mode="r")
    assert np.array_equal(np.asarray(group["tokens"]), tokens)
    assert np.array_equal(np.asarray(group["trajectory"]), way)
    assert np.asarray(group["lengths"]).tolist() == [300_000] * 5
    assert np.asarray(group["text"]).tolist() == ["a", "", "\0", "\U0001f600", "e"]


def test_samples_are_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        write_samples(
            tmp_path / "samples.zarr",
            {"tokens": np.zeros((2, 3), np.int64)},
            text=["a", "\N{SNOWMAN}"],
            attributes={"seed": 1},
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples-2.zarr", "samples.zarr"]
    group = zarr.open_group(str(tmp_path / "samples.zarr"), mode="r")
    assert list(np.asarray(group["text"])) == ["a", "\N{SNOWMAN}"]


@pytest.mark.parametrize("moment", ["while the chunks are flushed", "just before the rename"])
def test_samples_written_at_once_get_groups_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    place = "sync_tree" if moment == "while the chunks are flushed" else "Path.rename"
    original = durable.sync_tree if place == "sync_tree" else Path.rename

    def late(part: Path, *target: Path) -> object:
        monkeypatch.undo()
        write_samples(tmp_path / "samples.zarr", {"tokens": np.ones((2, 3), np.int64)}, attributes={})
        return original(part, *target)

    monkeypatch.setattr(f"sedd_graph.store.durable.{place}", late)
    path = write_samples(tmp_path / "samples.zarr", {"tokens": np.zeros((2, 3), np.int64)}, attributes={})
    assert path == tmp_path / "samples-2.zarr"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples-2.zarr", "samples.zarr"]
    for name, value in (("samples.zarr", 1), ("samples-2.zarr", 0)):
        group = zarr.open_group(str(tmp_path / name), mode="r")
        assert np.array_equal(np.asarray(group["tokens"]), np.full((2, 3), value))


def test_names_are_numbered_until_none_is_left(tmp_path: Path) -> None:
    names = list(itertools.islice(numbered(tmp_path / "a.zarr"), 9_999))
    assert [names[0].name, names[1].name, names[-1].name] == ["a.zarr", "a-2.zarr", "a-9999.zarr"]
    with pytest.raises(UserError, match="exists already, and so do its numbered names up to 9,999"):
        list(numbered(tmp_path / "a.zarr"))
    (tmp_path / "part").mkdir()
    (tmp_path / "a.zarr").write_text("")
    with pytest.raises(FileExistsError):
        durable.publish(tmp_path / "part", names[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "part"]


def test_a_line_of_bytes_that_are_no_text_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xed\xa0\x80"}\n{"step": 3}\n')
    lines = JsonLines(path)
    assert lines.keep(lambda record: True) == 1
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    lines = JsonLines(path)
    lines.append({"step": 2})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    """Before, it stayed for ever: ``sweep`` knew the names of checkpoints only."""
    fcntl = pytest.importorskip("fcntl")
    left, held, other = (tmp_path / f".{name}.part" for name in ("a.json.00000001", "a.json.00000002", "ab.json.00000003"))  # fmt: skip
    for part in (left, held, other):
        part.write_text("half")
    os.mkfifo(pipe := tmp_path / ".a.json.00000004.part")
    with held.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        write_text(tmp_path / "a.json", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", held.name, other.name}
    assert (tmp_path / "a.json").read_text() == "whole"
    assert not pipe.exists()


def test_a_file_that_another_process_swept_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = list[Path]()

    def sweeping(source: Path, target: Path) -> None:
        if not swept:
            source.unlink()
            swept.append(source)
        source.replace(target)

    monkeypatch.setattr("sedd_graph.store.files.rename", sweeping)
    write_text(tmp_path / "a.json", "whole")
    assert swept
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_pipe_in_a_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Before, opening it waited for a reader, without end."""
    pytest.importorskip("fcntl")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"), alone(tmp_path, "training"):
        JsonLines(tmp_path / name)
