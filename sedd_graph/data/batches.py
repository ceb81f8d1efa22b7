"""Batches of rows of tokens with masks for attention, corruption and loss, and sources of rows in memory.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sedd_graph.data.order import Source
from sedd_graph.data.tokenizer import Ids

__all__ = ["Documents", "Packed", "Rows", "Stream", "TokenSource"]

Flags = npt.NDArray[np.bool_]
Packed = npt.NDArray[np.unsignedinteger]
"""Type of the token ids of a whole corpus, uint16 or uint32 [tokens] to save memory; the ids in a batch are int64."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batch of rows of tokens with masks, as NumPy arrays. Axes: b rows in the batch, l tokens per row."""

    tokens: Ids
    """Token ids, int64 [b, l]."""
    attend: Flags
    """Attention mask, bool [b, l]: true at positions that are not padding."""
    corrupt: Flags
    """Corruption mask, bool [b, l]: true at positions that the forward process may corrupt."""
    loss: Flags
    """Loss mask, bool [b, l]: true at positions that are included in the loss."""


class TokenSource(Source[Rows], Protocol):
    """Protocol of a source of rows of tokens, which a hash identifies."""

    def update(self, found: Any) -> None:
        """Add to ``found``, a hash of ``hashlib``, what identifies the rows."""


@dataclasses.dataclass
class Stream:
    """One long sequence of tokens, cut into rows of ``length``.

    With ``shifted`` the first cut (the phase) changes from epoch to epoch, so that rows begin at every offset in time;
    otherwise it is always 0. Fewer than ``length`` tokens (``2 * length`` with ``shifted``) at the end are unused.
    """

    tokens: Packed
    length: int
    shifted: bool
    many = False

    @property
    def count(self) -> int:
        """Rows per epoch, the same for every phase."""
        usable = len(self.tokens) - self.length + 1 if self.shifted else len(self.tokens)
        return max(1, usable // self.length)

    @property
    def phases(self) -> int:
        """Number of offsets of the first row, in tokens, at which ``count`` rows fit."""
        return min(self.length, len(self.tokens) - self.count * self.length + 1) if self.shifted else 1

    def take(self, index: Ids, phase: int) -> Rows:
        starts = phase + index * self.length
        tokens = self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64)
        return Rows(tokens, *(np.ones(tokens.shape, dtype=np.bool_) for _ in range(3)))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that hold the tokens, by name."""
        return {"tokens": self.tokens}

    def update(self, found: Any) -> None:
        """Add the tokens to a hash."""
        _update(found, self.tokens)


@dataclasses.dataclass
class Documents:
    """One document per row, padded or truncated. Its prompt is attended to, but neither corrupted nor counted.

    Document i is ``tokens[starts[i] : starts[i + 1]]``, of which the first ``prompts[i]`` are the prompt.
    """

    tokens: Packed
    starts: Ids
    prompts: Ids
    length: int
    pad: int
    phases = 1
    many = False

    @property
    def count(self) -> int:
        return len(self.prompts)

    def take(self, index: Ids, phase: int) -> Rows:
        position = np.arange(self.length)
        first = self.starts[index][:, None]
        attend = position < self.starts[index + 1][:, None] - first
        tokens = np.where(attend, self.tokens[np.minimum(first + position, len(self.tokens) - 1)], self.pad)
        counted = attend & (position >= self.prompts[index][:, None])
        return Rows(tokens.astype(np.int64), attend, counted, counted.copy())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that hold the tokens and their boundaries, by name."""
        return {"tokens": self.tokens, "starts": self.starts, "prompts": self.prompts}

    def update(self, found: Any) -> None:
        """Add the tokens, and the boundaries of documents and prompts, to a hash."""
        for array in (self.tokens, self.starts, self.prompts):
            _update(found, array)


def _update(found: Any, array: npt.NDArray[Any]) -> None:
    found.update(f"{array.dtype.str} {len(array)};".encode())
    found.update(np.ascontiguousarray(array).data)
