"""Statistics of texts, sampled or held out: their diversity, and their likelihood under a judge."""

from __future__ import annotations

import math

import numpy as np

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.evaluation.estimate import Estimate, ratio
from sedd_graph.evaluation.judge import Ids, Reading
from sedd_graph.evaluation.text import DISTINCT, REPEATED, distinct, repetition, unigram_entropy

__all__ = ["diversity", "documents", "judge_statistics"]


def documents(rows: Ids, tokenizer: Tokenizer) -> list[list[str]]:
    """Decode ``rows``, int64 [row, position]; each text is the list of its documents, split at the tokenizer's separator."""
    texts = []
    for row in rows:
        parts = [row]
        if tokenizer.end is not None:
            parts = [part[part != tokenizer.end] for part in np.split(row, np.flatnonzero(row == tokenizer.end))]
        texts.append([text for part in parts if (text := tokenizer.decode(part.tolist()))])
    return texts


def _named(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_standard_error": found.standard_error}


def diversity(rows: Ids, tokenizer: Tokenizer) -> dict[str, float]:
    """Return statistics of ``rows``, int64 [row, position], without their separators and padding.

    ``entropy`` is in nats per token of the model; ``rep_n`` and ``distinct_n`` are of words
    (:mod:`sedd_graph.evaluation.text`); ``rows`` and ``characters_per_row`` are sizes.
    """
    apart = [token for token in (tokenizer.pad, tokenizer.end) if token is not None]
    texts = ["\n".join(parts) for parts in documents(rows, tokenizer)]
    found: dict[str, float] = {"rows": len(rows)}
    found |= _named("entropy", unigram_entropy([row[~np.isin(row, apart)] for row in rows]))
    for n in REPEATED:
        found |= _named(f"rep_{n}", repetition(texts, n))
    for n in DISTINCT:
        found[f"distinct_{n}"] = distinct(texts, n)
    found["characters_per_row"] = float(np.mean([len(text) for text in texts]))
    return found


def judge_statistics(reading: Reading) -> dict[str, float]:
    """Return statistics of texts under a judge.

    ``nats_per_token`` is the mean over all counted tokens, ``generative_perplexity`` its exponential, and
    ``judge_entropy`` the unigram entropy in nats of the judge's tokens.
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
