"""Diversity of texts, computed without a model: unigram entropy of tokens, and repeated n-grams of words.

Words are separated by white space, so that ``rep-n`` and ``distinct-n`` do not depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.evaluation.estimate import Estimate, mean

__all__ = ["DISTINCT", "REPEATED", "distinct", "repetition", "unigram_entropy"]

REPEATED, DISTINCT = (2, 3, 4), (1, 2)
"""Values of n for which ``rep-n`` (first tuple) and ``distinct-n`` (second tuple) are reported."""


def unigram_entropy(rows: Sequence[npt.NDArray[np.int64]]) -> Estimate:
    """Return the unigram entropy of a row of tokens, nats per token, averaged over rows.

    The entropy is that of the token frequencies within one row, as published for diffusion language models (arXiv
    2409.02908, section 5; 2503.00307). It is at most the logarithm of the row's length, so only rows of equal length
    are comparable.

    Args:
        rows: Token ids of each row, int64 [tokens]. Empty rows are left out.

    Returns:
        The mean over rows and its standard error.
    """
    found = []
    for row in rows:
        if len(row):
            share = np.unique(row, return_counts=True)[1] / len(row)
            found.append(float(-(share * np.log(share)).sum()))
    return mean(found)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(texts: Sequence[str], n: int) -> Estimate:
    """Return ``rep-n``, the fraction of a text's n-grams that occur earlier in the same text, averaged over texts.

    For each text it is 1 - (number of distinct n-grams) / (number of n-grams), called seq-rep-n in arXiv 1908.04319.

    Args:
        texts: The texts. Those of fewer than n words are left out.
        n: Number of words of an n-gram.

    Returns:
        The mean over texts and its standard error.
    """
    found = []
    for text in texts:
        grams = _grams(text.split(), n)
        if grams:
            found.append(1 - len(set(grams)) / len(grams))
    return mean(found)


def distinct(texts: Sequence[str], n: int) -> float:
    """Return ``distinct-n``: the number of distinct n-grams of words over the number of words (arXiv 1510.03055).

    The value decreases with the amount of text, so only sets of equally many texts of equal length are comparable.

    Args:
        texts: The texts. Both numbers are totals over all of them.
        n: Number of words of an n-gram.

    Returns:
        A ratio in [0, 1]; NaN if the texts have no words.
    """
    split = [text.split() for text in texts]
    words = sum(map(len, split))
    return len({gram for text in split for gram in _grams(text, n)}) / words if words else math.nan
