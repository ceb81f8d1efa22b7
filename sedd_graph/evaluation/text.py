"""How varied texts are: unigram entropy of tokens, and n-grams of words that repeat. No model is asked.

A word is what stands between white space, so that texts of any tokenizer are compared by the same units.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.evaluation.estimate import Estimate, mean

__all__ = ["DISTINCT", "REPEATED", "distinct", "repetition", "unigram_entropy"]

REPEATED, DISTINCT = (2, 3, 4), (1, 2)
"""The n that are reported, of ``rep-n`` and of ``distinct-n``."""


def unigram_entropy(rows: Sequence[npt.NDArray[np.int64]]) -> Estimate:
    """Entropy in nats of the token frequencies within one row, averaged over ``rows`` (int64 [tokens] each).

    As published for diffusion language models (arXiv 2409.02908, section 5; 2503.00307). At most log(tokens of a row): compare
    rows of one length. Rows without tokens are passed over.
    """
    found = []
    for row in rows:
        if len(row):
            share = np.unique(row, return_counts=True)[1] / len(row)
            found.append(float(-(share * np.log(share)).sum()))
    return mean(found)


def _grams(words: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(texts: Sequence[str], n: int) -> Estimate:
    """``rep-n``: the share of a text's n-grams that it has had before, 1 - distinct / all, averaged over texts (seq-rep-n,
    arXiv 1908.04319). Texts of fewer than n words are passed over."""
    found = []
    for text in texts:
        grams = _grams(text.split(), n)
        if grams:
            found.append(1 - len(set(grams)) / len(grams))
    return mean(found)


def distinct(texts: Sequence[str], n: int) -> float:
    """``distinct-n``: different n-grams in all texts together, over all their words (arXiv 1510.03055).

    It falls as there is more text: compare equally many texts of one length. NaN where there are no words.
    """
    seen: set[tuple[Hashable, ...]] = set()
    words = 0
    for text in texts:
        split = text.split()
        words += len(split)
        seen.update(_grams(split, n))
    return len(seen) / words if words else math.nan
