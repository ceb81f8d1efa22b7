"""Writing of shards of tokens, one after the other, so that a killed process loses only the last, unfinished one."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic

from sedd_graph.component.strict import Strict
from sedd_graph.data.characters import CODES
from sedd_graph.data.encode import Encoded
from sedd_graph.data.shard_index import PARTS, Part, Shard
from sedd_graph.store.durable import rename
from sedd_graph.store.files import disk_faults, remove, write_json

__all__ = ["PROGRESS", "Progress", "ShardWriter"]

PROGRESS = "progress.json"
"""File name, in a folder of shards that is not finished, of what is done."""


class Progress(Strict):
    """Content of ``progress.json``: the shards that are whole, and how much of the text they hold."""

    format: Literal[1] = 1
    """Version of the format."""
    settings: dict[str, Any]
    """What the shards depend on; another command may not go on with them."""
    pieces: Annotated[int, pydantic.Field(ge=0)] = 0
    """Number of pieces of text in the shards."""
    text_sha256: str = ""
    """SHA-256 of these pieces, hexadecimal; empty before the first shard."""
    shards: list[Shard] = []
    """The shards."""


class ShardWriter:
    """Writer of the shards of a folder.

    Args:
        folder: The folder.
        progress: What is done already.
        dtype: Type of the token ids.
        size: Number of tokens at which a shard is complete.
    """

    def __init__(self, folder: Path, progress: Progress, *, dtype: Literal["uint16", "uint32"], size: int) -> None:
        self.folder, self.progress, self.size = folder, progress, size
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._begin()

    def _begin(self) -> None:
        self._tokens: list[npt.NDArray[Any]] = []
        self._ends: list[npt.NDArray[np.int64]] = []
        self._counts = np.zeros(CODES, dtype=np.int64)
        self._token_count = self._character_count = 0

    def add(self, found: Encoded) -> None:
        """Add the tokens of a batch of text."""
        self._tokens.append(found.tokens)
        self._ends.append(found.ends + np.array([self._token_count, self._character_count]))
        self._counts[found.counts[:, 0]] += found.counts[:, 1]
        self._token_count += len(found.tokens)
        self._character_count += found.characters

    @property
    def complete(self) -> bool:
        """True if the shard has the number of tokens at which it is closed."""
        return self._token_count >= self.size

    @property
    def empty(self) -> bool:
        """True if nothing has been added to the shard."""
        return not self._tokens

    def close(self, pieces: int, text_sha256: str) -> None:
        """Write the shard to the disk, then record it as done.

        Args:
            pieces: Number of pieces of text in all shards.
            text_sha256: SHA-256 of these pieces, hexadecimal.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
        """
        name = f"{len(self.progress.shards):05d}"
        alphabet = np.flatnonzero(self._counts)
        ends = np.concatenate(self._ends)
        arrays: dict[Part, tuple[tuple[int, ...], Any, list[npt.NDArray[Any]]]] = {
            "tokens": ((self._token_count,), self._dtype, self._tokens),
            "documents": (ends.shape, np.dtype("<i8"), [ends]),
            "characters": ((len(alphabet), 2), np.dtype("<i8"), [np.stack([alphabet, self._counts[alphabet]], 1)]),
        }
        hashes: dict[Part, str] = {part: _write(self.folder / f"{name}.{part}.npy", *arrays[part]) for part in PARTS}
        shard = Shard(
            name=name,
            tokens=self._token_count,
            documents=len(ends),
            characters=self._character_count,
            alphabet=len(alphabet),
            sha256=hashes,
        )
        self.progress = self.progress.model_copy(
            update={"pieces": pieces, "text_sha256": text_sha256, "shards": [*self.progress.shards, shard]}
        )
        write_json(self.folder / PROGRESS, self.progress.model_dump(mode="json"))
        self._begin()


def _write(path: Path, shape: tuple[int, ...], dtype: Any, parts: list[npt.NDArray[Any]]) -> str:
    """Write a ``.npy`` file atomically and durably; return the SHA-256 of its data, hexadecimal."""
    head, found = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    temporary = path.with_name(f".{path.name}.part")
    with disk_faults(path.name, path.parent):
        try:
            with temporary.open("wb") as stream:
                stream.write(head.getvalue())
                for part in parts:
                    data = np.ascontiguousarray(part, dtype=dtype).tobytes()
                    found.update(data)
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            rename(temporary, path)
        finally:
            remove(temporary)
    return found.hexdigest()
