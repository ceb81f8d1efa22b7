"""Rows of the next micro-batch, which a thread prepares while the current one is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["Prefetcher"]

Key = tuple[int, int]


class Prefetcher:
    """Thread that prepares rows one micro-batch ahead. Rows are a pure function of the step and the micro-batch.

    Args:
        make: Function of the step and the number of the micro-batch that returns a dataclass of NumPy arrays.
        pinned: Whether arrays become tensors in page-locked memory, from which a GPU copies without the host waiting.
    """

    def __init__(self, make: Callable[[int, int], Any], *, pinned: bool) -> None:
        self._make, self._pinned = make, pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._next: tuple[Key, Future[Any]] | None = None

    def take(self, key: Key, following: Key | None) -> Any:
        """Return the rows of a micro-batch, and begin to prepare those that follow.

        Args:
            key: Step and number of the micro-batch.
            following: Those of the micro-batch after it; None if there is none.
        """
        ready, self._next = self._next, None
        rows = ready[1].result() if ready is not None and ready[0] == key else self._prepare(key)
        if following is not None:
            self._next = following, self._pool.submit(self._prepare, following)
        return rows

    def _prepare(self, key: Key) -> Any:
        rows = self._make(*key)
        if not self._pinned:
            return rows
        arrays = {f.name: torch.from_numpy(getattr(rows, f.name)).pin_memory() for f in dataclasses.fields(rows)}
        return dataclasses.replace(rows, **arrays)

    def close(self) -> None:
        """End the thread, without waiting for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
