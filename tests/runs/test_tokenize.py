"""``sedd-graph tokenize``: what it reads, what it refuses, and what is left when it is killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sedd_graph.cli.main import run
from sedd_graph.data.shard_index import read_index
from sedd_graph.data.shards import Shards
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.runs import tokenize as module
from sedd_graph.runs.shard_writer import ShardWriter
from tests.data.shard_sets import request, shard, texts, write_jsonl


def content(folder: Path) -> dict[str, str]:
    names = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def decoded(folder: Path) -> list[str]:
    shards = Shards([(folder, read_index(folder / "index.json"))])
    starts, stops = shards.spans(np.arange(shards.documents))
    width = int((stops - starts).max())
    tokenizer = load_tokenizer(folder)
    return [
        tokenizer.decode(row[:size])
        for row, size in zip(shards.rows(starts, stops - starts, width), (stops - starts).tolist(), strict=True)
    ]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_every_kind_give_the_same_tokens(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = texts(50)
    raw = write_jsonl(inside / "a.jsonl", rows).read_bytes()
    (inside / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    with pyarrow.CompressedOutputStream("a.jsonl.zst", "zstd") as stream:
        stream.write(raw)
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in rows]), "a.parquet")
    (inside / "a.txt").write_text("\n\n".join(rows) + " \n")
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"):
        lines = ["--lines"] if name == "a.txt" else []
        assert run(["tokenize", name, "-o", f"of-{name}", "--tokenizer", "bytes", "--processes", "1", *lines]) == 0
        found.append(decoded(inside / f"of-{name}"))
    assert found == [rows] * 5
    assert "next        data: {corpus: {op: tokens, files: [of-a.jsonl]}" in capsys.readouterr().out


def test_files_outside_the_folder_are_read_if_the_user_names_them(
    inside: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also while a tokenizer is fitted, which takes the text from a thread of its library."""
    path = write_jsonl(tmp_path_factory.mktemp("elsewhere") / "a.jsonl", texts(30))
    assert run(["tokenize", str(path), "-o", "s", "--tokenizer", "bpe", "--tokens", "300", "--processes", "1"]) == 0
    assert decoded(inside / "s") == texts(30)


def test_texts_are_made_with_the_caller_s_context() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from sedd_graph.inputs.confine import allow_outside, outside_allowed

    with allow_outside():
        texts_of = module._in_context(str(outside_allowed()) for _ in range(3))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, texts_of).result() == ["True"] * 3


def test_shards_do_not_depend_on_the_number_of_processes(inside: Path) -> None:
    write_jsonl(inside / "a.jsonl", texts(60))
    for processes in (1, 2):
        shard(inside, "a.jsonl", to=f"by-{processes}", processes=processes, tokenizer={"op": "bpe", "size": 300})
    assert content(inside / "by-1") == content(inside / "by-2")


def test_a_blueprint_names_corpus_and_tokenizer(inside: Path, small: Callable[..., Path]) -> None:
    write_jsonl(inside / "a.jsonl", texts(60))
    write_jsonl(inside / "b.jsonl", texts(30, 3))
    data = (
        "data: {tokenizer: {op: characters, size: 128}",
        "data: {corpus: {op: jsonl, files: [a.jsonl]}, heldout: {op: jsonl, files: [b.jsonl]}, tokenizer: {op: characters, size: 128}",
    )
    blueprint = str(small(data))
    assert run(["tokenize", blueprint, "-o", "train", "--processes", "1"]) == 0
    assert run(["tokenize", blueprint, "--heldout", "-o", "valid", "--tokenizer", "train", "--processes", "1"]) == 0
    assert (decoded(inside / "train"), decoded(inside / "valid")) == (texts(60), texts(30, 3))
    assert read_index(inside / "train" / "index.json").tokenizer.section == {
        "op": "characters.v1",
        "size": 128,
        "alphabet": None,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl"], "name the folder for the shards: -o SHARDS"),
        (["a.jsonl", "-o", "s"], "name a tokenizer: --tokenizer bpe, bytes, characters, or a tokenizer.json"),
        (["a.csv", "-o", "s", "--tokenizer", "bytes"], "a.csv: its suffix does not say what it is"),
        (["a.jsonl", "a.txt", "-o", "s", "--tokenizer", "bytes"], "of different kinds (jsonl, text)"),
        (["none.txt", "-o", "s", "--tokenizer", "bytes"], "'none.txt' matches no file"),
        (["a.jsonl", "-o", "s", "--tokenizer", "byts"], "unknown op 'byts' (did you mean 'bytes'?)"),
        (["a.txt", "-o", "s", "--tokenizer", "bytes", "--field", "x"], "--field is for .jsonl and .parquet"),
        (["a.jsonl", "-o", "s", "--tokenizer", "bytes", "--tokens", "9"], "Extra inputs are not permitted"),
        (["a.jsonl", "-o", "s", "--tokens", "9"], "--tokens is the size of a tokenizer that --tokenizer names"),
        (["a.jsonl", "-o", "s", "--tokenizer", "bytes", "--field", "x"], "no text field 'x'"),
        (["a.jsonl", "-o", "a.txt", "--tokenizer", "bytes"], "a.txt exists and is not a folder"),
        (["a.jsonl", "-o", ".", "--tokenizer", "bytes"], "exists and is not empty: 'a.jsonl' is in it"),
        (["a.jsonl", "-o", "done", "--tokenizer", "bytes"], "holds finished shards already, which are never overwritten"),
        (["e.jsonl", "-o", "s", "--tokenizer", "bytes"], "the corpus has no text"),
        (["bad.jsonl.gz", "-o", "s", "--tokenizer", "bytes"], "cannot be decompressed"),
        (["bad.jsonl.zst", "-o", "s", "--tokenizer", "bytes"], "cannot be decompressed"),
        (["a.jsonl", "--heldout", "-o", "s", "--tokenizer", "bytes"], "--heldout is for a blueprint"),
        (["done", "--verify", "-o", "s"], "--verify reads shards: it takes no -o"),
        (["nothing", "--verify"], "index.json: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_refused(inside: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    write_jsonl(inside / "a.jsonl", texts(9))
    (inside / "a.txt").write_text("text")
    (inside / "e.jsonl").write_text('{"text": ""}\n')
    for suffix in ("gz", "zst"):
        (inside / f"bad.jsonl.{suffix}").write_bytes(b"no such thing")
    shard(inside, "a.jsonl", to="done")
    before = content(inside / "done")
    assert run(["tokenize", *arguments, *([] if "--verify" in arguments else ["--processes", "1"])]) == 2
    assert message in capsys.readouterr().err
    assert content(inside / "done") == before
    assert not (inside / "s" / "index.json").exists()


class Stopped(Exception):
    pass


def test_an_interrupted_folder_is_resumed_and_refused_to_others(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(inside / "a.jsonl", texts(90))
    tokenizer = {"op": "bpe", "size": 280}
    whole = shard(inside, "a.jsonl", to="whole", tokenizer=tokenizer)
    assert len(whole.shards) > 5
    plain = ShardWriter.close

    def close(self: ShardWriter, *arguments: object) -> None:
        plain(self, *arguments)  # type: ignore[arg-type]
        if len(self.progress.shards) == 3:
            raise Stopped

    monkeypatch.setattr(ShardWriter, "close", close)
    with pytest.raises(Stopped):
        shard(inside, "a.jsonl", to="part", tokenizer=tokenizer)
    monkeypatch.undo()
    assert not (inside / "part" / "index.json").exists()
    with pytest.raises(UserError, match="was begun with another shard_tokens: go on with the same command"):
        shard(inside, "a.jsonl", to="part", tokenizer=tokenizer, shard_tokens=200)
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        shard(inside, "a.jsonl", to="part")
    good = (inside / "a.jsonl").read_text()
    for changed in (good.replace("cat", "dog"), good[: len(good) // 9].rpartition("\n")[0]):
        (inside / "a.jsonl").write_text(changed)
        with pytest.raises(UserError, match="the text has changed since it was begun"):
            shard(inside, "a.jsonl", to="part", tokenizer=tokenizer)
    (inside / "a.jsonl").write_text(good)
    written: list[str] = []
    plain_write = ShardWriter.close

    def counted(self: ShardWriter, pieces: int, text_sha256: str) -> None:
        written.append(text_sha256)
        plain_write(self, pieces, text_sha256)

    monkeypatch.setattr(ShardWriter, "close", counted)
    shard(inside, "a.jsonl", to="part", tokenizer=tokenizer)
    assert len(written) == len(whole.shards) - 3
    assert content(inside / "part") == content(inside / "whole")


def test_a_process_ended_between_index_and_progress_has_finished(inside: Path) -> None:
    write_jsonl(inside / "a.jsonl", texts(20))
    shard(inside, "a.jsonl")
    before = content(inside / "shards")
    (inside / "shards" / "progress.json").write_text(json.dumps({"settings": {}}))
    shard(inside, "a.jsonl")
    assert content(inside / "shards") == before


def test_a_full_disk_is_said_and_resumed(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(inside / "a.jsonl", texts(60))
    shard(inside, "a.jsonl", to="whole")
    calls = []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sedd_graph.runs.shard_writer.os.fsync", full)
        with pytest.raises(EnvironmentFault, match="the disk is full"):
            shard(inside, "a.jsonl")
    assert not list((inside / "shards").glob(".*.part"))
    shard(inside, "a.jsonl")
    assert content(inside / "shards") == content(inside / "whole")


SCRIPT = """
import sys
from pathlib import Path
from tests.data.shard_sets import shard
if __name__ == "__main__":
    shard(Path(sys.argv[1]), "a.jsonl", to="killed", processes=int(sys.argv[2]), tokenizer={"op": "bpe", "size": 290})
"""


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill(inside: Path, times: int, processes: int) -> int:
    """Start tokenising and kill it at random moments, then let it end. Returns how many kills met it alive."""
    script, generator, met = inside / "go.py", random.Random(7), 0
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), str(inside), str(processes)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    began = time.monotonic()
    subprocess.run([*command[:2], str(inside / "first"), str(processes)], env=environment, check=True)
    seconds = time.monotonic() - began
    for _ in range(times):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        time.sleep(generator.uniform(0, 1.1 * seconds))
        process.send_signal(signal.SIGKILL)
        met += process.wait() == -signal.SIGKILL
        if (index := inside / "killed" / "index.json").exists():
            read_index(index)
        deadline = time.monotonic() + 60
        while _alive(process.pid):  # the processes that tokenise end with their parent
            assert time.monotonic() < deadline
            time.sleep(0.02)
    if not (inside / "killed" / "index.json").exists():
        subprocess.run(command, env=environment, check=True)
    (inside / "killed" / "progress.json").unlink(missing_ok=True)
    for left in (inside / "killed").glob(".*.part"):
        left.unlink()
    assert content(inside / "killed") == content(inside / "first" / "killed")
    return met


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize(("times", "processes"), [(2, 1), pytest.param(60, 2, marks=pytest.mark.slow)])  # fmt: skip
def test_kills_leave_nothing_torn(inside: Path, times: int, processes: int) -> None:
    write_jsonl(inside / "a.jsonl", texts(400))
    (inside / "first").mkdir()
    write_jsonl(inside / "first" / "a.jsonl", texts(400))
    assert kill(inside, times, processes) > 0


def test_text_of_a_large_file_is_never_whole_in_memory(inside: Path) -> None:
    """A document of 16 pieces is read piece by piece, and its tokens are those of the whole."""
    line = " ".join(texts(10)) + " "
    with (inside / "a.txt").open("w") as stream:
        for _ in range(300):
            stream.write(line * 40)
    asked = request(inside, "a.txt")
    pieces = list(asked.corpus.text(inside))
    assert "".join(text for text, _ in pieces) == (inside / "a.txt").read_text()
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(text) for text, _ in pieces) <= 4 * 2**20
    from sedd_graph.data.characters import pieces as split

    assert [text for text, _ in pieces] == list(split((inside / "a.txt").read_text()))


def test_lines_that_straddle_pieces_are_whole(inside: Path) -> None:
    parts = [("one\r", False), ("\ntw", False), ("o\n\n  three ", True), ("four", True)]
    assert list(module._lines(iter(parts))) == [("one", True), ("two", True), ("three", True), ("four", True)]


def test_a_model_is_trained_on_shards_and_refuses_others(
    inside: Path, small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(inside / "a.jsonl", texts(300))
    fitted = {"op": "characters", "size": 128}
    shard(inside, "a.jsonl", tokenizer=fitted, shard_tokens=5000)
    data = ("data: {tokenizer", "data: {corpus: {op: tokens, files: [shards]}, tokenizer")
    blueprint = str(small(data))
    arguments = ["--runs", "runs", "--path-to", "at", "--proof", "quick", "--device", "cpu"]
    assert run(["build", blueprint, *arguments]) == 0
    path = Path((inside / "at").read_text())
    assert run(["train", str(path), "--device", "cpu"]) == 0
    assert not (path / "tokens").exists()  # shards need no second copy
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    evaluation = json.loads((path / "evaluation.json").read_text())
    assert evaluation["bits_per_character"] > 0
    shutil.rmtree(inside / "shards")
    write_jsonl(inside / "a.jsonl", texts(300, 9))
    shard(inside, "a.jsonl", tokenizer={"op": "file", "path": str(path / "tokenizer.json")}, shard_tokens=5000)
    capsys.readouterr()
    assert run(["eval", str(path), "--device", "cpu", "--batches", "1"]) == 0
    assert "the corpus has changed since" in capsys.readouterr().out
    shutil.rmtree(inside / "shards")
    shard(inside, "a.jsonl", tokenizer="bytes", shard_tokens=5000)
    assert run(["eval", str(path), "--device", "cpu", "--batches", "1"]) == 2
    assert "was made with another tokenizer, of 257 tokens" in capsys.readouterr().err
