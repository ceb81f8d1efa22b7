"""Network evaluation for block diffusion sampling, with and without a KV cache of the finished blocks.

A denoiser is a function that evaluates the network on the noisy tokens of one block
(:class:`sedd_graph.diffusion.tokens.walk.Denoise`). Axes: b batch, m positions of the finished blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.kv_cache import KVCache
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.walk import Denoise
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix, take
from sedd_graph.engine.regions import Model

__all__ = ["Cached", "cached", "uncached"]


def _outputs(
    model: Model, suffix: PositionwiseSuffix | None, inputs: Mapping[str, Tensor], at: Tensor | None
) -> dict[str, Tensor]:
    """Return the outputs by name, at positions ``at`` if given; ``suffix`` then evaluates its nodes only there."""
    if at is not None and suffix is not None:
        return suffix.run(model, inputs, at)
    outputs = model.run(inputs)[0]
    return outputs if at is None else {name: take(value, at, 1) for name, value in outputs.items()}


def uncached(model: Model, block: int, written: Tensor, *, suffix: PositionwiseSuffix | None = None) -> Denoise:
    """Return a function that evaluates the network on the block after the finished ones, without a KV cache.

    Each call of the function evaluates the finished blocks again.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        written: Tokens of the finished blocks, int64 [b, m].
        suffix: Last nodes of the network, evaluated only at the positions that a call selects (``at``). None: each call
            evaluates the network at all positions.

    Returns:
        The function ``denoise(x, t, rows, at)``, see :class:`sedd_graph.diffusion.tokens.walk.Denoise`.
    """

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        inputs = block_inputs(x, written[rows], block=block, noised_from=written.shape[1])
        return _outputs(model, suffix, inputs, at)

    return denoise


class Cached:
    """Counterpart of :func:`uncached` with a KV cache: the network evaluates each finished token only once.

    Created by :func:`cached`. A call with the tokens of the finished blocks returns the function that evaluates the
    network on the next block.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        caches: KV caches that are installed in the components of ``model``, one in each.
        suffix: Last nodes of the network, evaluated only at the positions that a call selects (``at``). None: each call
            evaluates the network at all positions.
    """

    def __init__(self, model: Model, block: int, caches: list[KVCache], suffix: PositionwiseSuffix | None) -> None:
        self._model, self._block, self._caches, self._suffix, self._done = model, block, caches, suffix, 0

    def __call__(self, written: Tensor) -> Denoise:
        """Add the newly finished blocks to the KV cache, and return the function that evaluates the next block.

        Args:
            written: Tokens of all finished blocks, int64 [b, m]. They begin with those of the previous call.

        Returns:
            The function ``denoise(x, t, rows, at)``, see :class:`sedd_graph.diffusion.tokens.walk.Denoise`.
        """
        if written.shape[1] > self._done:
            new = written[:, self._done :]
            self._run(block_inputs(new[:, :0], new, block=self._block, clean_from=self._done), None)
            for cache in self._caches:
                cache.keep()
            self._done = written.shape[1]

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            inputs = block_inputs(x, x[:, :0], block=self._block, noised_from=self._done, clean_from=self._done)
            return self._run(inputs, None if len(rows) == len(written) else rows, at)

        return denoise

    def _run(self, inputs: Mapping[str, Tensor], rows: Tensor | None, at: Tensor | None = None) -> Mapping[str, Tensor]:
        for cache in self._caches:
            cache.rows = rows
        return _outputs(self._model, self._suffix, inputs, at)


@contextlib.contextmanager
def cached(
    model: Model, block: int, *, rows: int, length: int, suffix: PositionwiseSuffix | None = None
) -> Iterator[Cached]:
    """Context manager that installs a KV cache in every component of ``model``, and removes the caches on exit.

    Args:
        model: Network for block diffusion, which reads noisy and clean tokens
            (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`).
        block: Positions per block.
        rows: Number of rows of the batch, b.
        length: Largest number of positions that a cache stores per row, finished blocks and the current one together.
        suffix: Last nodes of the network, evaluated only at the positions that a call selects (``at``). None: each call
            evaluates the network at all positions.

    Yields:
        The :class:`Cached`, which returns a function for each block in turn.
    """
    components = [m for m in model.modules() if isinstance(m, Component)]
    for component in components:
        component.kv_cache = KVCache(rows, length)
    try:
        yield Cached(model, block, [c.kv_cache for c in components if c.kv_cache is not None], suffix)
    finally:
        for component in components:
            component.kv_cache = None
