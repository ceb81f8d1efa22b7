"""Generative perplexity at the entropy of the data: a frontier over temperatures, and its value where entropies are equal.

A judge's nats per token of samples, less their entropy, are the KL divergence from the judge; alone, they fall as samples repeat
themselves. A frontier is the curve of nats against entropy while the temperature changes; its value at the entropy of held-out
text can be compared (arXiv 2604.02718). As there, the entropy is the unigram entropy of a text's tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedd_graph.evaluation.estimate import Estimate, mean, ratio
from sedd_graph.evaluation.judge import Reading
from sedd_graph.evaluation.text import unigram_entropy

__all__ = ["AtEntropy", "FrontierPoint", "Judged", "at_entropy", "judged"]

RESAMPLES = 200
"""Number of bootstrap samples of an interpolated value."""

Values = npt.NDArray[np.float64]


class Judged(NamedTuple):
    """Texts under a judge, each of which has tokens.

    Attributes:
        nats: -log p of each text, nats, float64 [texts].
        counted: Number of counted tokens of each text, float64 [texts].
        entropy: Unigram entropy of each text, nats per token of the judge, float64 [texts].
    """

    nats: Values
    counted: Values
    entropy: Values

    def nats_per_token(self) -> Estimate:
        """Return the mean -log p of a token."""
        return ratio(self.nats, self.counted)

    def taken(self, index: npt.NDArray[np.int64]) -> Judged:
        """Return the texts with these numbers."""
        return Judged(self.nats[index], self.counted[index], self.entropy[index])


def judged(reading: Reading) -> Judged:
    """Return nats, tokens and entropy of the texts of a reading; texts without counted tokens are left out."""
    kept = np.flatnonzero(reading.counted > 0)
    entropy = [unigram_entropy([reading.tokens[i]]).value for i in kept]
    return Judged(reading.nats[kept], reading.counted[kept], np.array(entropy))


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """Samples at one temperature and one number of steps, or held-out text.

    Attributes:
        temperature: Temperature of the sampler; None for held-out text.
        steps: Number of steps; None for held-out text, and for a sampler without one.
        nats_per_token: Mean -log p of a token under the judge, nats.
        nats_standard_error: Its standard error, over texts.
        entropy: Mean unigram entropy of a text, nats per token of the judge.
        entropy_standard_error: Its standard error.
        perplexity: exp of ``nats_per_token``: the generative perplexity.
        texts: Number of texts.
    """

    temperature: float | None
    steps: int | None
    nats_per_token: float
    nats_standard_error: float
    entropy: float
    entropy_standard_error: float
    perplexity: float
    texts: int

    @classmethod
    def of(cls, texts: Judged, *, temperature: float | None, steps: int | None) -> FrontierPoint:
        """Return the point of some texts."""
        nats, entropy = texts.nats_per_token(), mean(texts.entropy)
        return cls(temperature, steps, *nats, *entropy, perplexity=_exp(nats.value), texts=len(texts.nats))


@dataclasses.dataclass(frozen=True)
class AtEntropy:
    """Generative perplexity of one number of steps, interpolated at the entropy of held-out text.

    Attributes:
        steps: Number of steps; None for a sampler without one.
        perplexity: The interpolated perplexity; None if no two temperatures have entropies around that of the text.
        standard_error: Its standard error, by resampling of samples and held-out text; NaN if it is unknown.
        sample_error: Its standard error with the held-out text as it is, by resampling of samples alone: that of a comparison of
            runs beside the same text; NaN if it is unknown.
        temperature: The interpolated temperature.
        why_not: Reason why there is no value, or no error; None if there are both.
    """

    steps: int | None
    perplexity: float | None
    standard_error: float
    sample_error: float
    temperature: float | None
    why_not: str | None = None


def at_entropy(
    texts: Sequence[Judged], temperatures: Sequence[float], reference: Judged, *, steps: int | None, seed: int = 0
) -> AtEntropy:
    """Interpolate the perplexity of samples at the entropy of held-out text, linearly in nats over entropy.

    Args:
        texts: The samples of each temperature.
        temperatures: The temperatures.
        reference: The held-out text.
        steps: Number of steps of all samples.
        seed: Seed of the bootstrap.
    """
    found = _interpolated(texts, temperatures, reference)
    entropies = [float(t.entropy.mean()) for t in texts]
    target = float(reference.entropy.mean())
    low = target - min(entropies) < max(entropies) - target
    add = f"add {'lower' if low else 'higher'} temperatures"
    if found is None:
        why = f"all samples have {'more' if low else 'less'} entropy than held-out text: {add}"
        return AtEntropy(steps, None, math.nan, math.nan, None, why)
    generator = np.random.default_rng(seed)
    both, alone = list[float](), list[float]()
    for _ in range(RESAMPLES):
        drawn = [t.taken(generator.integers(len(t.nats), size=len(t.nats))) for t in (*texts, reference)]
        for values, beside in ((both, drawn[-1]), (alone, reference)):
            again = _interpolated(drawn[:-1], temperatures, beside)
            if again is not None:
                values.append(again[0])
    perplexity = _exp(found[0])
    error, sample_error = (perplexity * _spread(values) for values in (both, alone))
    why_not = None if math.isfinite(error) else f"the entropy of held-out text is too near the end of the curve: {add}"
    return AtEntropy(steps, perplexity, error, sample_error, found[1], why_not)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation; NaN where many resamples left the curve, so that the rest are no fair draw of them."""
    return float(np.std(values, ddof=1)) if len(values) > 0.9 * RESAMPLES else math.nan


def _interpolated(
    texts: Sequence[Judged], temperatures: Sequence[float], reference: Judged
) -> tuple[float, float] | None:
    """Return nats per token and temperature at the entropy of the reference; None if no two points are around it.

    Points are taken in the order of temperature. Where the curve passes the entropy several times, the highest temperature
    counts, which is the least sharpened.
    """
    order = np.argsort(temperatures)
    entropies = [float(texts[i].entropy.mean()) for i in order]
    nats = [texts[i].nats_per_token().value for i in order]
    target = float(reference.entropy.mean())
    for i in range(len(order) - 1, -1, -1):
        if entropies[i] == target:
            return nats[i], float(temperatures[order[i]])
        if i and (entropies[i - 1] - target) * (entropies[i] - target) < 0:
            share = (target - entropies[i - 1]) / (entropies[i] - entropies[i - 1])
            low, high = (float(temperatures[order[k]]) for k in (i - 1, i))
            return nats[i - 1] + share * (nats[i] - nats[i - 1]), low + share * (high - low)
    return None


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0)) if math.isfinite(nats) else math.nan
