"""Text of sampled tokens: what a row says, where it ends, and how it looks between two steps."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from sedd_graph.runs.open import Run
from sedd_graph.runs.serve.jobs import Tokens

__all__ = ["Finish", "Texts", "Written", "safe_length"]

Finish = Literal["stop", "length"]
"""Why a text ends: at a stop sequence or where the model ended it, or at the length that was asked for."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What the model wrote in a row.

    Attributes:
        text: Text of the written tokens, before the first stop sequence.
        parts: Text of each hole, in order.
        whole: Text of the row, given text included.
        count: Number of written tokens, up to the end of the text.
        finish: Why it ends.
    """

    text: str
    parts: tuple[str, ...]
    whole: str
    count: int
    finish: Finish


class Texts:
    """Text of the tokens of one model.

    Args:
        run: The opened run folder, with a tokenizer.
        pieces: Bytes of each token id (None: a mask), see :meth:`Process.draft_tokens`; None if tokens have none.
    """

    def __init__(self, run: Run, pieces: Mapping[int, bytes | None] | None) -> None:
        self._run, self._pieces, self._end = run, pieces, run.text_tokenizer().end

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """Return the text of token ids."""
        row = torch.as_tensor(np.asarray(ids, dtype=np.int64))
        return self._run.decode(row[None])[0] if len(row) else ""

    def written(
        self, tokens: Tokens, given: npt.NDArray[np.bool_], stops: Sequence[str], *, most: int | None = None
    ) -> Written:
        """Return what the model wrote in a row.

        Args:
            tokens: Tokens of the row, or of its beginning, int64 [l].
            given: True at given tokens, bool [l].
            stops: Stop sequences.
            most: Number of tokens that the model might have written at most, if it chooses lengths; None: it does not.
        """
        finish: Finish = "length"
        if len(given) and not given[-1] and self._end is not None:  # the text ends where the model ended it
            free = np.flatnonzero(given)[-1] + 1 if given.any() else 0
            ends = np.flatnonzero(tokens[free:] == self._end)
            if len(ends):
                tokens, given, finish = tokens[: free + ends[0]], given[: free + ends[0]], "stop"
        own = tokens[~given]
        text, count = self.decode(own), len(own)
        if most is not None:
            count = sum(int(t) in self._texts for t in own) if self._pieces is not None else len(own)
            finish = "stop" if count < most else finish
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
        edges = np.flatnonzero(np.diff(given.astype(np.int8))) + 1
        runs = zip(np.split(tokens, edges), np.split(given, edges), strict=True)
        parts = tuple(self.decode(part) for part, told in runs if len(told) and not told[0])
        return Written(text, (text,) if cuts else parts, self.decode(tokens), count, finish)

    @property
    def _texts(self) -> Mapping[int, bytes | None]:
        return self._pieces or {}

    def draft(self, row: Tokens) -> list[str | None]:
        """Return the text of each token of a row between two steps: None for a mask.

        Characters whose bytes are spread over several tokens are with the last of these. Tokens without text at the end
        of the row, which is padding, are left out.

        Args:
            row: Tokens, int64 [l].
        """
        found, decoder = list[str | None](), codecs.getincrementaldecoder("utf-8")("replace")
        last = -1  # place of the last token of the current run of visible ones
        for token in row.tolist():
            piece = self._texts.get(token, b"")
            if piece is None:
                if last >= 0:
                    found[last] = (found[last] or "") + decoder.decode(b"", True)
                decoder.reset()
                last = -1
                found.append(None)
                continue
            found.append(decoder.decode(piece))
            last = len(found) - 1
        if last >= 0:
            found[last] = (found[last] or "") + decoder.decode(b"", True)
        while found and found[-1] == "" and row[len(found) - 1] not in self._texts:
            found.pop()
        return found


def safe_length(text: str, stops: Sequence[str]) -> int:
    """Return how many characters of an unfinished text will stay as they are, whatever follows.

    An incomplete character at the end, and the beginning of a stop sequence, may still change.

    Args:
        text: The text so far.
        stops: Stop sequences, none of which is in the text.
    """
    size = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    held = max(
        (n for stop in stops for n in range(min(len(stop) - 1, size), 0, -1) if text[:size].endswith(stop[:n])),
        default=0,
    )
    return size - held
