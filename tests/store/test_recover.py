"""Damaged activations when a run resumes: what is lost is named and becomes NaN, and nothing else changes."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.arrays import open_stored, read_array, write_samples
from sedd_graph.store.manifest import DamagedError

TAP = TapSpec("trunk/0/x", 2, "float32", None, 3)
VALUES = np.random.default_rng(0).normal(size=(10, 2, 5)).astype(np.float32)


def record(path: Path, first: int, last: int, *, resume: int | None = None) -> list[str]:
    """Write the records of the steps ``first`` to ``last``, and return the messages."""
    said: list[str] = []
    store = Activations(path, [TAP], resume_step=resume, say=said.append)
    for step in range(first, last + 1):
        for name in store.due(step):
            store.put(name, step, VALUES[step // 2 - 1])
    store.close()
    return said


def read(path: Path) -> tuple[list[int], npt.NDArray[np.float32]]:
    steps = np.asarray(zarr.open_array(path / "trunk/0/x/step", mode="r"))
    return steps.tolist(), np.asarray(zarr.open_array(path / "trunk/0/x/value", mode="r"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def edit(**changes: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def empty(path: Path) -> None:
    os.truncate(path, 0)


METADATA = "trunk/0/x/value/zarr.json"
DAMAGE: list[tuple[str, Callable[[Path], object], list[int], str]] = [
    # file, damage, records (from 0) that are lost, message
    ("trunk/0/x/value/c/1/0/0", flip, [3, 4, 5], "c/1/0/0 is damaged or missing: the records of steps 8 to 12 are lost"),
    ("trunk/0/x/value/c/1/0/0", empty, [3, 4, 5], "the records of steps 8 to 12 are lost, and are now NaN"),
    ("trunk/0/x/value/c/0/0/0", Path.unlink, [0, 1, 2], "the records of steps 2 to 6 are lost, and are now NaN"),
    ("trunk/0/x/value/c/2/0/0", empty, [6], "the records of steps 14 to 14 are lost, and are now NaN"),
    ("trunk/0/x/step/c/0", flip, [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/c/0", empty, [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/c/0", Path.unlink, [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/zarr.json", empty, [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/zarr.json", edit(shape=[5]), [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/zarr.json", edit(shape=[10**15]), [], "step is damaged and was rewritten"),
    ("trunk/0/x/step/zarr.json", edit(data_type="int32"), [], "step is damaged and was rewritten"),
    (METADATA, empty, [], "value/zarr.json is damaged and was rewritten"),
    (METADATA, Path.unlink, [], "value/zarr.json is damaged and was rewritten"),
    (METADATA, edit(shape=[10**15, 2, 5]), [], ""),
    (METADATA, edit(shape=[2, 2, 5]), [], ""),
    (METADATA, edit(data_type="int32"), [], "value/zarr.json is damaged and was rewritten"),
    (METADATA, edit(codecs=[]), [], "value/zarr.json is damaged and was rewritten"),
    ("zarr.json", empty, [], "activations.zarr/zarr.json is damaged and was rewritten"),
    ("trunk/0/x/zarr.json", edit(attributes=0), [], "trunk/0/x/zarr.json is damaged and was rewritten"),
    ("trunk/0/zarr.json", edit(node_type="array"), [], "trunk/0/zarr.json is damaged and was rewritten"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage", "lost", "named"), DAMAGE, ids=[f"{i}-{c[0]}" for i, c in enumerate(DAMAGE)])  # fmt: skip
def test_damage_is_named_and_the_rest_stays(
    tmp_path: Path, file: str, damage: Callable[[Path], object], lost: list[int], named: str
) -> None:
    path = tmp_path / "activations.zarr"
    record(path, 1, 16)  # eight records: the run resumes after the seventh
    damage(path / file)
    said = record(path, 15, 20, resume=14)
    assert (named in said[0]) if named else not said
    assert all(line.startswith(f"warning     {path}") for line in said)
    steps, values = read(path)
    assert steps == list(range(2, 21, 2))
    expected = VALUES.copy()
    expected[lost] = np.nan
    assert np.array_equal(values, expected, equal_nan=True)
    assert record(path, 15, 20, resume=20) == []  # nothing is left to recover


@pytest.mark.parametrize("file", ["value/c/1/0/0", "step/c/0", "step/zarr.json", "value/zarr.json"])
def test_a_fault_of_the_machine_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = tmp_path / "activations.zarr"
    record(path, 1, 16)
    original = Path.open

    def failing(self: Path, *arguments: Any, **settings: Any) -> object:
        if self == path / "trunk/0/x" / file:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return original(self, *arguments, **settings)

    for name in ("open", "read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, failing if name == "open" else _through(name, failing))
    with pytest.raises(EnvironmentFault, match="Too many open files"):
        record(path, 15, 20, resume=14)
    monkeypatch.undo()
    assert record(path, 15, 20, resume=14) == []
    assert np.array_equal(read(path)[1], VALUES)


def _through(name: str, failing: Callable[..., Any]) -> Callable[..., object]:
    """Return the method of a path under this name, which first opens the file by ``failing``."""
    original = getattr(Path, name)

    def method(self: Path, *arguments: Any, **settings: Any) -> object:
        failing(self, "rb").close()
        return original(self, *arguments, **settings)

    return method


def test_files_of_a_killed_process_are_swept_for_each_port_alone(tmp_path: Path) -> None:
    path = tmp_path / "activations.zarr"
    record(path, 1, 16)
    ours = [
        path / place / "zarr.json.0123.partial" for place in (".", "trunk", "trunk/0", "trunk/0/x", "trunk/0/x/value")
    ]
    ours.append(path / "trunk/0/x/value/c/0/0/0.0123.partial")
    other = path / "trunk" / "1" / "x" / "c.0123.partial"
    other.parent.mkdir(parents=True)
    for file in (*ours, other):
        file.write_text("")
    assert record(path, 15, 20, resume=14) == []
    assert list(path.rglob("*.partial")) == [other]


def test_what_cannot_be_recovered_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "activations.zarr"
    record(path, 1, 16)
    empty(path / METADATA)
    empty(path / "trunk/0/x/step/zarr.json")
    with pytest.raises(DamagedError, match=r"value/zarr.json is damaged, and so is its copy .*: move activations.zarr"):
        record(path, 15, 20, resume=14)
    shutil.rmtree(path)
    assert record(path, 15, 20, resume=14) == [f"warning     {path / 'trunk/0/x'}: the records of steps 2 to 14 are missing"]  # fmt: skip
    assert read(path)[0] == [16, 18, 20]


def test_changed_metadata_of_samples_are_named(tmp_path: Path) -> None:
    facts = {"seed": 1, "prompt": [(0, -1)], "pad": None}
    path = write_samples(tmp_path / "samples.zarr", {"tokens": np.ones((4, 3), np.int64)}, attributes=facts)
    whole = {file: file.read_text() for file in (path / "zarr.json", path / "tokens" / "zarr.json")}
    assert open_stored(path).attrs["seed"] == 1
    for file, old, new in (
        (path / "zarr.json", '"seed": 1', '"seed": 2'),
        (path / "zarr.json", "prompt", "promt"),
        (path / "zarr.json", "{", ""),
        (path / "tokens" / "zarr.json", "4,", "3,"),
        (path / "tokens" / "zarr.json", "int64", "int32"),
    ):
        assert old in whole[file]
        file.write_text(whole[file].replace(old, new, 1))
        with pytest.raises(DamagedError, match=str(file)):
            open_stored(path)
        file.write_text(whole[file])
    (path / "tokens" / "zarr.json").unlink()
    with pytest.raises(DamagedError, match=r"tokens/zarr.json is missing"):
        open_stored(path)


def test_a_reader_gets_no_zeros_for_lost_chunks(tmp_path: Path) -> None:
    tokens = np.zeros((4, 3), np.int64)  # chunks of zeros are written, too
    path = write_samples(tmp_path / "samples.zarr", {"tokens": tokens}, text=["a", "b", "", ""], attributes={})
    group = zarr.open_group(path, mode="r")
    assert np.array_equal(read_array(group, "tokens"), tokens)
    for name in ("tokens", "text"):
        chunk = next(p for p in (path / name / "c").rglob("*") if p.is_file())
        flip(chunk)
        with pytest.raises(DamagedError, match=f"samples.zarr/{name} is damaged"):
            read_array(group, name)
        chunk.unlink()
        with pytest.raises(DamagedError, match=f"samples.zarr/{name}: 1 chunks are missing"):
            read_array(group, name)
    with pytest.raises(UserError):
        read_array(zarr.open_group(path.parent, mode="a"), "samples.zarr")


def test_only_the_chunks_of_the_rows_wanted_are_read(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    data = np.arange(40).reshape(10, 4)
    array = group.create_array("a", shape=(10, 4), chunks=(2, 3), dtype=np.int64)
    array[:] = data
    for name in ("c/2", "c/3", "c/4"):
        shutil.rmtree(tmp_path / "a.zarr" / "a" / name)
    assert np.array_equal(read_array(group, "a", rows=3), data[:3])
    assert np.array_equal(read_array(group, "a", rows=4, columns=1), data[:4, :1])
    assert read_array(group, "a", rows=0).shape == (0, 4)
    with pytest.raises(DamagedError, match=r"a: 2 chunks are missing"):
        read_array(group, "a", rows=5)
    with pytest.raises(DamagedError, match=r"a: 3 chunks are missing"):
        read_array(group, "a", rows=100, columns=3)


@pytest.mark.parametrize(
    ("shape", "chunks", "rows", "message"),
    [
        ((2**30, 2), (2**10, 2), None, "what is to be read has 16 GiB, as declared; the limit is 2 GiB"),
        ((2**30, 2**30), (1, 1), 1, "what is to be read has 8 GiB, as declared; the limit is 2 GiB"),
        ((4, 2), (2**30, 2), 1, "a chunk has 16 GiB, as declared; the limit is 256 MiB"),
        ((2**21,), (1,), None, "2,097,152 chunks are to be read; the limit is 1,048,576"),
    ],
)
def test_an_array_that_would_fill_the_memory_is_refused_before_it_is_read(
    shape: tuple[int, ...], chunks: tuple[int, ...], rows: int | None, message: str, tmp_path: Path
) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("a", shape=shape, chunks=chunks, dtype=np.int64)
    with pytest.raises(UserError, match=f"a.zarr/a: {message}"):
        read_array(group, "a", rows=rows)
