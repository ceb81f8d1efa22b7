"""What can be said of sampled texts, and of held-out ones beside them: how a judge finds them, how varied they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.evaluation.estimate import Estimate, ratio
from sedd_graph.evaluation.judge import Reading
from sedd_graph.evaluation.text import DISTINCT, REPEATED, distinct, repetition, unigram_entropy

__all__ = ["documents", "judged", "variety"]

Ids = npt.NDArray[np.int64]


def documents(rows: Ids, tokenizer: Tokenizer) -> list[list[str]]:
    """The texts of ``rows`` [row, position]: each as its documents, cut at the tokenizer's separators."""
    return [[text for part in _parts(row, tokenizer) if (text := tokenizer.decode(part.tolist()))] for row in rows]


def _parts(row: Ids, tokenizer: Tokenizer) -> Iterator[Ids]:
    if tokenizer.end is None:
        yield row
    else:
        for part in np.split(row, np.flatnonzero(row == tokenizer.end)):
            yield part[part != tokenizer.end]


def _named(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_standard_error": found.standard_error}


def variety(rows: Ids, tokenizer: Tokenizer) -> dict[str, float]:
    """Of ``rows`` [row, position] without separators and padding: ``entropy`` in nats per token of the model itself,
    ``rep_n`` and ``distinct_n`` of words, and sizes."""
    apart = [t for t in (tokenizer.pad, tokenizer.end) if t is not None]
    texts = ["\n".join(parts) for parts in documents(rows, tokenizer)]
    found: dict[str, float] = {"rows": len(rows)}
    found |= _named("entropy", unigram_entropy([row[~np.isin(row, apart)] for row in rows]))
    for n in REPEATED:
        found |= _named(f"rep_{n}", repetition(texts, n))
    for n in DISTINCT:
        found[f"distinct_{n}"] = distinct(texts, n)
    found["characters_per_row"] = float(np.mean([len(text) for text in texts]))
    return found


def judged(reading: Reading) -> dict[str, float]:
    """``nats_per_token``: the mean over all tokens that count; ``generative_perplexity``: its exponential; and
    ``judge_entropy``: unigram entropy in nats of the judge's tokens."""
    nats = ratio(reading.nats, reading.counted)
    perplexity = math.exp(min(nats.value, 700.0)) if math.isfinite(nats.value) else math.nan
    return {
        **_named("generative_perplexity", Estimate(perplexity, perplexity * nats.standard_error)),
        **_named("nats_per_token", nats),
        **_named("judge_entropy", unigram_entropy(reading.tokens)),
        "judge_tokens": int(reading.counted.sum()),
        "judge_windows": int(reading.windows.sum()),
    }
