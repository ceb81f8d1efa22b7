"""Diversity of texts, without a model: unigram entropy of tokens, and repeated n-grams of words.

A word is what stands between white space, so that texts of any tokenizer are compared by the same units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.evaluation.estimate import Estimate, mean

__all__ = ["DISTINCT", "REPEATED", "distinct", "repetition", "unigram_entropy"]

REPEATED, DISTINCT = (2, 3, 4), (1, 2)
"""The n that are reported, of ``rep-n`` and of ``distinct-n``."""


def unigram_entropy(rows: Sequence[npt.NDArray[np.int64]]) -> Estimate:
    """Return the entropy in nats of the token frequencies within a row, averaged over ``rows`` (int64 [tokens] each).

    As published for diffusion language models (arXiv 2409.02908, section 5; 2503.00307). It is at most log(tokens of a
    row), so compare rows of one length. Rows without tokens are left out.
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
    """Return ``rep-n``: the share of a text's n-grams that occurred earlier in it, averaged over ``texts``.

    This is seq-rep-n, 1 - distinct / all (arXiv 1908.04319). Texts of fewer than n words are left out.
    """
    found = []
    for text in texts:
        grams = _grams(text.split(), n)
        if grams:
            found.append(1 - len(set(grams)) / len(grams))
    return mean(found)


def distinct(texts: Sequence[str], n: int) -> float:
    """Return ``distinct-n``: distinct n-grams of all texts together, per word (arXiv 1510.03055).

    It falls with the amount of text, so compare equally many texts of one length. NaN where there are no words.
    """
    split = [text.split() for text in texts]
    words = sum(map(len, split))
    return len({gram for text in split for gram in _grams(text, n)}) / words if words else math.nan
