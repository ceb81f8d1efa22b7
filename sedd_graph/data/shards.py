"""Shards: token ids of a corpus in memory-mapped files, with the boundaries of documents and an index. Imports no torch.

A folder of shards holds, beside ``index.json`` and ``tokenizer.json``, three ``.npy`` files for each shard:

- ``00000.tokens.npy``: the token ids, uint16 or uint32 [tokens];
- ``00000.documents.npy``: where each document ends, int64 [documents, 2]: tokens and characters from the start of the
  shard. A document may begin in an earlier shard;
- ``00000.characters.npy``: code points and how often each occurs, int64 [code points, 2].
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sedd_graph.data.characters import CODES, Counts
from sedd_graph.data.shard_index import INDEX, PARTS, Index, Part
from sedd_graph.data.tokenizer import FILE, MAX_FILE, Ids, Tokenizer, load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.inputs.arrays import map_npy, prefetch, release_pages
from sedd_graph.inputs.files import read_bytes, require_file

__all__ = ["MAX_SHARD", "Shards", "tokenizer_digest"]

MAX_SHARD = 2**40
"""Size limit of a file of a shard, in bytes."""
MAX_OPEN = 256
"""Largest number of arrays that a process has open at a time."""


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256, hexadecimal, of a tokenizer's JSON with sorted keys, which equal tokenizers have in common."""
    canonical = json.dumps(json.loads(tokenizer.to_json()), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Shards:
    """The tokens of one or more folders of shards, as one sequence of tokens and of documents.

    Files are mapped into memory when they are first used, and at most :data:`MAX_OPEN` at a time.

    Args:
        folders: The folders, in the order of the text, with their indexes.

    Raises:
        UserError: The folders have different tokenizers or separators, or a file of tokens is missing or has another
            size than its index says.
    """

    def __init__(self, folders: Sequence[tuple[Path, Index]]) -> None:
        self.folders = tuple(folders)
        self.folder, self.index = self.folders[0]
        for folder, index in self.folders:
            same = index.tokenizer.sha256 == self.index.tokenizer.sha256 and index.separator == self.index.separator
            if not same or index.unit != self.index.unit:
                raise UserError(f"{folder} and {self.folder} have different tokenizers, separators or units of text")
        self.parts = [(folder, index.dtype, shard) for folder, index in self.folders for shard in index.shards]
        self.tokens_before = _before([shard.tokens for _, _, shard in self.parts])
        self.documents_before = _before([shard.documents for _, _, shard in self.parts])
        self.characters_before = _before([shard.characters for _, _, shard in self.parts])
        for folder, dtype, shard in self.parts:
            path = folder / f"{shard.name}.tokens.npy"
            beyond = require_file(path, limit=MAX_SHARD).st_size - shard.tokens * np.dtype(dtype).itemsize
            if not 0 < beyond < 2**16:  # the header of the file
                raise UserError(f"{path}: has another size than {shard.tokens:,} tokens of {dtype}, which {INDEX} says")
        self._open: OrderedDict[tuple[int, Part], npt.NDArray[Any]] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Number of tokens of all shards."""
        return int(self.tokens_before[-1])

    @property
    def documents(self) -> int:
        """Number of documents of all shards."""
        return int(self.documents_before[-1])

    @property
    def size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.index.tokenizer.size

    def digest(self) -> str:
        """Return the SHA-256, hexadecimal, of the digests of all shards. The shards themselves are not read."""
        facts = [
            [shard.tokens, shard.documents, shard.sha256["tokens"], shard.sha256["documents"]]
            for *_, shard in self.parts
        ]
        return hashlib.sha256(json.dumps([self.index.separator, facts]).encode()).hexdigest()

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise :class:`UserError` if ``tokenizer`` is not the one that made the tokens."""
        if tokenizer_digest(tokenizer) != tokenizer_digest(self.tokenizer()):
            raise UserError(
                f"{self.folder} was made with another tokenizer, of {self.size:,} tokens, than the {tokenizer.size:,} of "
                f"data.tokenizer or of the run: set data.tokenizer to {{op: file, path: {self.folder.name}/{FILE}}}, or "
                "tokenise the text again"
            )

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens.

        Raises:
            UserError: ``tokenizer.json`` in the folder is missing, broken, or not the one that the index names.
        """
        path = self.folder / FILE
        if hashlib.sha256(read_bytes(path, limit=MAX_FILE)).hexdigest() != self.index.tokenizer.sha256:
            raise UserError(f"{path} is not the tokenizer that made the tokens: its SHA-256 differs from {INDEX}")
        found = load_tokenizer(path)
        if found.size != self.size:
            raise UserError(f"{path} has {found.size:,} tokens, not the {self.size:,} that {INDEX} says")
        return found

    def rows(self, starts: Ids, lengths: Ids, width: int, *, fill: int = 0) -> Ids:
        """Return rows of tokens, int64 [b, width]; ``fill`` where a row is shorter.

        Args:
            starts: Position of the first token of each row in the whole sequence, int64 [b].
            lengths: Number of tokens of each row, at most ``width``, int64 [b].
            width: Number of columns.
            fill: Token id after the end of a row.

        Raises:
            UserError: A file is broken, or holds an id that the tokenizer does not have.
        """
        rows = np.full((len(starts), width), fill, dtype=np.int64)
        segments = list(self._segments(starts, lengths))
        for _, _, place, first, stop in segments:  # all at once, so that a disk need not wait for each
            prefetch(self._array(place, "tokens"), first, stop)
        for row, column, place, first, stop in segments:
            piece = self._array(place, "tokens")[first:stop]
            if (largest := int(piece.max())) >= self.size:
                raise UserError(
                    f"{self._path(place, 'tokens')}: token id {largest:,} between positions {first:,} and {stop:,}; the "
                    f"tokenizer has {self.size:,}"
                )
            rows[row, column : column + len(piece)] = piece
        for place in {place for _, _, place, _, _ in segments}:
            if (place, "tokens") in self._open:
                release_pages(self._open[place, "tokens"])
        return rows

    def _segments(self, starts: Ids, lengths: Ids) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield the parts of rows that lie in one shard: row, column, shard, and first and last position in the shard."""
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            done, place = 0, int(np.searchsorted(self.tokens_before, start, side="right")) - 1
            while done < length:
                first = start + done - int(self.tokens_before[place])
                stop = min(first + length - done, self.parts[place][2].tokens)
                if stop > first:
                    yield row, done, place, first, stop
                done, place = done + stop - first, place + 1

    def spans(self, documents: Ids) -> tuple[Ids, Ids]:
        """Return the positions at which documents begin and end, both int64 [b], without their separators.

        Args:
            documents: Numbers of the documents, int64 [b].

        Raises:
            UserError: A file of boundaries is broken.
        """
        ends = self.ends(documents)
        starts = np.where(documents > 0, self.ends(np.maximum(documents - 1, 0)), 0)
        stops = ends - len(self.index.separator)
        if len(documents) and ((starts > stops).any() or (starts < 0).any() or (ends > self.tokens).any()):
            raise UserError(f"{self.folder}: the boundaries of documents are broken: they are not in ascending order")
        return starts, stops

    def ends(self, documents: Ids, *, column: Literal["tokens", "characters"] = "tokens") -> Ids:
        """Return the tokens (or characters) from the start of the sequence to the end of each document, int64 [b]."""
        before = self.tokens_before if column == "tokens" else self.characters_before
        places = np.searchsorted(self.documents_before, documents, side="right") - 1
        found = np.zeros(len(documents), dtype=np.int64)
        for place in np.unique(places).tolist():
            mine = places == place
            array = self._array(place, "documents")
            found[mine] = array[documents[mine] - self.documents_before[place], int(column == "characters")]
            found[mine] += before[place]
            release_pages(array)
        return found

    def nearest_document(self, position: int) -> int:
        """Return the number of documents that end at or before the document end nearest to a position in tokens."""
        place = int(np.clip(np.searchsorted(self.tokens_before, position, side="right") - 1, 0, len(self.parts) - 1))
        ends = self._array(place, "documents")[:, 0] + self.tokens_before[place]
        first = int(self.documents_before[place])
        low = int(np.searchsorted(ends, position))
        near = {min(max(first + k, 1), self.documents) for k in (low, low + 1)}  # as counts of documents
        return min(near, key=lambda count: abs(int(self.ends(np.array([count - 1]))[0]) - position))

    def counts(self, first: int, stop: int) -> Counts:
        """Return the number of occurrences of each code point in the shards ``first`` to ``stop``, int64 [0x110000]."""
        total = np.zeros(CODES, dtype=np.int64)
        for place in range(first, stop):
            pairs = np.array(self._array(place, "characters"))
            if len(pairs) and (
                pairs.min() < 0 or pairs[:, 0].max() >= CODES or len(np.unique(pairs[:, 0])) < len(pairs)
            ):
                raise UserError(f"{self._path(place, 'characters')}: holds no counts of characters")
            total[pairs[:, 0]] += pairs[:, 1]
        return total

    def verify(self, place: int) -> None:
        """Read one shard whole, and compare its arrays with their SHA-256 in the index.

        Raises:
            UserError: An array has another digest, or cannot be read.
        """
        for name in PARTS:
            array, found = self._array(place, name), hashlib.sha256()
            for start in range(0, max(1, len(array)), 2**22):
                found.update(np.ascontiguousarray(array[start : start + 2**22]).tobytes())
            release_pages(array)
            if found.hexdigest() != self.parts[place][2].sha256[name]:
                raise UserError(f"{self._path(place, name)} is not what was written: its SHA-256 differs from {INDEX}")

    def _path(self, place: int, name: Part) -> Path:
        folder, _, shard = self.parts[place]
        return folder / f"{shard.name}.{name}.npy"

    def _array(self, place: int, name: Part) -> npt.NDArray[Any]:
        key: tuple[int, Part] = (place, name)
        if key not in self._open:
            _, dtype, shard = self.parts[place]
            kinds = {
                "tokens": (np.dtype(dtype).newbyteorder("<").str, (shard.tokens,)),
                "documents": ("<i8", (shard.documents, 2)),
                "characters": ("<i8", (shard.alphabet, 2)),
            }
            kind, shape = kinds[name]
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            self._open[key] = map_npy(self._path(place, name), limit=MAX_SHARD, dtypes=(kind,), shape=shape)
        self._open.move_to_end(key)
        return self._open[key]


def _before(sizes: Sequence[int]) -> Ids:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
