"""Rows are a function of the seed and one integer, whatever the split; padding and prompts have their roles."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedd_graph_registry.data.tokenizers import BytesFactory, CharactersFactory

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import UserError


@given(st.text(max_size=80))
def test_bytes_and_characters_round_trip(text: str) -> None:
    for factory in (BytesFactory(BytesFactory.Config()), CharactersFactory(CharactersFactory.Config(size=200))):
        tokenizer = factory.make([text], root=Path())
        ids = tokenizer.encode(text)
        if not any("\ud800" <= c <= "\udfff" for c in text):
            assert tokenizer.decode(ids) == text
        assert not set(ids.tolist()) & set(tokenizer.forbidden)


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = CharactersFactory(CharactersFactory.Config(size=8)).make(["hello world"], root=tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    again = load_tokenizer(tmp_path)
    assert again.encode("hello?").tolist() == tokenizer.encode("hello?").tolist()
    assert again.forbidden == tokenizer.forbidden


def test_any_split_of_a_batch_sees_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(2000)))
    config = DataConfig.model_validate(
        {"corpus": {"op": "text", "files": ["*.txt"]}, "tokenizer": "bytes", "length": 16}
    )
    data = open_data(config, root=tmp_path)
    for position in (0, 40, 100, 107, 1000):
        whole = data.batch(position, 12).tokens
        parts = [data.batch(position, 12, start=s, stop=s + 4).tokens for s in (0, 4, 8)]
        assert np.array_equal(whole, np.concatenate(parts))
    epoch = np.concatenate([data.batch(i, 1).tokens for i in range(data.train.count)])
    assert len({row.tobytes() for row in epoch}) > 0
    assert epoch.shape == (data.train.count, 16)
    held = np.concatenate([r.tokens for r in data.held_out(5)])
    assert held.shape[0] == data.heldout.count


def test_padding_and_prompts_have_their_roles(tmp_path: Path) -> None:
    lines = [{"q": "ask", "a": "answer"}, {"q": "", "a": "x"}, {"q": "q", "a": "z" * 40}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = {"op": "jsonl", "files": ["a.jsonl"], "field": "a", "prompt": "q"}
    config = DataConfig.model_validate(
        {"corpus": corpus, "tokenizer": "bytes", "length": 12, "rows": "documents", "holdout": 0.34}
    )
    data = open_data(config, root=tmp_path)
    rows = data.train.take(np.arange(2), 0)
    assert rows.attend.sum(-1).tolist() == [9, 1]
    assert rows.loss.tolist() == rows.corrupt.tolist()
    assert rows.loss[0].tolist() == [False] * 3 + [True] * 6 + [False] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "a.jsonl:1: not JSON"),
        (b'{"tex": "x"}', "no text field 'text' (did you mean 'tex'?)"),
        (b"\xff", "not UTF-8: byte 0"),
    ],
)
def test_faults_name_file_and_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_data(DataConfig.model_validate({"corpus": {"op": "jsonl", "files": ["a.jsonl"]}}), root=tmp_path)
    assert message in str(error.value)
