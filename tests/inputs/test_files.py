"""Files of the wrong kind, files that grow or lie about their size, and names that lead out of the project."""

from __future__ import annotations

import io
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sedd_graph_registry.noise._frequencies import load_numbers

from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.sources import read_corpus
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.inputs import confine
from sedd_graph.inputs.arrays import read_npy
from sedd_graph.inputs.confine import allow_outside, confined, matching
from sedd_graph.inputs.files import open_file, read_bytes, read_json, read_text

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the file types of Unix")


def corpus(path: Path, **section: Any) -> object:
    return read_corpus(DataConfig.model_validate({"corpus": section | {"files": [str(path)]}}).corpus, root=path.parent)


def points(path: Path) -> object:
    found = PointsConfig.model_validate({"points": {"op": "npy", "path": str(path)}}).points
    return found.points(path.parent, np.random.default_rng(0))


def tokenizer(path: Path) -> object:
    section = DataConfig.model_validate({"tokenizer": {"op": "file", "path": str(path)}})
    return section.tokenizer.make((), root=path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: corpus(path, op="text"),
    "jsonl": lambda path: corpus(path, op="jsonl"),
    "parquet": lambda path: corpus(path, op="parquet"),
    "points": points,
    "tokenizer": tokenizer,
    "frequencies": lambda path: load_numbers(str(path), 1),
    "classifier": lambda path: load_numbers(str(path), 2),
    "run": load_tokenizer,
    "bytes": lambda path: read_bytes(path, limit=100),
    "json": read_json,
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    monkeypatch.chdir(tmp_path)
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return READERS[request.param]


@pytest.mark.timeout(30)
def test_a_pipe_or_device_is_refused_by_name(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"pipe: cannot be read: it is a pipe, and a regular file is needed"):
        reader(pipe)
    (tmp_path / "link").symlink_to("/dev/zero")
    with allow_outside(), pytest.raises(UserError, match=r"it is a device, and a regular file is needed"):
        reader(tmp_path / "link")


def test_a_file_with_few_blocks_on_the_disk_is_read(tmp_path: Path) -> None:
    """As good files have on file systems that compress: only the size counts."""
    path = tmp_path / "a"
    with path.open("wb") as stream:
        stream.write(b"text")
        stream.truncate(2**25)
    assert path.stat().st_blocks * 512 < 2**19
    assert read_bytes(path, limit=2**25).rstrip(b"\0") == b"text"
    with pytest.raises(UserError, match=r"a: has 32 MiB; the limit is 32 MiB"):
        read_bytes(path, limit=2**25 - 1)


def test_a_link_out_of_the_project_is_refused_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, secret = tmp_path / "project", tmp_path / "secret.txt"
    project.mkdir()
    secret.write_text("secret")
    (project / "link.txt").symlink_to(secret)
    monkeypatch.chdir(project)
    for name in ("link.txt", "../secret.txt", str(secret)):
        with pytest.raises(UserError, match=r"outside the project's folder .* --allow-outside"):
            confined(name, project, what="key")
        section = DataConfig.model_validate({"corpus": {"op": "text", "files": [name]}})
        with pytest.raises(UserError, match=r"^data.corpus.files: .* lies outside"):
            read_corpus(section.corpus, root=project)
        with allow_outside():
            assert read_corpus(section.corpus, root=project)[0].text == "secret"
    for pattern in ("*.txt", "**/*.txt", "../*.txt", f"{tmp_path}/*.txt"):
        with pytest.raises(UserError, match="lies outside"):
            matching(pattern, project, what="key", looked=[0])


def test_a_file_that_grows_is_read_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    with open_file(path, limit=10), path.open("ab") as more:
        more.write(b"x")
    with pytest.raises(UserError, match="has 11 bytes; the limit is 10 bytes"):
        read_bytes(path, limit=10)
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8: byte 2 is 0xff"):
        read_text(path, limit=10)
    if Path("/proc/self/environ").exists():  # the size of such files is 0
        with pytest.raises(UserError, match="has more than 1 bytes"):
            read_bytes("/proc/self/environ", limit=1)


def npy(shape: str, dtype: str = "'<f4'", body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    head = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (64 - (len(head) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(head))
    return b"\x93NUMPY" + version + size + head + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(2000000000, 2)"), "its header declares 14.9 GiB; the limit"),
        (npy("(9, 2)", body=b"\0" * 40), "its header declares 72 bytes, and 40 bytes follow"),
        (npy("(-1, 2)"), "cannot be read as a .npy file"),
        (npy("(0, 10**30)"), "cannot be read as a .npy file"),
        (npy("(0, 99999999999999999999)"), "cannot be read as a .npy file"),
        (npy("(2, 2)", dtype="'|O'", body=b"\0" * 99), "of numbers: its type is object"),
        (npy("(2, 2)", dtype="'<U9'", body=b"\0" * 999), "of numbers: its type is <U9"),
        (npy("(2, 2)", dtype="[('a', '<f4')]", body=b"\0" * 99), "of numbers"),
        (npy("(2, 2)", dtype="'<f4'", version=b"\x02\x00", body=b"\0" * 3), "and 3 bytes follow"),
        (npy("(2, 2)", version=b"\x09\x00"), "cannot be read as a .npy file"),
        (npy("(" * 200 + ")" * 200), "cannot be read as a .npy file"),
        (npy("(" + "1," * 40 + ")", body=b"\0\0\0\0"), "its shape is"),
        (b"PK\x03\x04", "cannot be read as a .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read as a .npy file"),
        (b"", "cannot be read as a .npy file"),
    ],
)
def test_npy_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_npy(path, limit=2**30)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read_as_numpy_reads_it(tmp_path: Path, dtype: str, order: Any) -> None:
    x = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", x)
    found = read_npy(tmp_path / "a.npy", limit=2**20)
    assert found.dtype == x.dtype
    assert np.array_equal(found, np.load(io.BytesIO((tmp_path / "a.npy").read_bytes())))


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "**/*", "*/*.txt", "**/a*", "deep/**", "deep/**/*.txt", "**/**/*.md", "?.txt", "[ab].txt", "[!a].txt", "de*/*/c.txt", ".*", ".hidden/*", "**/er/**/*.txt", "x/../*.txt", "./*.txt", "deep//er/*.txt"],
)  # fmt: skip
def test_patterns_match_as_the_module_glob(tmp_path: Path, pattern: str) -> None:
    import glob

    for name in (
        "b.txt",
        "a.txt",
        ".dot.txt",
        "deep/er/c.txt",
        "deep/a.md",
        "deep/er/and/er/d.txt",
        "z.md",
        ".hidden/h.txt",
        "x/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = [n for n in glob.glob(pattern, root_dir=tmp_path, recursive=True) if (tmp_path / n).is_file()]
    found = matching(pattern, tmp_path, what="key", looked=[0])
    assert found == [Path(os.path.realpath(tmp_path / name)) for name in sorted(set(expected))]


@pytest.mark.timeout(60)
def test_patterns_end_in_loops_of_links_and_in_large_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdef":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("x")
        for other in "abcdef":
            (tmp_path / name / f"to{other}").symlink_to(tmp_path / other)
        (tmp_path / name / "up").symlink_to(tmp_path)
    monkeypatch.setattr(confine, "MAX_ENTRIES", 30_000)
    for pattern in ("**/*.none", "**/to*/**/*.txt", "*/*/*/*/*/*/*/*/*/*"):
        with pytest.raises(UserError, match="looks at more than 30,000 files and folders: name the folder"):
            matching(pattern, tmp_path, what="key", looked=[0])
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "x.txt").write_text("x")
    (deep / "self").symlink_to(deep)
    assert matching("**/*.txt", deep, what="key", looked=[0]) == [Path(os.path.realpath(deep / "x.txt"))]
    began = time.process_time()
    with pytest.raises(UserError, match="lies outside"):
        matching("/usr/**/*.x", tmp_path, what="key", looked=[0])
    assert time.process_time() - began < 30


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sedd_graph_registry.data import corpora

    monkeypatch.setattr(corpora, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ab"}\n' + b"x" * 101)
    with pytest.raises(
        UserError, match=r"a.jsonl:2: a line of more than 100 bytes: JSON Lines has one object per line"
    ):
        corpus(tmp_path / "a.jsonl", op="jsonl")
