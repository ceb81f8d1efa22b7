"""The network of a block model while text is written: what is finished is looked at once, and remembered.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.kv_cache import Memory
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.sampler import Denoise
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix, take
from sedd_graph.engine.regions import Model

__all__ = ["afresh", "remembering"]


def _said(
    model: Model, ending: PositionwiseSuffix | None, inputs: Mapping[str, Tensor], at: Tensor | None
) -> dict[str, Tensor]:
    """The network's outputs, at some positions alone where they are given; its ``ending`` spares it the others."""
    if at is not None and ending is not None:
        return ending.run(model, inputs, at)
    outputs = model.run(inputs)[0]
    return outputs if at is None else {name: take(value, at, 1) for name, value in outputs.items()}


def afresh(model: Model, block: int, written: Tensor, *, ending: PositionwiseSuffix | None = None) -> Denoise:
    """What asks the network about the block after ``written`` int64 [b, m], looking at all of it every time."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        inputs = block_inputs(x, written[rows], block=block, noised_from=written.shape[1])
        return _said(model, ending, inputs, at)

    return denoise


class Remembered:
    """The same, but that each written token goes through the network once: its keys and values are kept."""

    def __init__(self, model: Model, block: int, memories: list[Memory], ending: PositionwiseSuffix | None) -> None:
        self._model, self._block, self._memories, self._ending, self._done = model, block, memories, ending, 0

    def __call__(self, written: Tensor) -> Denoise:
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
        return _said(self._model, self._ending, inputs, at)


@contextlib.contextmanager
def remembering(
    model: Model, block: int, *, rows: int, length: int, ending: PositionwiseSuffix | None = None
) -> Iterator[Remembered]:
    """Give the network's components memories of ``rows`` rows of up to ``length`` positions, and take them away at the end."""
    components = [m for m in model.modules() if isinstance(m, Component)]
    for component in components:
        component.memory = Memory(rows, length)
    try:
        yield Remembered(model, block, [c.memory for c in components if c.memory is not None], ending)
    finally:
        for component in components:
            component.memory = None
