"""Quality statistics of sampled or held-out texts: their diversity, and their likelihood under a judge."""

from __future__ import annotations

import math

import numpy as np

from sedd_graph.component.progress import track
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.evaluation.estimate import Estimate, ratio
from sedd_graph.evaluation.judge import Ids, Reading
from sedd_graph.evaluation.text import DISTINCT, REPEATED, distinct, repetition, unigram_entropy
from sedd_graph.evaluation.words import Vocabulary, words_of

__all__ = ["diversity", "documents", "judge_statistics", "training_vocabulary"]

BLOCK, MAX_BLOCKS = 2**16, 256
"""Tokens that are decoded at a time, and how many times: of longer text, blocks that are spread evenly are read."""


def documents(rows: Ids, tokenizer: Tokenizer) -> list[list[str]]:
    """Decode rows of tokens to texts, each split into documents at the tokenizer's separator.

    Args:
        rows: Token ids, int64 [row, position].
        tokenizer: Tokenizer that decodes the rows.

    Returns:
        For each row the list of its documents, without empty ones.
    """
    texts = []
    for row in rows:
        parts = [row]
        if tokenizer.end is not None:
            parts = [part[part != tokenizer.end] for part in np.split(row, np.flatnonzero(row == tokenizer.end))]
        texts.append([text for part in parts if (text := tokenizer.decode(part.tolist()))])
    return texts


def training_vocabulary(data: Dataset) -> Vocabulary:
    """Return the words of the training text of a data set, of at most 16 million tokens of it."""
    count, stream = data.train.count, data.config.rows == "stream"
    rows = max(1, BLOCK // data.width)
    starts = np.arange(0, count, rows)
    if len(starts) > MAX_BLOCKS:
        starts = starts[np.linspace(0, len(starts) - 1, MAX_BLOCKS).astype(np.int64)]
    words = set[str]()
    for start in track(starts.tolist(), "reading the training text", unit="block"):
        tokens = data.train.take(np.arange(start, min(start + rows, count)), 0).tokens
        for parts in documents(tokens.reshape(1, -1) if stream else tokens, data.tokenizer):
            words.update(words_of("\n".join(parts), cut=stream))
    return Vocabulary(frozenset(words), stream)


def _named(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_standard_error": found.standard_error}


def diversity(rows: Ids, tokenizer: Tokenizer, vocabulary: Vocabulary | None = None) -> dict[str, float]:
    """Return diversity statistics of rows of tokens. Separators and padding are left out.

    Args:
        rows: Token ids, int64 [row, position].
        tokenizer: Tokenizer of the model that the rows belong to.
        vocabulary: Words of the training text; None if there is none.

    Returns:
        Statistics by name, namely the unigram ``entropy`` of a row in nats per token; ``rep_n`` and ``distinct_n`` of
        n-grams of words (:mod:`sedd_graph.evaluation.text`); with ``vocabulary`` the share of ``known_words``, those that
        occur in the training text (:mod:`sedd_graph.evaluation.words`); the standard error of each as ``<name>_standard_error``,
        except for ``distinct_n``; the number of ``rows``; and the mean ``characters_per_row``.
    """
    apart = [token for token in (tokenizer.pad, tokenizer.end) if token is not None]
    texts = ["\n".join(parts) for parts in documents(rows, tokenizer)]
    found: dict[str, float] = {"rows": len(rows)}
    found |= _named("entropy", unigram_entropy([row[~np.isin(row, apart)] for row in rows]))
    for n in REPEATED:
        found |= _named(f"rep_{n}", repetition(texts, n))
    for n in DISTINCT:
        found[f"distinct_{n}"] = distinct(texts, n)
    if vocabulary is not None:
        found |= _named("known_words", vocabulary.share(texts))
    found["characters_per_row"] = float(np.mean([len(text) for text in texts]))
    return found


def judge_statistics(reading: Reading) -> dict[str, float]:
    """Return statistics of the likelihood of texts under a judge.

    Args:
        reading: Likelihood and tokens of the texts under the judge.

    Returns:
        Statistics by name, namely ``nats_per_token``, the mean -log p of a counted token; ``generative_perplexity``,
        the exponential of ``nats_per_token``; ``judge_entropy``, the unigram entropy of a text in nats per token of the
        judge; the standard error of each as ``<name>_standard_error``; and the numbers of counted tokens
        (``judge_tokens``) and windows (``judge_windows``).
    """
    nats = ratio(reading.nats, reading.counted)
    perplexity = math.exp(min(nats.value, 700.0)) if math.isfinite(nats.value) else math.nan
    return {
        **_named("generative_perplexity", Estimate(perplexity, perplexity * nats.standard_error)),
        **_named("nats_per_token", nats),
        **_named("judge_entropy", unigram_entropy(reading.tokens)),
        "judge_tokens": int(reading.counted.sum()),
        "judge_windows": int(reading.windows.sum()),
    }
