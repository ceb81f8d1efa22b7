"""Corpora as text and as shards of the same text, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.shard_index import Index
from sedd_graph.runs.tokenize import TokenizeRequest, tokenize_corpus

WORDS = ("the", "cat", "sat", "on", "a", "mat", "né", "猫", "12:34", "it's")


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 30 words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(1, 31))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def section(**keys: Any) -> DataConfig:
    return DataConfig.model_validate({"tokenizer": "bytes", "length": 16} | keys)


def request(root: Path, *files: str, **keys: Any) -> TokenizeRequest:
    corpus = {"op": "jsonl" if files[0].endswith("l") else "text", "files": list(files)}
    config = section(corpus=corpus, tokenizer=keys.pop("tokenizer", "bytes"))
    return TokenizeRequest(corpus=config.corpus, root=root, config=config, **({"shard_tokens": 300} | keys))


def shard(root: Path, *files: str, to: str = "shards", **keys: Any) -> Index:
    return tokenize_corpus(request(root, *files, **keys), root / to, say=lambda text: None)


def opened(root: Path, *folders: str, **keys: Any) -> Dataset:
    return open_data(section(corpus={"op": "tokens", "files": list(folders or ["shards"])}, **keys), root=root)


def change_index(folder: Path, **changes: Any) -> None:
    """Replace keys of the index, or of its first shard if they are keys of a shard."""
    path = folder / "index.json"
    found = json.loads(path.read_text())
    for key, value in changes.items():
        (found if key in found else found["shards"][0])[key] = value
    path.write_text(json.dumps(found))
