"""Values, exceptions, signals and silence of a child process, and the readers that use one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sedd_graph.data.config import DataConfig
from sedd_graph.data.sources import read_corpus
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.inputs.child import first_limited, run_limited
from tests.inputs import tasks

GIB = 2**30


def values(function: Callable[..., Iterator[Any]], *arguments: Any, silence_s: float = 60) -> list[Any]:
    return list(run_limited(function, *arguments, what="it", memory=GIB, silence_s=silence_s))


def test_values_come_back_in_order() -> None:
    assert values(tasks.numbers, 1000) == list(range(1000))
    assert first_limited(tasks.numbers, 5, what="it", memory=GIB, silence_s=60) == 0
    assert first_limited(tasks.numbers, 0, what="it", memory=GIB, silence_s=60) is None


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_each_end_of_a_child_is_an_error_of_the_user(tmp_path: Path) -> None:
    for function, arguments, message in (
        (tasks.raises, ("no\nfile",), "it: no file"),
        (tasks.fills, (), "it: it needs more memory than a file of its size may"),
        (tasks.aborts, (), "it: its reader was stopped by signal 6, within the limit of 1 GiB of memory"),
        (tasks.writes, (str(tmp_path / "a"),), "it: .*File too large"),
    ):
        with pytest.raises(UserError, match=message):
            values(function, *arguments)
    with pytest.raises(UserError, match="took more than 3 s without progress"):
        values(tasks.sleeps, silence_s=3)


def test_no_module_of_the_working_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    (tmp_path / "tokenizers.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert values(tasks.numbers, 2) == [0, 1]


def words(**model: Any) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "<unk>"} | model,
    }  # fmt: skip


def test_a_tokenizer_that_lacks_its_unknown_token_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(words()))
    made = load_tokenizer(tmp_path / "t.json")
    assert made.encode("a b a").tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"the tokenizer cannot encode 'a c': .*give it an unknown token"):
        made.encode("a c")


NASTY: dict[str, dict[str, Any]] = {
    "an id of 4 billion": words(vocab={"a": 4_000_000_000}),
    "a normaliser that multiplies": words() | {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 400_000}},
    "a normaliser that multiplies twice": words() | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 3000}] * 4}},
    "an empty pattern": words() | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    "a merge of unknown tokens": words() | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "a wrong type": words() | {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.timeout(120)
def test_a_tokenizer_that_harms_is_refused(tmp_path: Path, name: str) -> None:
    """Each is loaded by a process of its own too, whose memory is limited: the test fails by its death."""
    (tmp_path / "t.json").write_text(json.dumps(NASTY[name]))
    with pytest.raises(UserError, match=r"t.json: .*the tokenizers library cannot read it"):
        load_tokenizer(tmp_path / "t.json")


def parquet_bomb(path: Path, *, text: str, rows: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize(("text", "rows"), [("x" * 10_000, 100_000), ("", 100_000), ("x" * 20_000_000, 9)])
@pytest.mark.timeout(300)
def test_a_small_parquet_file_with_gigabytes_of_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rows: int
) -> None:
    from sedd_graph_registry.data import corpora

    monkeypatch.setattr(corpora, "PARQUET_FLOOR", 2**23)
    parquet_bomb(tmp_path / "a.parquet", text=text, rows=rows)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    section = DataConfig.model_validate({"corpus": {"op": "parquet", "files": ["a.parquet"]}})
    with pytest.raises(UserError, match=r"a.parquet: (holds more than .* characters after row|it needs more memory)"):
        read_corpus(section.corpus, root=tmp_path)


@pytest.mark.timeout(300)
def test_bpe_of_text_without_blanks_takes_no_square_of_its_length() -> None:
    """A megabyte of DNA took more than 60 s: it was one word."""
    code = (
        "import random; from sedd_graph.data.config import DataConfig; from pathlib import Path;"
        "text = ''.join(random.Random(0).choices('ACGT', k=1_000_000));"
        "made = DataConfig.model_validate({'tokenizer': {'op': 'bpe', 'size': 400}}).tokenizer.make([text], root=Path());"
        "ids = made.encode(text[:1000]); assert made.decode(ids) == text[:1000]; assert len(ids) < 400;"
        "assert 'Split' not in made.to_json()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
