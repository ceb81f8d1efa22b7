"""Tokens of a text corpus that were made before, so that the text is not tokenised again. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sedd_graph.data.batches import Documents, Stream
from sedd_graph.data.config import DataConfig
from sedd_graph.data.shards import tokenizer_digest
from sedd_graph.data.sources import Document
from sedd_graph.data.tokenizer import Tokenizer

__all__ = ["NUMBERS", "TokenCache", "Tokenised", "cache_key", "documents_digest", "sources_of", "tokenised"]

FORMAT = 1
"""Version of the way in which text becomes tokens; a cache of another version is not used."""
NUMBERS = ("characters_per_token", "unigram_bits", "heldout_entropy_bits")
"""Names of the numbers of a data set that only its text gives."""


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """Tokens of a text corpus, and what else of its text a data set needs."""

    arrays: Mapping[str, npt.NDArray[Any]]
    """Arrays by name: ``train.tokens`` and ``heldout.tokens``, and for documents ``.starts`` and ``.prompts``."""
    numbers: Mapping[str, float]
    """The numbers :data:`NUMBERS` of the data set."""


class TokenCache(Protocol):
    """Protocol of a place where the tokens of one corpus are kept."""

    def holds(self) -> bool:
        """Return whether there is anything, of whatever key."""

    def load(self, key: str) -> Tokenised | None:
        """Return the tokens kept under ``key``; None if there are none, or if they are not what was written."""

    def save(self, key: str, found: Tokenised) -> None:
        """Keep tokens under ``key``, in place of others."""


def documents_digest(documents: Iterable[Document]) -> str:
    """Return the SHA-256, hexadecimal, of the texts and prompts of documents; those without text are left out."""
    found = hashlib.sha256()
    for document in documents:
        if document.text:
            for text in (document.prompt, document.text):
                raw = text.encode("utf-8", "surrogatepass")
                found.update(len(raw).to_bytes(8, "little"))
                found.update(raw)
    return found.hexdigest()


def cache_key(config: DataConfig, tokenizer: Tokenizer, digests: Iterable[str]) -> str:
    """Return the key of all that the tokens of a data set depend on, 64 hexadecimal digits.

    Args:
        config: The ``data`` section.
        tokenizer: The tokenizer.
        digests: :func:`documents_digest` of the corpus, and of the held-out corpus if there is one.
    """
    length = None if config.rows == "stream" else config.length
    records = [corpus.records for corpus in (config.corpus, config.heldout) if corpus is not None]
    facts = [FORMAT, config.rows, length, config.holdout, records, tokenizer_digest(tokenizer), *digests]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def tokenised(train: Stream | Documents, heldout: Stream | Documents, numbers: Mapping[str, float]) -> Tokenised:
    """Return what a cache keeps of a data set."""
    parts = {"train": train, "heldout": heldout}
    arrays = {f"{side}.{name}": array for side, part in parts.items() for name, array in part.arrays().items()}
    return Tokenised(arrays, numbers)


def sources_of(
    found: Tokenised, config: DataConfig, tokenizer: Tokenizer
) -> tuple[Stream | Documents, Stream | Documents] | None:
    """Return the training and held-out rows of cached tokens; None if the arrays cannot be those of a data set.

    The arrays may come from anyone: token ids, boundaries and sizes are checked.
    """
    made = [_source(found.arrays, side, config, tokenizer) for side in ("train", "heldout")]
    if made[0] is None or made[1] is None or set(found.numbers) != set(NUMBERS):
        return None
    return made[0], made[1]


def _source(
    arrays: Mapping[str, npt.NDArray[Any]], side: str, config: DataConfig, tokenizer: Tokenizer
) -> Stream | Documents | None:
    tokens, length = arrays.get(f"{side}.tokens"), config.length
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    if tokens is None or tokens.dtype != dtype or not len(tokens) or int(tokens.max()) >= tokenizer.size:
        return None
    if config.rows == "stream":
        return Stream(tokens, length, shifted=side == "train") if len(tokens) >= length else None
    starts, prompts, pad = arrays.get(f"{side}.starts"), arrays.get(f"{side}.prompts"), tokenizer.pad
    if starts is None or prompts is None or pad is None or len(starts) != len(prompts) + 1 or not len(prompts):
        return None
    lengths = np.diff(starts)
    whole = starts[0] == 0 and starts[-1] == len(tokens) and (lengths > 0).all() and (lengths <= length).all()
    if not whole or (prompts < 0).any() or (prompts >= lengths).any():
        return None
    return Documents(tokens, np.array(starts, np.int64), np.array(prompts, np.int64), length, pad)
