"""Noise that mixes a clean string with a string of the prior, column by column: the form in which edit flows declare it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from sedd_graph.diffusion.strings.columns import Columns

__all__ = ["AlignedNoise"]


@dataclasses.dataclass(frozen=True)
class AlignedNoise:
    """A draw of a noisy string in three stages; v data tokens.

    A noise string is drawn: its length is geometric, its tokens are independent. It is aligned with the clean string.
    Then each column of the alignment takes its clean entry with probability ``clean``, else its noise entry.

    Attributes:
        clean: Probability that a column takes its clean entry.
        spread: The noise string has k or more tokens with probability ``spread ** k``, before truncation; below 1.
        longest: Largest number of tokens of the noise string; None: unlimited.
        law: float64 [v], distribution of noise tokens.
        align: Function of noise strings, int64 [b, m], and clean strings, int64 [b, n], with BLANK at padding, that
            returns their alignments. It must be deterministic.
    """

    clean: float
    spread: float
    longest: int | None
    law: Tensor
    align: Callable[[Tensor, Tensor], Columns]
