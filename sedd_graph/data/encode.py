"""Tokenising of text in several processes, in the order of the text. Imports no torch."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.data.characters import code_points
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.errors import EnvironmentFault

__all__ = ["Batch", "Encoded", "encode", "encoded"]

MAX_PIECES = 2**14
"""Largest number of pieces of a batch."""

Batch = list[tuple[str, bool]]
"""Type of consecutive pieces of text, each with whether it is the last of its document."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive pieces of text, with the separators after documents."""

    tokens: npt.NDArray[Any]
    """Token ids, uint16 or uint32 [tokens]."""
    ends: npt.NDArray[np.int64]
    """Where documents end, int64 [documents, 2]: tokens and characters from the start of the batch."""
    characters: int
    """Number of characters."""
    counts: npt.NDArray[np.int64]
    """Code points and the number of times that each occurs, int64 [code points, 2]."""


def encode(tokenizer: Tokenizer, batch: Batch, separator: Sequence[int]) -> Encoded:
    """Tokenise pieces of text.

    Args:
        tokenizer: The tokenizer.
        batch: The pieces.
        separator: Tokens after each document.
    """
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    between = np.array(separator, dtype)
    parts = [np.zeros(0, dtype)]
    ends, tokens, characters = [], 0, 0
    for (text, last), found in zip(batch, tokenizer.encode_many([text for text, _ in batch]), strict=True):
        parts.append(found.astype(dtype))
        tokens, characters = tokens + len(found), characters + len(text)
        if last:
            parts.append(between)
            tokens += len(between)
            ends.append((tokens, characters))
    occurring = np.bincount(code_points("".join(text for text, _ in batch)))
    codes = np.flatnonzero(occurring)
    counts = np.stack([codes, occurring[codes]], axis=1).astype(np.int64)
    return Encoded(np.concatenate(parts), np.array(ends, np.int64).reshape(-1, 2), characters, counts)


def encoded(
    pieces: Iterator[tuple[str, bool]],
    tokenizer: Tokenizer,
    *,
    path: str,
    separator: Sequence[int],
    size: int,
    processes: int,
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield pieces of text with their tokens, in order, in batches.

    Args:
        pieces: The pieces, each with whether it is the last of its document.
        tokenizer: The tokenizer.
        path: File of the tokenizer, from which other processes load it.
        separator: Tokens after each document.
        size: Number of characters, about, of a batch.
        processes: Number of processes that tokenise; 1 for this one alone.

    Raises:
        EnvironmentFault: A process ended.
    """
    batches = _batches(pieces, size)
    if processes == 1:
        yield from ((batch, encode(tokenizer, batch, separator)) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    start = (path, separator)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=start) as pool:
        waiting = deque[tuple[Batch, Future[Encoded]]]()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, batch)))
                if len(waiting) > 2 * processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise EnvironmentFault("a process that tokenises was ended, perhaps for want of memory") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(pieces: Iterator[tuple[str, bool]], size: int) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for text, last in pieces:
        batch.append((text, last))
        characters += len(text)
        if characters >= size or len(batch) >= MAX_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclasses.dataclass
class _Worker:
    """What a process that tokenises holds."""

    tokenizer: Tokenizer
    separator: Sequence[int]


_worker: _Worker


def _start(path: str, separator: Sequence[int]) -> None:
    """Load the tokenizer in a new process, which ends with the process that started it, however that ends."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(load_tokenizer(path), separator)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> Encoded:
    return encode(_worker.tokenizer, batch, _worker.separator)
