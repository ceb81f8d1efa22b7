"""Joining and parting values: add, mean, scale, split, concat, permute. No parameters."""

import re
from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sedd_graph.axes import parse_port_type
from sedd_graph.component import Component, ComponentConfig
from sedd_graph.contract import Port, Signature, SizeField

Pattern = Annotated[str, pydantic.Field(max_length=128)]


class Add(Component, kind="arithmetic"):
    """The sum of any number of values of one shape."""

    class Config(ComponentConfig):
        pass

    def forward(self, *xs: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total


class Mean(Add):
    """The mean of any number of values of one shape."""

    def forward(self, *xs: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return super().forward(*xs) / len(xs)


class Scale(Component, kind="arithmetic"):
    """A value times the constant ``by``. With 0, what stands behind it sees nothing of it (MDLM without time)."""

    class Config(ComponentConfig):
        by: float

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x * self.config.by


def _star(pattern: str) -> tuple[list[str], int]:
    """``b l *`` as names and the place of the star, which is the axis that is joined or parted (einops.pack's form)."""
    names = pattern.split()
    if names.count("*") != 1 or not all(n == "*" or re.fullmatch("[a-z][a-z0-9_]*", n) for n in names):
        raise ValueError(f"pattern {pattern!r}: axis names and one '*' for the axis in question, such as 'b l *'")
    return names, names.index("*")


class Concat(Component, kind="arithmetic"):
    """Joins values along the starred axis of ``pattern``, such as ``b l *``."""

    class Config(ComponentConfig):
        pattern: Pattern = "b l *"

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        names, at = _star(config.pattern)  # type: ignore[attr-defined]
        count = max(arity.values(), default=0)

        def typed(star: str) -> str:
            return " ".join(["float", *(star if i == at else n for i, n in enumerate(names))])

        inputs = tuple(Port(f"x{i}", parse_port_type(typed(f"s{i}"))) for i in range(count))
        total = parse_port_type(typed("+".join(f"s{i}" for i in range(count)) or "1"))
        return Signature(inputs, (Port("out", total),))

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, dim=_star(self.config.pattern)[1])


class Split(Component, kind="arithmetic"):
    """Parts a value along the starred axis of ``pattern`` into ``sizes``; outputs ``x0``, ``x1``, ..."""

    class Config(ComponentConfig):
        sizes: Annotated[tuple[SizeField, ...], pydantic.Field(min_length=2, max_length=64)]
        pattern: Pattern = "b l *"

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        names, at = _star(config.pattern)  # type: ignore[attr-defined]
        sizes = config.sizes  # type: ignore[attr-defined]

        def typed(star: int) -> str:
            return " ".join(["float", *(str(star) if i == at else n for i, n in enumerate(names))])

        outputs = tuple(Port(f"x{i}", parse_port_type(typed(s))) for i, s in enumerate(sizes))
        return Signature((Port("x", parse_port_type(typed(sum(sizes)))),), outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.config.sizes), dim=_star(self.config.pattern)[1])


class Permute(Component, kind="arithmetic"):
    """Reorders axes by an einops pattern without parentheses, such as ``b l d -> b d l``."""

    class Config(ComponentConfig):
        pattern: Pattern

        @pydantic.field_validator("pattern")
        @classmethod
        def _permutation(cls, pattern: str) -> str:
            left, arrow, right = (part.strip() for part in pattern.partition("->"))
            names = left.split()
            good = arrow and names and all(re.fullmatch("[a-z][a-z0-9_]*", n) for n in names)
            if not good or len(set(names)) < len(names) or sorted(names) != sorted(right.split()):
                raise ValueError(f"{pattern!r}: the same axes on both sides, such as 'b l d -> b d l'")
            return pattern

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        left, _, right = config.pattern.partition("->")  # type: ignore[attr-defined]
        return Signature(
            (Port("x", parse_port_type(f"float {left}")),), (Port("out", parse_port_type(f"float {right}")),)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rearrange(x, self.config.pattern)
        return out
