"""Moving numbers without changing them: parts of the sequence, and orders of positions and of channels.

All are permutations: they undo exactly and change no volume. Axes: b batch, l length, h half of it, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sedd_graph.component.axes import parse_port_type
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Port, Signature

from ._bijection import Isometry

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]


class _Sequence(Component):
    """What parting and joining a sequence have in common."""

    abstract = True

    class Config(ComponentConfig):
        mode: Literal["halves", "interleave"] = "halves"
        """``halves``: first and second half; ``interleave``: positions 0, 2, 4, ... and 1, 3, 5, ..."""
        of: Literal["values", "mask"] = "values"
        """``mask`` parts or joins a ``bool b l``, for the sub-blocks that work on the parts."""

    @classmethod
    def _ports(cls, config: ComponentConfig) -> tuple[Port, Port, Port]:
        of: str = config.of  # type: ignore[attr-defined]
        whole, part = ("float b 2*h d", "float b h d") if of == "values" else ("bool b 2*h", "bool b h")
        return (
            Port("whole", parse_port_type(whole)),
            Port("x0", parse_port_type(part)),
            Port("x1", parse_port_type(part)),
        )

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        pairs = [(i.name, o.name) for i in signature.inputs for o in signature.outputs if o.type.kind == "float"]
        return dataclasses.replace(super().algebra(config, signature), lipschitz=dict.fromkeys(pairs, 1.0), moves=True)

    def _part(self, x: Tensor) -> tuple[Tensor, Tensor]:
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
    """Parts a sequence of even length into two of half of it: ``x0`` and ``x1``.

    The blueprint must say that the length is even: ``axes: {h: length, l: 2*h}``.
    """

    outputs = ("x0", "x1")

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        whole, x0, x1 = cls._ports(config)
        return Signature((Port("x", whole.type),), (x0, x1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._part(x)

    @solves("x", given=("x0", "x1"), log_det="zero")
    def undo(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self._join(x0, x1)


class JoinSequence(_Sequence, kind="arithmetic"):
    """Joins two sequences of equal length into one: undoes ``split_sequence``."""

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        whole, x0, x1 = cls._ports(config)
        return Signature((x0, x1), (Port("out", whole.type),))

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self._join(x0, x1)

    @solves(("x0", "x1"), given=("out",), log_det="zero")
    def undo(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return self._part(out)


def _reordered(x: Tensor, attend: Tensor, taken: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``x`` [b, l, d] with the attended positions of each row permuted among themselves.

    ``taken(rank, count)`` int64 [b, l] says from which of a row's ``count`` [b, 1] attended positions number ``rank`` is
    taken.
    """
    order = torch.argsort((~attend).to(torch.uint8), dim=1, stable=True)  # attended positions first, in their order
    rank = torch.arange(x.shape[1], device=x.device).expand_as(order)
    count = attend.sum(1, keepdim=True)
    source = torch.where(rank < count, taken(rank, count), rank)
    index = torch.zeros_like(order).scatter(1, order, order.gather(1, source))
    return x.gather(1, index[..., None].expand_as(x))


class _Reordering(Isometry):
    """Puts the numbers of ``x`` into another order."""

    abstract = True

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), moves=True)


class Reverse(_Reordering, kind="mixer"):
    """The sequence from its end to its start; the attended positions where ``attend`` is connected."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return (
            x.flip(1) if attend is None else _reordered(x, attend, lambda rank, count: (count - 1 - rank).clamp(min=0))
        )

    @solves("x", given=("out", "attend"), log_det="zero")
    def undo(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self.forward(out, attend)


class Roll(_Reordering, kind="mixer"):
    """The sequence moved ``by`` positions to the right, around its end; the attended positions where ``attend`` is connected."""

    class Config(ComponentConfig):
        by: Annotated[int, pydantic.Field(gt=-(2**31), lt=2**31)] = 1

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._roll(x, self.config.by, attend)

    @solves("x", given=("out", "attend"), log_det="zero")
    def undo(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self._roll(out, -self.config.by, attend)

    @staticmethod
    def _roll(x: Tensor, by: int, attend: Tensor | None) -> Tensor:
        if attend is None:
            return x.roll(by, 1)
        return _reordered(x, attend, lambda rank, count: (rank - by) % count.clamp(min=1))


class Shuffle(_Reordering, kind="mixer"):
    """A fixed permutation of the channels, drawn from ``seed``."""

    class Config(ComponentConfig):
        seed: Seed = 0

    order: Tensor
    back: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        # numpy promises that this generator's stream never changes (NEP 19); torch promises nothing of the kind
        order = np.random.RandomState(self.config.seed).permutation(self.axis("d"))
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.register_buffer("back", torch.from_numpy(np.argsort(order)), persistent=False)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x.index_select(-1, self.order)

    @solves("x", given=("out",), log_det="zero")
    def undo(self, out: Tensor) -> Tensor:
        return out.index_select(-1, self.back)
