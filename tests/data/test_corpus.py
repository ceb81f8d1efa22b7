"""What is read, in which order, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sedd_graph_registry.data.corpora import HubDataset

from sedd_graph.data import sources
from sedd_graph.data.config import DataConfig
from sedd_graph.data.sources import read_corpus
from sedd_graph.errors import MissingExtraError, UserError


def read(root: Path, **corpus: Any) -> list[tuple[str, str]]:
    config = DataConfig.model_validate({"corpus": corpus}).corpus
    return [(d.prompt, d.text) for d in read_corpus(config, root=root)]


def texts(root: Path, *files: str) -> list[str]:
    return [text for _, text in read(root, op="text", files=list(files))]


def message(root: Path, **corpus: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(root, **corpus)
    return str(caught.value).replace(str(root), "ROOT")


def test_builtin_is_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    first = read(tmp_path, op="builtin")
    assert first == read(tmp_path, op="builtin")
    assert [text.strip() for _, text in first] == [topics[name].strip() for name in sorted(topics)]


def test_files_keep_the_order_of_patterns_sort_within_one_and_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "z.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, "z.md", "*.txt") == ["z.md", "a.txt", "b.txt"]
    assert texts(tmp_path, "**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert texts(tmp_path, "b.txt", "*.txt", "./b.txt") == ["b.txt", "a.txt"]
    assert texts(tmp_path, str(tmp_path / "a.txt")) == ["a.txt"]
    assert texts(tmp_path, str(tmp_path / "?.txt")) == ["a.txt", "b.txt"]


def test_brackets_in_a_name_or_in_the_folder_are_letters(tmp_path: Path) -> None:
    folder = tmp_path / "we[i]rd"
    folder.mkdir()
    (folder / "a[1].txt").write_text("x")
    assert texts(folder, "a[1].txt") == ["x"]
    assert texts(folder, "*.txt") == ["x"]


@pytest.mark.parametrize(
    "name", ["none.txt", "*.none", "x" * 900, "nul\0.txt", "nul\0*", "sub", "[", "**", "../" * 300 + "x"]
)
def test_a_name_of_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    assert message(tmp_path, op="text", files=[name]) == f"data.corpus.files: {name!r} matches no file under ROOT"


def test_not_utf8_names_file_and_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("aé".encode() + b"\xff")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfab\xfe")
    assert message(tmp_path, op="text", files=["a.txt"]) == "ROOT/a.txt: not UTF-8: byte 3 is 0xff"
    assert message(tmp_path, op="text", files=["bom.txt"]) == "ROOT/bom.txt: not UTF-8: byte 5 is 0xfe"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    offset = (tmp_path / "a.jsonl").read_bytes().index(0xFF)
    expected = f"ROOT/a.jsonl:2: not UTF-8: byte {offset} is 0xff"
    assert message(tmp_path, op="jsonl", files=["a.jsonl"]) == expected


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}\r\n\r\n  \n{"text": "cd"}')
    assert texts(tmp_path, "a.txt") == ["ab"]
    assert read(tmp_path, op="jsonl", files=["a.jsonl"]) == [("", "ab"), ("", "cd")]


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    assert message(tmp_path, op="text", files=["a.txt"]) == "data.corpus: the corpus has no text"
    assert message(tmp_path, op="jsonl", files=["a.jsonl"]) == "data.corpus: the corpus has no text"


def test_jsonl_fields_and_prompts(tmp_path: Path) -> None:
    odd = "line\nbreak \u2028 é 😀"
    lines = [{"q": "two?", "a": odd, "n": 1}, {"q": "", "a": "no prompt"}, {"q": "no text", "a": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read(tmp_path, op="jsonl", files=["a.jsonl"], field="a", prompt="q")
    assert found == [("two?", odd), ("", "no prompt")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "not a JSON object"),
        ('{"txet": "a"}', "no text field 'text' (did you mean 'txet'?); fields: txet"),
        ("{}", "no text field 'text'; fields: none"),
        ('{"text": null}', "field 'text' is null, not text"),
        ('{"text": 3}', "field 'text' is int, not text"),
        ('{"text": "ab\\ud800"}', "field 'text' has a lone surrogate, U+D800, at character 2"),
        ("[" * 200_000, "not JSON: nested too deeply"),
    ],
)
def test_jsonl_faults_name_the_line(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    assert message(tmp_path, op="jsonl", files=["a.jsonl"]).rstrip("\n") == f"ROOT/a.jsonl:3: {expected}"


def test_more_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    assert "GiB in all" in message(tmp_path, op="text", files=["a.txt"])
    assert "characters, which is the limit" in message(tmp_path, op="builtin")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"q": f"q{i}", "a": f"text {i}", "big": [i] * 10} for i in range(5000)]  # more than one read
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "1.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"q": "last", "a": "end"}]), tmp_path / "2.parquet")
    found = read(tmp_path, op="parquet", files=["*.parquet"], field="a", prompt="q")
    assert found == [(r["q"], r["a"]) for r in rows] + [("last", "end")]
    said = message(tmp_path, op="parquet", files=["1.parquet"], field="b")
    assert said == "ROOT/1.parquet: no text field 'b'; fields: q, a, big"
    said = message(tmp_path, op="parquet", files=["1.parquet"], field="big")
    assert said == "ROOT/1.parquet: row 1: field 'big' is list, not text"
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "bad.parquet").write_bytes(whole[:400])
    assert "ROOT/bad.parquet: not a Parquet file: " in message(tmp_path, op="parquet", files=["bad.parquet"])
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    (tmp_path / "torn.parquet").write_bytes(b"PAR1" + bytes(len(whole) - footer - 4) + whole[-footer:])
    said = message(tmp_path, op="parquet", files=["torn.parquet"], field="a")
    assert said.startswith("ROOT/torn.parquet: cannot be read after row 0: ")


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_dataset_from_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "n": i}) + "\n" for i in range(9)))
    expected = [("", f"t{i}") for i in range(9)]
    assert read(tmp_path, op="dataset", name="plain") == expected
    assert read(tmp_path, op="dataset", name="plain", split="train[:3]") == expected[:3]
    table = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(9)])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "many"))
    assert read(tmp_path, op="dataset", name="one") == expected
    assert read(tmp_path, op="dataset", name="many") == expected
    assert read(tmp_path, op="dataset", name="plain", streaming=True) == expected
    said = message(tmp_path, op="dataset", name="plain", field="txt", streaming=True)
    assert "no text field 'txt' (did you mean 'text'?)" in said
    said = message(tmp_path, op="dataset", name="plain", field="txt")
    assert said == "data.corpus: plain: no text field 'txt' (did you mean 'text'?); fields: text, n"
    # a streamed set is read as it goes: what comes before a damaged file is there, and the error says where it ends
    (tmp_path / "torn").mkdir()
    for name, text in (("a", '{"text": "t0"}\n{"text": "t1"}\n'), ("b", "{torn")):
        (tmp_path / "torn" / f"{name}.jsonl").write_text(text)
    streamed = HubDataset(HubDataset.Config(name="torn", streaming=True)).documents(tmp_path)
    assert [next(streamed).text, next(streamed).text] == ["t0", "t1"]
    with pytest.raises(UserError, match="torn: cannot be read after row 2: "):
        next(streamed)
    said = message(tmp_path, op="dataset", name="many", split="test")
    assert said.startswith("data.corpus: the datasets library cannot load 'many': ")


@pytest.mark.parametrize(
    ("module", "corpus"),
    [("pyarrow.parquet", {"op": "parquet", "files": ["a"]}), ("datasets", {"op": "dataset", "name": "a"})],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, corpus: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sedd_graph\[datasets\]'"):
        read(tmp_path, **corpus)


def test_a_file_is_read_to_the_last_byte(tmp_path: Path) -> None:
    raw = ("añ\r\n\t\0😀" * 5000).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    assert hashlib.sha256(texts(tmp_path, "a.txt")[0].encode()).digest() == hashlib.sha256(raw).digest()
