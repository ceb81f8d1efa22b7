"""Order, coverage, holdout, roles and statistics of rows, each held to a plain recount."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd_graph.data.characters import BLOCK, count_characters, cross_entropy_bits, entropy_bits, pieces
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset, Rows, open_data
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import UserError

LETTERS = "".join(chr(0x4E00 + i) for i in range(1000))  # no character twice: a token names its place


def opened(root: Path, text: str = LETTERS, **section: Any) -> Dataset:
    (root / "a.txt").write_text(text, encoding="utf-8")
    corpus, tokenizer = {"op": "text", "files": ["a.txt"]}, {"op": "characters", "size": 2000}
    config = {"corpus": corpus, "tokenizer": tokenizer, "length": 7} | section
    return open_data(DataConfig.model_validate(config), root=root)


def records(root: Path, *rows: dict[str, str], **section: Any) -> Dataset:
    (root / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    corpus = {"op": "jsonl", "files": ["a.jsonl"]} | section.pop("corpus", {})
    config = {"corpus": corpus, "tokenizer": {"op": "bytes"}, "length": 8} | section
    return open_data(DataConfig.model_validate(config), root=root)


def refused(root: Path, *rows: dict[str, str], **section: Any) -> str:
    with pytest.raises(UserError) as caught:
        records(root, *rows, **section) if rows else opened(root, **section)
    return str(caught.value)


def epoch(data: Dataset, number: int) -> Rows:
    return data.batch(number * data.train.count, data.train.count)


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Rows))


def stacked(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rows)))


def test_a_row_is_text_and_every_position_counts(tmp_path: Path) -> None:
    rows = opened(tmp_path).batch(3, 5)
    assert rows.tokens.shape == (5, 7)
    assert rows.tokens.dtype == np.int64
    for role in (rows.attend, rows.corrupt, rows.loss):
        assert role.dtype == np.bool_
        assert role.all()


def test_an_epoch_shows_every_token_once_but_for_the_ends(tmp_path: Path) -> None:
    data = opened(tmp_path)
    held = set(LETTERS[900:])
    for number in range(12):
        rows = [data.tokenizer.decode(r) for r in epoch(data, number).tokens]
        text = "".join(sorted(rows))  # places are in order of code points
        start = LETTERS.index(text[0])
        assert text == LETTERS[start : start + len(text)]
        assert 0 <= start < 7
        assert 900 - len(text) <= 2 * 7 - 2
        assert not held & set(text)
        assert rows != sorted(rows)


def test_every_phase_comes_up_and_epochs_differ(tmp_path: Path) -> None:
    data = opened(tmp_path)
    starts = {int(epoch(data, number).tokens.min()) for number in range(80)}
    assert starts == set(range(1, 8))
    assert not same(epoch(data, 0), epoch(data, 1))


@settings(deadline=None)
@given(st.integers(14, 60), st.integers(2, 9))
def test_coverage_holds_at_every_size(tmp_path_factory: pytest.TempPathFactory, total: int, length: int) -> None:
    root = tmp_path_factory.getbasetemp()
    data = opened(root, LETTERS[: total * 2], length=length, holdout=0.5)
    for number in range(3):
        tokens = np.sort(epoch(data, number).tokens.ravel())
        assert np.array_equal(tokens, np.arange(tokens[0], tokens[0] + len(tokens)))
        assert total - len(tokens) <= 2 * length - 2
    held = np.concatenate([r.tokens for r in data.held_out(2)]).ravel()
    assert len(held) == total // length * length


def test_a_batch_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    data, again, other = opened(tmp_path), opened(tmp_path), opened(tmp_path, seed=1)
    straight = [data.batch(k * 10, 10) for k in range(60)]
    for k in (59, 3, 31, 0, 12, 13):  # any order, as after a resume
        assert same(again.batch(k * 10, 10), straight[k])
        assert same(data.batch(k * 10, 10), straight[k])
        assert not same(other.batch(k * 10, 10), straight[k])


def test_a_batch_may_straddle_epochs(tmp_path: Path) -> None:
    data = opened(tmp_path)
    count = data.train.count
    assert same(data.batch(count - 4, 9), stacked([data.batch(count - 4, 4), data.batch(count, 5)]))
    long = data.batch(2, 3 * count)
    assert same(long, stacked([data.batch(2 + k, 1) for k in range(3 * count)]))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_and_accumulation_see_one_global_batch(tmp_path: Path, world: int, accumulate: int) -> None:
    data = opened(tmp_path)
    share = 12 // (world * accumulate)
    for position in (0, 120, 132):  # 127 rows in an epoch: the second straddles
        spans = [(n * share, (n + 1) * share) for n in range(world * accumulate)]
        parts = [opened(tmp_path).batch(position, 12, start=a, stop=b) for a, b in spans]
        assert same(stacked(parts), data.batch(position, 12))


def test_an_empty_share_is_empty(tmp_path: Path) -> None:
    assert opened(tmp_path).batch(5, 12, start=3, stop=3).tokens.shape == (0, 7)


def test_roles_are_not_one_array(tmp_path: Path) -> None:
    rows = opened(tmp_path).batch(0, 4)
    rows.loss[:] = False
    assert rows.attend.all()
    assert rows.corrupt.all()


def test_held_out_is_the_last_part_in_order_to_the_last_whole_row(tmp_path: Path) -> None:
    data = opened(tmp_path, tokenizer={"op": "bytes"}, length=9)
    assert data.heldout.count == 300 // 9
    batches = list(data.held_out(10))
    assert [len(b.tokens) for b in batches] == [10, 10, 10, 3]
    assert data.tokenizer.decode(stacked(batches).tokens.ravel()) == LETTERS[900:999]
    exact = opened(tmp_path, tokenizer={"op": "bytes"}, length=10)
    assert exact.heldout.count == 30  # a text of whole rows loses none


def test_some_held_out_batches_are_spread_evenly(tmp_path: Path) -> None:
    data = opened(tmp_path, tokenizer={"op": "bytes"}, length=3)
    every = list(data.held_out(10))
    assert len(every) == 10
    some = list(data.held_out(10, batches=4))
    assert all(same(s, every[i]) for s, i in zip(some, (0, 3, 6, 9), strict=True))
    assert len(list(data.held_out(10, batches=99))) == 10


def test_a_text_too_short(tmp_path: Path) -> None:
    said = refused(tmp_path, text="x" * 100, length=16)
    assert said == "the held-out text has 10 tokens, fewer than one row of data.length = 16"
    said = refused(tmp_path, text="x" * 100, length=64, holdout=0.8)
    assert said == "the training text has 20 tokens, fewer than one row of data.length = 64"
    assert opened(tmp_path, "x" * 100, length=10).train.count == 8


def test_a_stream_of_records_separates_them_and_holds_out_whole_ones(tmp_path: Path) -> None:
    rows = [{"text": f"record {i:02d}"} for i in range(40)]
    data = records(tmp_path, *rows, length=3)
    text = data.tokenizer.decode(data.train.tokens) + "|" + data.tokenizer.decode(data.heldout.tokens)
    assert text == "".join(f"record {i:02d}\n" for i in range(36)) + "|" + "".join(
        f"record {i:02d}\n" for i in range(36, 40)
    )
    data = records(tmp_path, *rows, length=3, tokenizer={"op": "bpe", "size": 258})
    text = data.tokenizer.decode(data.train.tokens)
    assert text == "<|endoftext|>".join(f"record {i:02d}" for i in range(36))
    assert data.characters_per_token == 36 / len(data.heldout.tokens)


def test_one_long_record_does_not_swallow_the_training_text(tmp_path: Path) -> None:
    data = records(tmp_path, {"text": "a" * 20}, {"text": "b" * 979}, length=3)
    assert len(data.train.tokens) == 901
    assert len(data.heldout.tokens) == 100
    only = records(tmp_path, {"text": "b" * 99}, length=3)
    assert (len(only.train.tokens), len(only.heldout.tokens)) == (90, 10)


def test_files_follow_each_other_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 70)
    data = opened(tmp_path, "a" * 30, corpus={"op": "text", "files": ["a.txt", "b.txt"]}, tokenizer={"op": "bytes"})
    assert data.tokenizer.decode(data.train.tokens) == "a" * 30 + "b" * 60
    assert data.tokenizer.decode(data.heldout.tokens) == "b" * 10


def test_documents_are_padded_cut_and_prompted(tmp_path: Path) -> None:
    rows = [
        {"p": "", "text": "abc"},
        {"p": "Q:", "text": "yes"},
        {"p": "Q:", "text": "0123456789"},
        {"p": "a long prompt", "text": "xyz"},
        {"p": "dropped", "text": ""},
        {"p": "", "text": "held"},
    ]
    data = records(tmp_path, *rows, corpus={"prompt": "p"}, rows="documents")
    got = data.train.take(np.arange(4), 0)
    pad = data.tokenizer.pad
    assert [data.tokenizer.decode(r) for r in got.tokens] == ["abc", "Q:yes", "Q:012345", "a long x"]
    assert np.array_equal(got.tokens == pad, ~got.attend)
    counted = [data.tokenizer.decode(r[m]) for r, m in zip(got.tokens, got.loss, strict=True)]
    assert counted == ["abc", "yes", "012345", "x"]
    assert np.array_equal(got.corrupt, got.loss)
    assert got.attend.any(axis=1).all()
    (held,) = data.held_out(4)
    assert [data.tokenizer.decode(r) for r in held.tokens] == ["held"]


def test_documents_come_once_an_epoch_and_resume(tmp_path: Path) -> None:
    rows = [{"text": f"{i:03d}" * (1 + i % 3)} for i in range(50)]
    data, again = (records(tmp_path, *rows, rows="documents", holdout=0.2) for _ in range(2))
    for number in (0, 1):
        seen = [data.tokenizer.decode(r) for r in epoch(data, number).tokens]
        assert sorted(seen) == sorted(r["text"][:8] for r in rows[:40])
    held = [data.tokenizer.decode(r) for b in data.held_out(4) for r in b.tokens]
    assert held == [r["text"][:8] for r in rows[40:]]
    assert same(again.batch(75, 12), data.batch(75, 12))
    assert data.characters_per_token == 1.0


def test_what_documents_refuse(tmp_path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    two = [{"p": "q", "text": "a"}, {"p": "q", "text": "b"}]
    assert "at least two documents" in refused(tmp_path, two[0], rows="documents")
    assert "needs data.rows 'documents'" in refused(tmp_path, *two, corpus={"prompt": "p"})
    said = refused(tmp_path, *two, rows="documents", tokenizer={"op": "file", "path": "t.json"})
    assert "needs a tokenizer with a padding token" in said


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    first = opened(tmp_path)
    (tmp_path / "tokenizer.json").write_text(first.tokenizer.to_json())
    config = first.config.model_copy(update={"seed": 0})
    again = open_data(config, root=tmp_path, tokenizer=load_tokenizer(tmp_path))
    assert same(again.batch(0, 50), first.batch(0, 50))


def test_characters_per_token_counts_characters(tmp_path: Path) -> None:
    data = opened(tmp_path, tokenizer={"op": "bytes"})
    assert data.characters_per_token == pytest.approx(1 / 3)
    mixed = opened(tmp_path, "aé😀 " * 300, tokenizer={"op": "bytes"})
    assert mixed.characters_per_token == 4 / 8
    text = "the cat sat on the mat. " * 100
    pair = opened(tmp_path, text, tokenizer={"op": "bpe", "size": 270}, holdout=0.25)
    assert pair.characters_per_token == 600 / len(pair.tokenizer.encode(text[1800:]))


def _bits(text: str, law: dict[str, float]) -> float:
    return -sum(math.log2(law[c]) for c in text) / len(text)


def test_unigram_statistics_agree_with_a_plain_count(tmp_path: Path) -> None:
    text = "abracadabra é😀" * 20 + "zebra!" * 5
    cut = round(len(text) * 0.9)
    data = opened(tmp_path, text)
    seen, new = Counter(text[:cut]), Counter(text[cut:])
    alphabet = set(text)
    smooth = {c: (seen[c] + 1) / (cut + len(alphabet)) for c in alphabet}
    assert data.unigram_bits == pytest.approx(_bits(text[cut:], smooth))
    own = {c: n / new.total() for c, n in new.items()}
    assert data.heldout_entropy_bits == pytest.approx(_bits(text[cut:], own))
    assert data.heldout_entropy_bits <= data.unigram_bits


def test_entropy_of_known_laws() -> None:
    assert entropy_bits(count_characters(["abcd" * 9])) == 2.0
    assert entropy_bits(count_characters(["aaaa"])) == 0.0
    assert entropy_bits(count_characters([])) == 0.0
    counts = count_characters(["ab"])
    assert cross_entropy_bits(counts, under=count_characters([])) == 1.0


def test_letters_are_counted_in_blocks() -> None:
    texts = ["ab", "", "é" * (BLOCK + 3), "😀"] * 2
    counts = count_characters(texts)
    assert {chr(i): int(counts[i]) for i in np.flatnonzero(counts)} == Counter("".join(texts))


@settings(deadline=None)
@given(st.text("ab \n", max_size=60), st.integers(1, 9))
def test_pieces_are_the_text_and_end_at_words(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(0 < len(p) <= size for p in parts)
    for left, right in itertools.pairwise(parts):
        assert right.startswith(" ") or " " not in left[1:]
