"""The contract of a component, as plain data: its name, ports, Config, kind and distribution. No torch.

The blueprint and graph packages use components only through these classes. The registry makes a contract from a class
(:mod:`sedd_graph.component.registry`); a test can make one by hand.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any

import pydantic

from sedd_graph.component.axes import PortType
from sedd_graph.component.strict import Strict

__all__ = [
    "Algebra",
    "ComponentConfig",
    "Contract",
    "Port",
    "Rule",
    "Signature",
    "SizeField",
    "SizeMark",
    "no_algebra",
    "no_signature",
    "size_fields",
]


class ComponentConfig(Strict):
    """Base class of every component's nested ``Config``: frozen; unknown keys, NaN and infinity are errors."""

    model_config = pydantic.ConfigDict(validate_default=True)


@dataclasses.dataclass(frozen=True)
class SizeMark:
    """Mark of a Config field whose value in YAML may be an expression over axes such as ``v`` or ``4*d``."""


SizeField = Annotated[int, pydantic.Field(gt=0, lt=2**40), SizeMark()]
"""A positive size. In a blueprint it may be written as an integer or as an expression over axes."""


@dataclasses.dataclass(frozen=True)
class Port:
    """A named input or output of a component."""

    name: str
    type: PortType
    optional: bool = False
    """True if an input may be left unconnected; ``forward`` then gets None."""
    variadic: bool = False
    """True if an input takes any number (one or more) of edges."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """Input and output ports of a component under one Config, in the order of ``forward``."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Inversion rule: the method ``method`` recovers the input ``target`` from the ports ``given``."""

    target: str | tuple[str, ...]
    """Name of the input; a tuple where the method returns several."""
    given: tuple[str, ...]
    """Ports that the method is called with. They must determine the targets for all values."""
    method: str
    cost: float = 1.0
    """Cost of the method, in evaluations of the component's ``forward``."""
    iterative: bool = False
    """True if the result is exact to a tolerance only, False if in closed form."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the inputs that the rule recovers."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclasses.dataclass(frozen=True)
class Algebra:
    """Algebraic properties of a component under one Config, from which the solver derives inverses and log-determinants."""

    rules: tuple[Rule, ...] = ()
    """Inversion rules."""
    linear: Mapping[str, Mapping[str, Fraction]] = dataclasses.field(default_factory=dict)
    """Outputs that are linear combinations of inputs, such as ``{"out": {"x": 1, "y": -1}}``; a factor of a variadic port holds
    for each of its values."""
    lipschitz: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """Lipschitz bound of an output with respect to one input, by (input, output), in the Euclidean norm of a whole sequence."""
    log_det: Mapping[str | tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    """Log-determinant by the target of a rule: ``"zero"`` for volume-preserving, or the name of the method that returns
    ``log |det d out / d target|``, nats, [b]."""
    moves: bool = False
    """True if outputs only rearrange the numbers of the inputs, without arithmetic."""


def no_signature(config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
    """Return the signature of a component that is not a node of a graph: no ports."""
    return Signature((), ())


def no_algebra(config: ComponentConfig, signature: Signature) -> Algebra:
    """Return the algebra of a component without algebraic properties."""
    return Algebra()


@dataclasses.dataclass(frozen=True)
class Contract:
    """Description of a component, from which blueprints and graphs are checked without its code."""

    name: str
    version: int
    kind: str
    """Name of its kind, a key of :data:`sedd_graph.component.kinds.KINDS`."""
    config: type[ComponentConfig]
    """Class of its keys in a blueprint."""
    signature: Callable[[ComponentConfig, Mapping[str, int]], Signature]
    """Returns the ports, from the Config and the number of edges into each variadic port."""
    summary: str = ""
    """First line of its docstring."""
    algebra: Callable[[ComponentConfig, Signature], Algebra] = no_algebra
    """Returns the algebra, from the Config and the signature. The connected ports of that signature have their types in the
    graph, so that a rule may depend on sizes (``port.type.dims[-1].size.constant``)."""
    positionwise: bool = False
    """True if an output at a position depends only on inputs at that position and on inputs without a length axis."""
    distribution: str = ""
    """Name and version of the distribution that installs it."""

    @property
    def op(self) -> str:
        """Pinned name, such as ``attention.v1``."""
        return f"{self.name}.v{self.version}"


def size_fields(config: type[ComponentConfig]) -> frozenset[str]:
    """Return the names of the Config fields that may be written as expressions over axes."""

    def marked(annotation: Any, metadata: tuple[Any, ...] = ()) -> bool:
        if any(isinstance(m, SizeMark) for m in metadata):
            return True
        extra = getattr(annotation, "__metadata__", ())
        return any(isinstance(m, SizeMark) for m in extra) or any(marked(a) for a in typing.get_args(annotation))

    return frozenset(n for n, f in config.model_fields.items() if marked(f.annotation, tuple(f.metadata)))
