"""Sums, differences, means and scaling of values; splitting, concatenating and permuting their axes. No parameters.

``add``, ``sub``, ``mean`` and ``scale`` declare linear equations, which the inverse solver solves singly or as a
system. ``split``, ``concat`` and ``permute`` only move values, with an exact inverse and log-determinant zero.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import pydantic
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import Algebra, Port, Rule, Signature, SizeField

_AXIS = re.compile("[a-z][a-z0-9_]*")


def _starred(pattern: str) -> str:
    names = pattern.split()
    if names.count("*") != 1 or not all(n == "*" or _AXIS.fullmatch(n) for n in names):
        raise ValueError(f"pattern {pattern!r}: axis names and one '*' for the axis in question, such as 'b l *'")
    return pattern


Text = Annotated[str, pydantic.Field(max_length=128)]
Starred = Annotated[Text, pydantic.AfterValidator(_starred)]


def _dim(pattern: str) -> int:
    """Return the index of the axis marked ``*`` in ``pattern``."""
    return pattern.split().index("*")


def _port_type(pattern: str, size: str) -> PortType:
    """Return the type of a value whose axis marked ``*`` has size ``size``."""
    return parse_port_type(f"float {pattern.replace('*', size)}")


class Add(Component, kind="arithmetic"):
    """Sum of any number of values of one shape."""

    positionwise = True

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, *xs: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return sum(xs[1:], xs[0])

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"xs": Fraction(1)}})


class Sub(Component, kind="arithmetic"):
    """Difference ``x - y`` of two values of one shape."""

    positionwise = True

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, x: Float[Tensor, "*s"], y: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x - y

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(1), "y": Fraction(-1)}})


class Mean(Component, kind="arithmetic"):
    """Mean of any number of values of one shape."""

    class Config(ComponentConfig):
        pass

    config: Config

    @classmethod
    def signature(cls, config: Config, arity: Mapping[str, int]) -> Signature:
        shape = parse_port_type("float *s")
        count = max(arity.values(), default=1)
        return Signature(tuple(Port(f"x{i}", shape) for i in range(count)), (Port("out", shape),))

    def forward(self, *xs: Tensor) -> Tensor:
        return sum(xs[1:], xs[0]) / len(xs)

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        share = Fraction(1, len(signature.inputs))
        return Algebra(linear={"out": {port.name: share for port in signature.inputs}})


class Scale(Component, kind="arithmetic"):
    """Product of a value and the constant ``by``.

    With ``by: 0`` applied to sigma, the network is not conditioned on the noise level (MDLM without time conditioning,
    arXiv 2406.07524).
    """

    positionwise = True

    class Config(ComponentConfig):
        by: float
        """The constant factor. With 0, the input cannot be recovered from the output."""

    config: Config

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x * self.config.by

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(config.by)}})


class Concat(Component, kind="arithmetic"):
    """Concatenation of values along the axis marked ``*`` in ``pattern``.

    Invertible if the sizes of the inputs along that axis do not depend on the batch size or the length.
    """

    class Config(ComponentConfig):
        pattern: Starred = "b l *"
        """Axis names of the values, with ``*`` for the axis to concatenate, as in ``einops.pack``."""

    config: Config

    @classmethod
    def signature(cls, config: Config, arity: Mapping[str, int]) -> Signature:
        sizes = [f"s{i}" for i in range(max(arity.values(), default=0))]
        inputs = tuple(Port(f"x{i}", _port_type(config.pattern, size)) for i, size in enumerate(sizes))
        return Signature(inputs, (Port("out", _port_type(config.pattern, "+".join(sizes) or "1")),))

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, dim=_dim(self.config.pattern))

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        names, dim = tuple(port.name for port in signature.inputs), _dim(config.pattern)
        bounds = {(name, "out"): 1.0 for name in names}
        if any(port.type.dims[dim].size.constant is None for port in signature.inputs):
            return Algebra(lipschitz=bounds, moves=True)
        rule = Rule(names, ("out",), "inverse", cost=0.0)
        return Algebra((rule,), lipschitz=bounds, log_det={names: "zero"}, moves=True)

    def inverse(self, out: Tensor) -> tuple[Tensor, ...]:
        """Split ``out`` along the concatenated axis and return the inputs of ``forward``."""
        sizes = [self.axis(f"s{i}") for i in range(len(self.context.connected))]
        return torch.split_with_sizes(out, sizes, _dim(self.config.pattern))


class Split(Component, kind="arithmetic"):
    """Split of a value along the axis marked ``*`` in ``pattern`` into outputs ``x0``, ``x1``, ... of ``sizes``."""

    class Config(ComponentConfig):
        sizes: Annotated[tuple[SizeField, ...], pydantic.Field(min_length=2, max_length=64)]
        """Sizes of the outputs along the axis, 2 to 64 of them; their sum is the size of the axis."""
        pattern: Starred = "b l *"
        """Axis names of the value, with ``*`` for the axis to split, as in ``einops.unpack``."""

    config: Config

    @classmethod
    def signature(cls, config: Config, arity: Mapping[str, int]) -> Signature:
        outputs = tuple(Port(f"x{i}", _port_type(config.pattern, str(s))) for i, s in enumerate(config.sizes))
        return Signature((Port("x", _port_type(config.pattern, str(sum(config.sizes)))),), outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(x, self.config.sizes, _dim(self.config.pattern))

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        names = tuple(port.name for port in signature.outputs)
        rule, bounds = Rule("x", names, "inverse", cost=0.0), {("x", name): 1.0 for name in names}
        return Algebra((rule,), lipschitz=bounds, log_det={"x": "zero"}, moves=True)

    def inverse(self, *parts: Tensor) -> Tensor:
        """Concatenate ``parts``, the outputs of ``forward``, and return its input."""
        return torch.cat(parts, dim=_dim(self.config.pattern))


class Permute(Component, kind="arithmetic"):
    """Permutation of axes, such as ``b l d -> b d l``."""

    class Config(ComponentConfig):
        pattern: Text
        """Axis names before and after ``->``, as in ``einops.rearrange``, without parentheses."""

        @pydantic.field_validator("pattern")
        @classmethod
        def _permutation(cls, pattern: str) -> str:
            left, arrow, right = (part.strip() for part in pattern.partition("->"))
            names = left.split()
            good = arrow and names and all(_AXIS.fullmatch(n) for n in names)
            if not good or len(set(names)) < len(names) or sorted(names) != sorted(right.split()):
                raise ValueError(f"{pattern!r}: the same axes on both sides, such as 'b l d -> b d l'")
            return pattern

    config: Config

    @classmethod
    def signature(cls, config: Config, arity: Mapping[str, int]) -> Signature:
        left, _, right = config.pattern.partition("->")
        x, out = (parse_port_type(f"float {axes}") for axes in (left, right))
        return Signature((Port("x", x),), (Port("out", out),))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rearrange(x, self.config.pattern)
        return out

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        rule = Rule("x", ("out",), "inverse", cost=0.0)
        return Algebra((rule,), lipschitz={("x", "out"): 1.0}, log_det={"x": "zero"}, moves=True)

    def inverse(self, out: Tensor) -> Tensor:
        """Permute the axes of ``out``, the output of ``forward``, back to those of its input."""
        left, _, right = self.config.pattern.partition("->")
        x: Tensor = rearrange(out, f"{right} -> {left}")
        return x
