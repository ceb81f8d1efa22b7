"""Rows and data set of tokens in shards (:mod:`sedd_graph.data.shards`), of which only what is used is read.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sedd_graph.data.batches import Rows
from sedd_graph.data.characters import Counts
from sedd_graph.data.config import DataConfig
from sedd_graph.data.shards import Shards
from sedd_graph.data.tokenizer import FILE, Ids, Tokenizer
from sedd_graph.errors import UserError

__all__ = ["Part", "ShardDocuments", "ShardStream", "cut_shards", "tokenizer_of", "whole"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of the shards, from one end of a document to another."""

    shards: Shards
    start: int
    """Position of the first token."""
    stop: int
    """Position after the last token, the separator of the last document included."""
    first: int
    """Number of the first document."""
    last: int
    """Number after the last document."""
    characters: int
    """Number of characters, without separators."""
    places: tuple[int, int] | None
    """First shard, and the one after the last, if the part consists of whole shards."""

    def counts(self, *, separators: bool) -> Counts | None:
        """Return the number of occurrences of each code point, int64 [0x110000]; None if the shards do not say.

        Args:
            separators: True to count the text of separators, too.
        """
        if self.places is None:
            return None
        found = self.shards.counts(*self.places)
        if separators and self.shards.index.separator_text:
            found[ord(self.shards.index.separator_text)] += self.last - self.first
        return found


@dataclasses.dataclass
class ShardStream:
    """Rows of ``length`` tokens, cut from the tokens of a part as from one sequence.

    With ``shifted`` the first cut (the phase) changes from epoch to epoch, as in a stream in memory.
    """

    part: Part
    length: int
    shifted: bool
    many = True

    @property
    def tokens(self) -> int:
        """Number of tokens, without the end-of-text token after the last document."""
        index = self.part.shards.index
        return self.part.stop - self.part.start - (0 if index.separator_text else len(index.separator))

    @property
    def characters(self) -> int:
        """Number of characters, the text of separators included."""
        return self.part.characters + len(self.part.shards.index.separator_text) * (self.part.last - self.part.first)

    @property
    def count(self) -> int:
        """Rows per epoch, the same for every phase."""
        return max(1, (self.tokens - self.length + 1 if self.shifted else self.tokens) // self.length)

    @property
    def phases(self) -> int:
        """Number of offsets of the first row, in tokens, at which ``count`` rows fit."""
        return min(self.length, self.tokens - self.count * self.length + 1) if self.shifted else 1

    def take(self, index: Ids, phase: int) -> Rows:
        starts = self.part.start + phase + index * self.length
        tokens = self.part.shards.rows(starts, np.full(len(starts), self.length), self.length)
        return Rows(tokens, *(np.ones(tokens.shape, dtype=np.bool_) for _ in range(3)))

    def update(self, found: Any) -> None:
        """Add to a hash what identifies the tokens: the digests in the index, and the part."""
        part = self.part
        found.update(f"shards {part.shards.digest()} stream {part.start} {part.start + self.tokens};".encode())


@dataclasses.dataclass
class ShardDocuments:
    """One document of a part per row, padded or truncated."""

    part: Part
    length: int
    pad: int
    phases = 1
    many = True

    @property
    def tokens(self) -> int:
        """Number of tokens of the documents before they are truncated, without separators."""
        part = self.part
        return part.stop - part.start - len(part.shards.index.separator) * (part.last - part.first)

    @property
    def characters(self) -> int:
        """Number of characters of the documents."""
        return self.part.characters

    @property
    def count(self) -> int:
        return self.part.last - self.part.first

    def take(self, index: Ids, phase: int) -> Rows:
        starts, stops = self.part.shards.spans(self.part.first + index)
        lengths = np.minimum(stops - starts, self.length)
        tokens = self.part.shards.rows(starts, lengths, self.length, fill=self.pad)
        attend = np.arange(self.length) < lengths[:, None]
        return Rows(tokens, attend, attend.copy(), attend.copy())

    def update(self, found: Any) -> None:
        """Add to a hash what identifies the rows: the digests in the index, and the part."""
        found.update(f"shards {self.part.shards.digest()} documents {self.part.first} {self.part.last};".encode())


def whole(shards: Shards) -> Part:
    """Return all of the shards as one part."""
    if shards.documents == 0:
        raise UserError(f"{shards.folder}: the shards hold no documents")
    end = int(shards.ends(np.array([shards.documents - 1]))[0])
    if end != shards.tokens:
        raise UserError(f"{shards.folder}: the boundaries of documents are broken: the last is not the last token")
    characters = int(shards.characters_before[-1])
    return Part(shards, 0, shards.tokens, 0, shards.documents, characters, (0, len(shards.parts)))


def cut_shards(shards: Shards, holdout: float) -> tuple[Part, Part]:
    """Split shards into a training part and a held-out part at the end of a document.

    The cut is at the end of a shard if that holds out between half and twice the requested share of the tokens, else at
    the nearest end of a document.

    Args:
        shards: The shards.
        holdout: Requested share of the tokens to hold out.

    Raises:
        UserError: No end of a document holds out between half and twice the share.
    """
    everything = whole(shards)
    cut = round(shards.tokens * (1 - holdout))

    def fits(position: int) -> bool:
        return 0 < position < shards.tokens and holdout / 2 <= 1 - position / shards.tokens <= holdout * 2

    places = sorted(range(1, len(shards.parts)), key=lambda place: abs(int(shards.tokens_before[place]) - cut))
    for place in places:
        position, count = int(shards.tokens_before[place]), int(shards.documents_before[place])
        if not fits(position):
            break
        if count and int(shards.ends(np.array([count - 1]))[0]) == position:
            before = dataclasses.replace(everything, stop=position, last=count, places=(0, place))
            after = dataclasses.replace(everything, start=position, first=count, places=(place, len(shards.parts)))
            return _counted(before), _counted(after)
    count = shards.nearest_document(cut)
    position = int(shards.ends(np.array([count - 1]))[0])
    if not fits(position):
        raise UserError(
            f"data.holdout: no document of {shards.folder} ends where {holdout:g} of the tokens would be held out; the "
            f"nearest end holds out {1 - position / shards.tokens:.3f}: name held-out text in data.heldout"
        )
    before = dataclasses.replace(everything, stop=position, last=count, places=None)
    after = dataclasses.replace(everything, start=position, first=count, places=None)
    return _counted(before), _counted(after)


def _counted(part: Part) -> Part:
    """Return the part with its number of characters, which the boundaries of its documents say."""
    ends = part.shards.ends(np.array([max(part.first - 1, 0), part.last - 1]), column="characters")
    characters = int(ends[1] - (ends[0] if part.first else 0))
    if characters < 0:
        raise UserError(
            f"{part.shards.folder}: the boundaries of documents are broken: they count fewer than 0 characters"
        )
    return dataclasses.replace(part, characters=characters)


def tokenizer_of(shards: Shards, config: DataConfig, root: Path, given: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of a data set of shards: that of the run or of the ``data`` section, if it made the tokens.

    A ``data`` section whose tokenizer is fitted to text, such as ``bpe``, stands for the tokenizer in the shards' folder,
    if that was fitted by the same section.

    Args:
        shards: The shards.
        config: The ``data`` section.
        root: Folder to which file names in the blueprint are relative.
        given: Tokenizer of the run; None makes that of the ``data`` section.

    Raises:
        UserError: It is not the tokenizer that made the tokens.
    """
    if given is None and config.tokenizer.trained:
        section = config.model_dump(mode="json", include={"tokenizer"})["tokenizer"]
        if section != shards.index.tokenizer.section:
            raise UserError(
                f"data.tokenizer {section['op']!r} is fitted to text, and {shards.folder} was not made with it: set "
                f"data.tokenizer to {{op: file, path: {shards.folder.name}/{FILE}}}"
            )
        return shards.tokenizer()
    tokenizer = config.tokenizer.make((), root=root) if given is None else given
    shards.require_tokenizer(tokenizer)
    return tokenizer
