"""The text of a run is tokenised once; tokens that are stale, altered or foreign are never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sedd_graph_registry.data.tokenizers import Characters

from sedd_graph.cli.main import run
from sedd_graph.data.batches import Stream
from sedd_graph.data.rows import Dataset
from sedd_graph.runs.open import Run, open_run
from tests.conftest import SMALL

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
DATA = "data: {tokenizer: {op: characters, size: 128}"
FILES = "data: {corpus: {op: text, files: [letters.txt]}, tokenizer: {op: characters, size: 128}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cached")
    (root / "letters.txt").write_text(TEXT)
    (root / "small.yaml").write_text(SMALL.replace(DATA, FILES))
    arguments = ["--runs", str(root / "runs"), "--path-to", str(root / "at"), "--proof", "quick"]
    assert run(["build", str(root / "small.yaml"), *arguments, "--device", "cpu"]) == 0
    return Path((root / "at").read_text())


@pytest.fixture
def built(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def corpus(whole: Path) -> Iterator[Path]:
    path = whole.parents[2] / "letters.txt"
    yield path
    path.write_text(TEXT)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised."""
    found: list[str] = []
    plain = Characters.encode

    def encode(self: Characters, text: str) -> np.ndarray:
        found.append(text)
        return plain(self, text)

    monkeypatch.setattr(Characters, "encode", encode)
    return found


def opened(path: Path) -> Run:
    return open_run(path, device=torch.device("cpu"), compile="off", weights="fresh")


def read(path: Path) -> Dataset:
    data = opened(path).data()
    assert isinstance(data, Dataset)
    return data


def same(one: Dataset, other: Dataset) -> bool:
    numbers = ("characters_per_token", "unigram_bits", "heldout_entropy_bits")
    return one.fingerprint() == other.fingerprint() and all(getattr(one, n) == getattr(other, n) for n in numbers)


def test_no_command_tokenises_what_build_has(built: Path, encoded: list[str]) -> None:
    assert run(["train", str(built), "--device", "cpu"]) == 0
    assert run(["eval", str(built), "--device", "cpu", "--batches", "1"]) == 0
    assert run(["sample", str(built), "--device", "cpu", "--batch", "2"]) == 0
    assert run(["eval", str(built), "--device", "cpu", "--samples"]) == 0
    assert not [text for text in encoded if len(text) > 60]
    assert sorted(path.name for path in (built / "tokens").iterdir()) == [
        "heldout.tokens.npy",
        "index.json",
        "train.tokens.npy",
    ]


def test_cached_rows_are_those_of_the_text(built: Path, tmp_path: Path) -> None:
    cached = read(built)
    assert isinstance(cached.train, Stream)
    assert isinstance(cached.train.tokens.base, np.memmap)
    (built / "tokens" / "index.json").unlink()
    assert same(read(built), cached)
    assert (built / "tokens" / "index.json").is_file()  # written again


def alter(path: Path, place: int, value: int) -> None:
    array = np.load(path)
    array[place] = value
    np.save(path, array)


def alter_all(tokens: Path) -> None:
    """Alter tokens and their hashes alike, as someone who hands on a run folder might."""
    import hashlib

    alter(tokens / "train.tokens.npy", 5, 3)
    index = json.loads((tokens / "index.json").read_text())
    index["arrays"]["train.tokens"]["sha256"] = hashlib.sha256(
        np.load(tokens / "train.tokens.npy").tobytes()
    ).hexdigest()
    (tokens / "index.json").write_text(json.dumps(index))


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tokens: alter(tokens / "train.tokens.npy", 5, 3),
        lambda tokens: alter(tokens / "heldout.tokens.npy", 0, 1000),
        lambda tokens: (tokens / "train.tokens.npy").unlink(),
        lambda tokens: (tokens / "train.tokens.npy").write_bytes(b"no array"),
        lambda tokens: (tokens / "index.json").write_text("{"),
        lambda tokens: change(tokens / "index.json", key="0" * 64),
        lambda tokens: change(tokens / "index.json", numbers={}),
        lambda tokens: change(tokens / "index.json", arrays={"../../x": {}}),
        alter_all,
    ],
)
def test_tokens_that_are_not_what_was_written_are_not_used(built: Path, damage: Callable[[Path], None]) -> None:
    whole = read(built)
    expected = (whole.fingerprint(), whole.characters_per_token, whole.unigram_bits, whole.heldout_entropy_bits)
    damage(built / "tokens")
    found = read(built)
    assert expected == (found.fingerprint(), found.characters_per_token, found.unigram_bits, found.heldout_entropy_bits)


def test_tokens_of_an_old_text_are_not_used(built: Path, corpus: Path, encoded: list[str]) -> None:
    old = read(built).fingerprint()
    assert not encoded
    corpus.write_text(TEXT.replace("fox", "cat"))
    again = opened(built)
    data = again.data()
    assert data.fingerprint() != old
    assert again.changed(data) == f"the corpus has changed since {built} was built"
    corpus.write_text(TEXT)
    assert opened(built).data().fingerprint() == old


def test_a_folder_that_cannot_be_written_is_read(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(built / "tokens")

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sedd_graph.runs.token_cache.part_folder", fail)
    assert read(built).train.count > 0
    assert not (built / "tokens").exists()


def test_a_link_to_other_tokens_is_not_followed(built: Path, tmp_path: Path) -> None:
    (built / "tokens").rename(tmp_path / "elsewhere")
    (built / "tokens").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / "index.json").read_bytes()
    assert read(built).train.count > 0
    assert (tmp_path / "elsewhere" / "index.json").read_bytes() == before


def test_documents_are_kept_with_their_boundaries(
    small: Callable[..., Path], tmp_path: Path, encoded: list[str]
) -> None:
    rows = [{"q": "why", "text": word * 3} for word in TEXT.split()[:40]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = "data: {corpus: {op: jsonl, files: [a.jsonl], prompt: q}, rows: documents, tokenizer: {op: characters, size: 128}"
    arguments = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "at"), "--proof", "quick"]
    assert run(["build", str(small((DATA, corpus))), *arguments, "--device", "cpu"]) == 0
    path = Path((tmp_path / "at").read_text())
    encoded.clear()
    cached = read(path)
    assert not encoded
    (path / "tokens" / "index.json").unlink()
    assert same(read(path), cached)
    assert encoded
