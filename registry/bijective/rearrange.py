"""Bijections that only move values: permutations of positions or channels, and splitting a sequence into two halves.

Each has an exact inverse and log-determinant zero. Axes: b batch, l length, h half the length, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Port, Signature

from ._bijection import Isometry


class _Sequence(Component):
    """Base class of ``split_sequence`` and ``join_sequence``."""

    abstract = True

    class Config(ComponentConfig):
        mode: Literal["halves", "interleave"] = "halves"
        """Positions of the halves. ``halves``: the first and the second half; ``interleave``: positions 0, 2, 4, ...
        and 1, 3, 5, ..."""
        of: Literal["values", "mask"] = "values"
        """Type of the sequence. ``values``: ``float b l d``; ``mask``: ``bool b l``, for splitting an attention mask
        in the same way."""

    config: Config

    @classmethod
    def _types(cls, config: Config) -> tuple[PortType, PortType]:
        """Return the types of the whole sequence and of a half."""
        whole, half = ("float b 2*h d", "float b h d") if config.of == "values" else ("bool b 2*h", "bool b h")
        return parse_port_type(whole), parse_port_type(half)

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        pairs = [(i.name, o.name) for i in signature.inputs for o in signature.outputs if o.type.kind == "float"]
        return dataclasses.replace(super().algebra(config, signature), lipschitz=dict.fromkeys(pairs, 1.0), moves=True)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] % 2:
            raise ValueError(f"a sequence of {x.shape[1]} has no two equal parts: its length must be even")
        if self.config.mode == "interleave":
            return x[:, 0::2], x[:, 1::2]
        first, second = x.chunk(2, dim=1)
        return first, second

    def _join(self, x0: Tensor, x1: Tensor) -> Tensor:
        if self.config.mode == "interleave":
            return torch.stack([x0, x1], dim=2).flatten(1, 2)
        return torch.cat([x0, x1], dim=1)


class SplitSequence(_Sequence, kind="arithmetic"):
    """Split of a sequence of even length into two halves, the outputs ``x0`` and ``x1``.

    The blueprint must declare that the length is even: ``axes: {h: length, l: 2*h}``.

    Raises:
        ValueError: In ``forward``, the length is odd.
    """

    outputs = ("x0", "x1")

    @classmethod
    def signature(cls, config: _Sequence.Config, arity: Mapping[str, int]) -> Signature:
        whole, half = cls._types(config)
        return Signature((Port("x", whole),), (Port("x0", half), Port("x1", half)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(x)

    @solves("x", given=("x0", "x1"), log_det="zero")
    def inverse(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self._join(x0, x1)


class JoinSequence(_Sequence, kind="arithmetic"):
    """Joining of two sequences of equal length into one, the inverse of ``split_sequence``."""

    @classmethod
    def signature(cls, config: _Sequence.Config, arity: Mapping[str, int]) -> Signature:
        whole, half = cls._types(config)
        return Signature((Port("x0", half), Port("x1", half)), (Port("out", whole),))

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self._join(x0, x1)

    @solves(("x0", "x1"), given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(out)


def _reordered(x: Tensor, attend: Tensor, source: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return ``x`` [b, l, d] with the attended positions of each row permuted among themselves.

    Args:
        x: Values, [b, l, d].
        attend: [b, l], true at the positions to permute.
        source: Function that defines the permutation. Arguments: rank of each attended position among those of its row,
            int64 [b, l], and number of attended positions per row, int64 [b, 1]. Returns the rank of the position from
            which the value is taken, int64 [b, l].
    """
    order = torch.argsort((~attend).to(torch.uint8), dim=1, stable=True)  # attended positions first, in their order
    rank = torch.arange(x.shape[1], device=x.device).expand_as(order)
    count = attend.sum(1, keepdim=True)
    taken = torch.where(rank < count, source(rank, count), rank)
    index = torch.zeros_like(order).scatter(1, order, order.gather(1, taken))
    return x.gather(1, index[..., None].expand_as(x))


class Reverse(Isometry, kind="mixer"):
    """Reversal of the sequence, or of its attended positions if ``attend`` is connected."""

    moves = True

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        if attend is None:
            return x.flip(1)
        return _reordered(x, attend, lambda rank, count: (count - 1 - rank).clamp(min=0))

    @solves("x", given=("out", "attend"), log_det="zero")
    def inverse(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self.forward(out, attend)


class Roll(Isometry, kind="mixer"):
    """Cyclic shift of the sequence, or of its attended positions if ``attend`` is connected."""

    moves = True

    class Config(ComponentConfig):
        by: Annotated[int, pydantic.Field(gt=-(2**31), lt=2**31)] = 1
        """Number of positions to shift to the right; a negative number shifts to the left."""

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._roll(x, self.config.by, attend)

    @solves("x", given=("out", "attend"), log_det="zero")
    def inverse(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self._roll(out, -self.config.by, attend)

    @staticmethod
    def _roll(x: Tensor, by: int, attend: Tensor | None) -> Tensor:
        if attend is None:
            return x.roll(by, 1)
        return _reordered(x, attend, lambda rank, count: (rank - by) % count.clamp(min=1))


class Shuffle(Isometry, kind="mixer"):
    """Fixed random permutation of the channels."""

    moves = True

    class Config(ComponentConfig):
        seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0
        """Seed of the permutation; the result is the same on every machine and with every version of numpy and
        torch."""

    config: Config
    order: Tensor
    back: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        # numpy guarantees this generator's stream (NEP 19); torch makes no such promise
        order = np.random.RandomState(self.config.seed).permutation(self.axis("d"))
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.register_buffer("back", torch.from_numpy(np.argsort(order)), persistent=False)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x.index_select(-1, self.order)

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return out.index_select(-1, self.back)
