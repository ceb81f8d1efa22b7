"""Joining and parting values: add, sub, mean, scale, split, concat, permute. No parameters.

How they are undone: add, sub, mean and scale are linear relations, which the solver solves alone or together; split,
concat and permute only move numbers, so that each can be undone and changes no volume.
"""

import functools
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import pydantic
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sedd_graph.component.axes import parse_port_type
from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import Algebra, Port, Rule, Signature, SizeField

Pattern = Annotated[str, pydantic.Field(max_length=128)]


class Add(Component, kind="arithmetic"):
    """The sum of any number of values of one shape."""

    positionwise = True

    class Config(ComponentConfig):
        pass

    def forward(self, *xs: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"xs": Fraction(1)}})


class Sub(Component, kind="arithmetic"):
    """One value less another of the same shape."""

    positionwise = True

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "*s"], y: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x - y

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(1), "y": Fraction(-1)}})


class Mean(Component, kind="arithmetic"):
    """The mean of any number of values of one shape."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def signature(cls, config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        shape = parse_port_type("float *s")
        count = max(arity.values(), default=1)
        return Signature(tuple(Port(f"x{i}", shape) for i in range(count)), (Port("out", shape),))

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total / len(xs)

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        share = Fraction(1, len(signature.inputs))
        return Algebra(linear={"out": {port.name: share for port in signature.inputs}})


class Scale(Component, kind="arithmetic"):
    """A value times the constant ``by``. With 0, what stands behind it sees nothing of it (MDLM without time)."""

    positionwise = True

    class Config(ComponentConfig):
        by: float

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x * self.config.by

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        by: float = config.by  # type: ignore[attr-defined]
        return Algebra(linear={"out": {"x": Fraction(by)}})


@functools.lru_cache(maxsize=256)
def _star(pattern: str) -> tuple[tuple[str, ...], int]:
    """``b l *`` as names and the place of the star, which is the axis that is joined or parted (einops.pack's form)."""
    names = tuple(pattern.split())
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

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        names = tuple(port.name for port in signature.inputs)
        bounds = {(name, "out"): 1.0 for name in names}
        at = _star(config.pattern)[1]  # type: ignore[attr-defined]
        if any(port.type.dims[at].size.constant is None for port in signature.inputs):
            return Algebra(lipschitz=bounds, moves=True)  # where it is to be parted is not known before a step runs
        rule = Rule(names, ("out",), "part", cost=0.0)
        return Algebra((rule,), lipschitz=bounds, log_det={names: "zero"}, moves=True)

    def part(self, out: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.axis(f"s{i}") for i in range(len(self.context.connected))]
        return torch.split_with_sizes(out, sizes, _star(self.config.pattern)[1])


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
        return torch.split_with_sizes(x, self.config.sizes, _star(self.config.pattern)[1])

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        names = tuple(port.name for port in signature.outputs)
        return Algebra(
            rules=(Rule("x", names, "join", cost=0.0),),
            lipschitz={("x", name): 1.0 for name in names},
            log_det={"x": "zero"},
            moves=True,
        )

    def join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=_star(self.config.pattern)[1])


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

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        rule = Rule("x", ("out",), "back", cost=0.0)
        return Algebra(rules=(rule,), lipschitz={("x", "out"): 1.0}, log_det={"x": "zero"}, moves=True)

    def back(self, out: Tensor) -> Tensor:
        left, _, right = self.config.pattern.partition("->")
        x: Tensor = rearrange(out, f"{right} -> {left}")
        return x
