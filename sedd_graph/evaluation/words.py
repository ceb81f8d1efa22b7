"""Share of words that occur in the training text: whether a model spells. Computed without a model.

A word is a maximal run of letters, without regard to case, so that punctuation and digits do not matter. In text without
spaces between words, or in sequences that are no text, the share says nothing; that of held-out text shows it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from sedd_graph.evaluation.estimate import Estimate, ratio

__all__ = ["Vocabulary", "words_of"]

WORD = re.compile(r"[^\W\d_]+")


def words_of(text: str, *, cut: bool) -> list[str]:
    """Return the words of a text in lower case.

    Args:
        text: The text.
        cut: True to leave out words that touch an end of the text, since they may be parts of words.
    """
    found = WORD.finditer(text)
    return [m[0].casefold() for m in found if not (cut and (m.start() == 0 or m.end() == len(text)))]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words of a training text.

    Attributes:
        words: The different words, in lower case.
        cut: True if rows begin and end within words, as those of ``data.rows: stream`` do.
    """

    words: frozenset[str]
    cut: bool

    def share(self, texts: Sequence[str]) -> Estimate:
        """Return the share of the words of ``texts`` that occur in the training text, with its standard error over texts.

        Args:
            texts: One text for each row.
        """
        rows = [words_of(text, cut=self.cut) for text in texts]
        return ratio([sum(word in self.words for word in row) for row in rows], [len(row) for row in rows])
