"""Evaluation of a block diffusion network during sampling, with a KV cache of the finished blocks.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.kv_cache import Memory
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.walk import Denoise
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix, take
from sedd_graph.engine.regions import Model

__all__ = ["Cached", "cached", "uncached"]


def _outputs(
    model: Model, suffix: PositionwiseSuffix | None, inputs: Mapping[str, Tensor], at: Tensor | None
) -> dict[str, Tensor]:
    """Return the outputs, only at positions ``at`` where they are given; with ``suffix`` no others are computed there."""
    if at is not None and suffix is not None:
        return suffix.run(model, inputs, at)
    outputs = model.run(inputs)[0]
    return outputs if at is None else {name: take(value, at, 1) for name, value in outputs.items()}


def uncached(model: Model, block: int, written: Tensor, *, suffix: PositionwiseSuffix | None = None) -> Denoise:
    """Return the denoiser of the block after ``written`` int64 [b, m]; every call evaluates the whole text."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        inputs = block_inputs(x, written[rows], block=block, noised_from=written.shape[1])
        return _outputs(model, suffix, inputs, at)

    return denoise


class Cached:
    """Source of denoisers like :func:`uncached`; each finished token is evaluated once, its keys and values are cached."""

    def __init__(self, model: Model, block: int, memories: list[Memory], suffix: PositionwiseSuffix | None) -> None:
        self._model, self._block, self._memories, self._suffix, self._done = model, block, memories, suffix, 0

    def __call__(self, written: Tensor) -> Denoise:
        """Return the denoiser of the block after ``written`` int64 [b, m]."""
        if written.shape[1] > self._done:
            new = written[:, self._done :]
            self._run(block_inputs(new[:, :0], new, block=self._block, clean_from=self._done), None)
            for memory in self._memories:
                memory.keep()
            self._done = written.shape[1]

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            inputs = block_inputs(x, x[:, :0], block=self._block, noised_from=self._done, clean_from=self._done)
            return self._run(inputs, None if len(rows) == len(written) else rows, at)

        return denoise

    def _run(self, inputs: Mapping[str, Tensor], rows: Tensor | None, at: Tensor | None = None) -> Mapping[str, Tensor]:
        for memory in self._memories:
            memory.rows = rows
        return _outputs(self._model, self._suffix, inputs, at)


@contextlib.contextmanager
def cached(
    model: Model, block: int, *, rows: int, length: int, suffix: PositionwiseSuffix | None = None
) -> Iterator[Cached]:
    """Install KV caches of ``rows`` rows of up to ``length`` positions in all components, for the duration of the context."""
    components = [m for m in model.modules() if isinstance(m, Component)]
    for component in components:
        component.memory = Memory(rows, length)
    try:
        yield Cached(model, block, [c.memory for c in components if c.memory is not None], suffix)
    finally:
        for component in components:
            component.memory = None
