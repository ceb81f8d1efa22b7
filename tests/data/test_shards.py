"""Rows of shards are those of the same text in memory; broken, foreign and altered shards are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_graph.data import shards as module
from sedd_graph.data.bijection import Bijection
from sedd_graph.data.rows import Dataset, Rows, open_data
from sedd_graph.data.shard_index import read_index
from sedd_graph.data.shards import Shards
from sedd_graph.errors import UserError
from sedd_graph.runs.tokenize import verify_shards

from .shard_sets import change_index, opened, section, shard, texts, write_jsonl


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Rows))


def pair(root: Path, rows: str, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """The same training and held-out documents in memory and in shards."""
    for name, seed in (("train", 1), ("valid", 2)):
        write_jsonl(root / f"{name}.jsonl", texts(60 if name == "train" else 20, seed))
        shard(root, f"{name}.jsonl", to=name, tokenizer=tokenizer)
    corpora = [{"op": "jsonl", "files": [f"{name}.jsonl"]} for name in ("train", "valid")]
    keys = {"rows": rows, "tokenizer": {"op": "file", "path": "train/tokenizer.json"}}
    memory = open_data(section(corpus=corpora[0], heldout=corpora[1], **keys), root=root)
    return memory, opened(root, "train", heldout={"op": "tokens", "files": ["valid"]}, **keys)


@pytest.mark.parametrize("rows", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_rows_and_numbers_are_those_of_the_text_in_memory(tmp_path: Path, rows: str, kind: str) -> None:
    tokenizer: Any = "bytes"
    if kind == "bpe":
        write_jsonl(tmp_path / "fit.jsonl", texts(30))
        shard(tmp_path, "fit.jsonl", to="fit", tokenizer={"op": "bpe", "size": 300})
        tokenizer = {"op": "file", "path": "fit/tokenizer.json"}
    memory, sharded = pair(tmp_path, rows, tokenizer)
    assert len(read_index(tmp_path / "train" / "index.json").shards) > 3
    for one, other in ((memory.train, sharded.train), (memory.heldout, sharded.heldout)):
        assert (one.count, one.phases) == (other.count, other.phases)
        everything = np.arange(one.count)
        for phase in range(one.phases):
            assert same(one.take(everything, phase), other.take(everything, phase))
    assert sharded.characters_per_token == memory.characters_per_token
    assert sharded.baselines() == memory.baselines()
    assert all(same(a, b) for a, b in zip(memory.held_out(7), sharded.held_out(7), strict=True))


def test_an_epoch_has_each_row_once_and_a_batch_is_a_function_of_seed_and_place(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(80))
    shard(tmp_path, "a.jsonl")
    data, again, other = (opened(tmp_path, seed=seed) for seed in (0, 0, 1))
    count = data.train.count
    plain = {p: Counter(map(bytes, data.train.take(np.arange(count), p).tokens)) for p in range(data.train.phases)}
    for epoch in range(3):
        found = Counter(map(bytes, data.batch(epoch * count, count).tokens))
        assert found in plain.values()
    for k in (5, 0, 17, 3):
        assert same(again.batch(k * 10, 10), data.batch(k * 10, 10))
        assert not same(other.batch(k * 10, 10), data.batch(k * 10, 10))
        parts = [opened(tmp_path).batch(k * 10, 10, start=a, stop=b) for a, b in ((0, 3), (3, 10))]
        assert np.array_equal(np.concatenate([p.tokens for p in parts]), data.batch(k * 10, 10).tokens)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 100, 4095, 4096, 4097])
def test_the_order_is_a_permutation(count: int) -> None:
    found = Bijection(count, np.random.default_rng(count))(np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))


def test_the_order_is_spread_as_chance_would() -> None:
    """Where the first place goes, and how far neighbours lie apart, over many keys."""
    found = np.array([Bijection(10, np.random.default_rng(k))(np.arange(10)) for k in range(3000)])
    for place in (0, 9):
        counts = np.bincount(found[:, place], minlength=10)
        assert ((counts - 300) ** 2 / 300).sum() < 33.7  # chi-squared of 9 degrees, one in 10,000
    pairs = np.bincount(found[:, 3] * 10 + found[:, 4], minlength=100).reshape(10, 10)
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(10, dtype=bool)]
    assert ((off - 3000 / 90) ** 2 / (3000 / 90)).sum() < 145  # 89 degrees
    large = Bijection(10**12, np.random.default_rng(0))(np.arange(100_000))
    assert len(set(large.tolist())) == 100_000
    assert np.bincount(large // 10**11, minlength=10).min() > 9_600


def test_the_cut_is_at_the_end_of_a_shard_or_else_of_a_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(200))
    index = shard(tmp_path, "a.jsonl", shard_tokens=400)
    ends = np.cumsum([s.tokens for s in index.shards])
    data = opened(tmp_path, holdout=0.2)
    part = data.heldout.part
    assert part.start in ends
    assert part.places is not None
    assert 0.1 <= 1 - part.start / ends[-1] <= 0.4
    assert data.baselines()
    one = shard(tmp_path, "a.jsonl", to="one", shard_tokens=10**9)
    assert len(one.shards) == 1
    data = opened(tmp_path, "one", holdout=0.2)
    found = np.concatenate([data.train.part.shards.rows(np.array([data.heldout.part.start - 1]), np.array([1]), 1)])
    assert found.ravel().tolist() == [ord("\n")]
    assert abs(1 - data.heldout.part.start / ends[-1] - 0.2) < 0.02
    assert data.baselines() == {}
    text = "".join(t + "\n" for t in texts(200)).encode()
    held = text[data.heldout.part.start :]
    assert data.characters_per_token == len(held.decode()) / len(held)
    assert "unigram" not in data.describe()


def test_a_single_document_cannot_be_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 99)
    shard(tmp_path, "a.txt", shard_tokens=10**9)
    with pytest.raises(UserError, match=r"^data.holdout: no document of .* ends where 0.1 .*: name held-out text in"):
        opened(tmp_path)


def test_a_long_document_lies_in_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sedd_graph_registry.data import corpora

    from sedd_graph.data import characters

    monkeypatch.setattr(corpora, "BLOCK", 10)
    monkeypatch.setattr(characters.split_stream, "__defaults__", (20,))
    for name, content in (("a.txt", " ".join(texts(50))), ("b.txt", "short"), ("c.txt", " ".join(texts(40, 3)))):
        (tmp_path / name).write_text(content)
    index = shard(tmp_path, "a.txt", "b.txt", "c.txt", shard_tokens=200)
    assert sum(s.documents for s in index.shards) == 3
    assert len(index.shards) > 10
    data = opened(tmp_path, rows="documents", length=4000, holdout=0.4)
    rows = [data.tokenizer.decode(r) for r in data.train.take(np.arange(data.train.count), 0).tokens]
    rows += [data.tokenizer.decode(r) for r in data.heldout.take(np.arange(data.heldout.count), 0).tokens]
    assert rows == [(tmp_path / name).read_text() for name in ("a.txt", "b.txt", "c.txt")]
    assert [d.text for d in section(corpus={"op": "tokens", "files": ["shards"]}).corpus.documents(tmp_path)] == rows


def test_a_process_opens_only_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    index = shard(tmp_path, "a.jsonl", shard_tokens=200)
    seen: list[str] = []
    plain = module.map_npy

    def mapped(path: Path, **keys: Any) -> Any:
        seen.append(path.name)
        return plain(path, **keys)

    monkeypatch.setattr(module, "map_npy", mapped)
    data = opened(tmp_path)
    assert not [name for name in seen if "tokens" in name]
    data.train.take(np.array([0]), 0)
    assert [name for name in seen if "tokens" in name] == ["00000.tokens.npy"]
    monkeypatch.setattr(module, "MAX_OPEN", 3)
    everything = np.arange(data.train.count)
    assert same(data.train.take(everything, 0), opened(tmp_path).train.take(everything, 0))
    assert len(data.train.part.shards._open) <= 3
    assert len([name for name in seen if "tokens" in name]) > len(index.shards) // 2


def test_several_folders_are_one_text_and_must_have_one_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    write_jsonl(tmp_path / "b.jsonl", texts(40, 5))
    for name in "ab":
        shard(tmp_path, f"{name}.jsonl", to=f"part-{name}")
    both = opened(tmp_path, "part-*/index.json", length=8)
    assert both.train.part.shards.tokens == sum(
        Shards([(tmp_path / f"part-{n}", read_index(tmp_path / f"part-{n}" / "index.json"))]).tokens for n in "ab"
    )
    shard(tmp_path, "b.jsonl", to="other", tokenizer={"op": "characters", "size": 100})
    with pytest.raises(UserError, match="have different tokenizers, separators or units"):
        opened(tmp_path, "part-a", "other")


def test_the_tokenizer_must_be_the_one_that_made_the_tokens(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(90))
    fitted = {"op": "characters", "size": 60}
    shard(tmp_path, "a.jsonl", tokenizer=fitted)
    data = opened(tmp_path, tokenizer=fitted)  # the section that made them stands for their tokenizer
    assert data.tokenizer.to_json() == (tmp_path / "shards" / "tokenizer.json").read_text()
    opened(tmp_path, tokenizer={"op": "file", "path": "shards/tokenizer.json"})
    with pytest.raises(UserError, match=r"'characters.v1' is fitted to text, and .*/shards was not made with it: set"):
        opened(tmp_path, tokenizer={"op": "characters", "size": 61})
    with pytest.raises(UserError, match=r"made with another tokenizer, of 60 tokens, than the 257 .* path: shards/tok"):
        opened(tmp_path, tokenizer="bytes")
    with pytest.raises(UserError, match="made with another tokenizer"):
        open_data(
            section(corpus={"op": "tokens", "files": ["shards"]}), root=tmp_path, tokenizer=opened_bytes(tmp_path)
        )


def opened_bytes(root: Path) -> Any:
    return section().tokenizer.make((), root=root)


def test_what_shards_cannot_do_is_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(90))
    shard(tmp_path, "a.jsonl")
    with pytest.raises(UserError, match=r"'lines' is for text: tokenise with --lines"):
        opened(tmp_path, rows="lines")
    with pytest.raises(UserError, match="either both text, or both tokens"):
        opened(tmp_path, heldout={"op": "jsonl", "files": ["a.jsonl"]})
    with pytest.raises(UserError, match=r"^the training text has \d+ tokens, fewer than one row of data.length = 9000"):
        opened(tmp_path, length=9000)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 2**17)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def store(dtype: str, **changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        array = np.array(np.load(path), dtype)
        for place, value in changes.items():
            array.reshape(-1)[int(place[1:])] = value
        np.save(path, array)

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("00000.tokens.npy", cut, "bytes, not the"),
        ("00000.tokens.npy", lengthen, "has another size than"),
        ("00000.tokens.npy", os.unlink, "cannot be read: No such file"),
        ("00000.tokens.npy", store("<u2", _0=257), "token id 257 between positions 0 and 16; the tokenizer has 257"),
        ("00000.tokens.npy", store(">u2"), "holds >u2 of shape"),
        ("00000.tokens.npy", store("<f2"), "holds <f2 of shape"),
        ("00000.documents.npy", store("<i8", _0=10**9), "the boundaries of documents are broken"),
        ("00000.documents.npy", store("<i8", _2=-5), "the boundaries of documents are broken"),
        ("00000.documents.npy", cut, "bytes, not the"),
        ("00000.characters.npy", store("<i8", _0=-1), "holds no counts of characters"),
        ("00000.characters.npy", store("<i8", _0=2**40), "holds no counts of characters"),
        ("tokenizer.json", lambda path: path.write_text('{"kind": "bytes" }'), "is not the tokenizer that made the"),
        ("index.json", lambda path: path.write_text("{}"), "not an index of shards: dtype"),
        ("index.json", lambda path: change_index(path.parent, dtype="object"), "not an index of shards: dtype"),
        ("index.json", lambda path: change_index(path.parent, name="../../x"), "not an index of shards: shards.0.name"),
        ("index.json", lambda path: change_index(path.parent, name="00001"), "a shard is named twice"),
        ("index.json", lambda path: change_index(path.parent, separator=[300]), "a separator is no token"),
        ("index.json", lambda path: change_index(path.parent, tokens=10**12), "has another size than"),
        ("index.json", lambda path: change_index(path.parent, tokens=-1), "shards.0.tokens"),
        ("index.json", lambda path: change_index(path.parent, shards=[]), "not an index of shards: shards"),
        ("index.json", os.unlink, "'shards' has no index.json: it holds no shards, or `sedd-graph tokenize` has not"),
    ],
)  # fmt: skip
def test_broken_shards_are_refused(tmp_path: Path, file: str, change: Callable[[Path], Any], message: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    shard(tmp_path, "a.jsonl")
    change(tmp_path / "shards" / file)
    with pytest.raises(UserError) as caught:
        read_all(tmp_path)
    assert message in str(caught.value)


def read_all(root: Path) -> None:
    for rows in ("stream", "documents"):
        data = opened(root, rows=rows)
        for part in (data.train, data.heldout):
            part.take(np.arange(part.count), 0)


def test_links_out_of_the_project_are_refused(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    shard(tmp_path, "a.jsonl")
    os.symlink(tmp_path / "shards", project / "shards")
    with pytest.raises(UserError, match="lies outside the project's folder"):
        opened(project)
    os.unlink(project / "shards")
    shard(tmp_path, "a.jsonl", to="project/shards")
    (project / "shards" / "00000.tokens.npy").unlink()
    os.symlink(tmp_path / "shards" / "00000.tokens.npy", project / "shards" / "00000.tokens.npy")
    with pytest.raises(UserError, match="lies outside the project's folder"):
        opened(project)
    shutil.copy(tmp_path / "shards" / "00000.tokens.npy", tmp_path / "copy")
    os.replace(tmp_path / "copy", project / "shards" / "00000.tokens.npy")
    assert opened(project).train.count > 0
    os.unlink(project / "shards" / "tokenizer.json")
    os.symlink(tmp_path / "shards" / "tokenizer.json", project / "shards" / "tokenizer.json")
    with pytest.raises(UserError, match="lies outside the project's folder"):
        opened(project)


def test_altered_shards_are_found_by_verify(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    shard(tmp_path, "a.jsonl")
    said: list[str] = []
    verify_shards(tmp_path / "shards", say=said.append)
    assert "are what was written" in said[0]
    path = tmp_path / "shards" / "00002.tokens.npy"
    store("<u2", _7=1)(path)
    with pytest.raises(UserError, match=r"00002.tokens.npy is not what was written: its SHA-256 differs"):
        verify_shards(tmp_path / "shards", say=said.append)


def test_the_fingerprint_is_that_of_the_index(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    shard(tmp_path, "a.jsonl")
    found = opened(tmp_path).fingerprint()
    assert found == opened(tmp_path).fingerprint()
    assert found != opened(tmp_path, holdout=0.3).fingerprint()
    sha = json.loads((tmp_path / "shards" / "index.json").read_text())["shards"][0]["sha256"]
    change_index(tmp_path / "shards", sha256=sha | {"tokens": "0" * 64})
    assert found != opened(tmp_path).fingerprint()
