"""Network evaluation for block diffusion sampling, with and without a KV cache of the finished blocks.

A denoiser is a function that evaluates the network on the noisy tokens of one block
(:class:`sedd_graph.diffusion.tokens.walk_settings.Denoise`). Axes: b batch, m positions of the finished blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.kv_cache import KVCache
from sedd_graph.diffusion.numerics import autocast_now
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise
from sedd_graph.engine.regions import Model
from sedd_graph.engine.split import Split, begin

__all__ = ["Cached", "cached", "uncached"]


def uncached(model: Model, block: int, written: Tensor, *, parts: Split | None = None) -> StagedDenoise:
    """Return a function that evaluates the network on the block after the finished ones, without a KV cache.

    Each call of the function evaluates the finished blocks again.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        written: Tokens of the finished blocks, int64 [b, m].
        parts: The network as a trunk and a position-wise end, which is evaluated where outputs are read. None: the network is
            evaluated whole.

    Returns:
        The function, see :class:`sedd_graph.diffusion.tokens.walk_settings.Denoise`.
    """

    autocast = autocast_now(written.device)

    def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
        inputs = block_inputs(x, written[rows], block=block, noised_from=written.shape[1])
        with autocast():
            return begin(model, parts, inputs)[0].under(autocast)

    return StagedDenoise(first)


class Cached:
    """Counterpart of :func:`uncached` with a KV cache: the network evaluates each finished token only once.

    Created by :func:`cached`. A call with the tokens of the finished blocks returns the function that evaluates the
    network on the next block.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        caches: KV caches that are installed in the components of ``model``, one in each.
        parts: The network as a trunk and a position-wise end, which is evaluated where outputs are read. None: the network is
            evaluated whole.
    """

    def __init__(self, model: Model, block: int, caches: list[KVCache], parts: Split | None) -> None:
        self._model, self._block, self._caches, self._parts, self._done = model, block, caches, parts, 0

    def __call__(self, written: Tensor) -> StagedDenoise:
        """Add the newly finished blocks to the KV cache, and return the function that evaluates the next block.

        Args:
            written: Tokens of all finished blocks, int64 [b, m]. They begin with those of the previous call.

        Returns:
            The function, see :class:`sedd_graph.diffusion.tokens.walk_settings.Denoise`.
        """
        if written.shape[1] > self._done:
            new = written[:, self._done :]
            self._run(block_inputs(new[:, :0], new, block=self._block, clean_from=self._done), None)
            for cache in self._caches:
                cache.keep()
            self._done = written.shape[1]

        autocast = autocast_now(written.device)

        def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
            inputs = block_inputs(x, x[:, :0], block=self._block, noised_from=self._done, clean_from=self._done)
            with autocast():
                return self._run(inputs, None if len(rows) == len(written) else rows).under(autocast)

        return StagedDenoise(first)

    def _run(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Stage:
        for cache in self._caches:
            cache.rows = rows
        return begin(self._model, self._parts, inputs)[0]


@contextlib.contextmanager
def cached(model: Model, block: int, *, rows: int, length: int, parts: Split | None = None) -> Iterator[Cached]:
    """Context manager that installs a KV cache in every component of ``model``, and removes the caches on exit.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        rows: Number of rows of the batch, b.
        length: Largest number of positions that a cache stores per row, finished blocks and the current one together.
        parts: The network as a trunk and a position-wise end, which is evaluated where outputs are read. None: the network is
            evaluated whole.

    Yields:
        The :class:`Cached`, which returns a function for each block in turn.
    """
    components = [m for m in model.modules() if isinstance(m, Component)]
    for component in components:
        component.kv_cache = KVCache(rows, length)
    try:
        yield Cached(model, block, [c.kv_cache for c in components if c.kv_cache is not None], parts)
    finally:
        for component in components:
            component.kv_cache = None
