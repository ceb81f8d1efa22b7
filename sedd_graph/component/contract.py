"""Contract of a component as plain data: its name, ports, Config, kind and Python distribution. Imports no torch.

The blueprint and graph packages use components only through the classes of this module. The registry derives a contract
from a component class (:mod:`sedd_graph.component.registry`); a test can construct a contract directly.
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
    """Base class of components' nested ``Config``: a frozen pydantic model that rejects unknown keys, NaN and infinity.

    Default values are validated, too.
    """

    model_config = pydantic.ConfigDict(validate_default=True)


@dataclasses.dataclass(frozen=True)
class SizeMark:
    """Annotation of an integer Config field that YAML may give as an expression over axis names, such as ``4*d``."""


SizeField = Annotated[int, pydantic.Field(gt=0, lt=2**40), SizeMark()]
"""Type of a positive size in a Config. YAML may give an integer or an expression over axis names, such as ``4*d``."""


@dataclasses.dataclass(frozen=True)
class Port:
    """Named input or output of a component, with its tensor type."""

    name: str
    type: PortType
    optional: bool = False
    """True if an input may be left unconnected, so that ``forward`` receives None."""
    variadic: bool = False
    """True if an input accepts one or more edges; ``forward`` receives them as ``*name``."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """Input and output ports of a component under one Config, in the order of ``forward``."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Inversion rule: ``method``, called with the tensors at the ports ``given``, recovers the input ``target``."""

    target: str | tuple[str, ...]
    """Name of the recovered input, or a tuple of names if the method returns several inputs."""
    given: tuple[str, ...]
    """Names of the ports whose tensors are the method's arguments, in order. For all values of these tensors, the
    target must be uniquely determined."""
    method: str
    """Name of the method of the component."""
    cost: float = 1.0
    """Cost of one call of the method, in evaluations of the component's ``forward``."""
    iterative: bool = False
    """True if the result is exact only up to a tolerance (fixed-point iteration) and not in closed form."""
    onto: bool = False
    """True for integers that ``forward`` maps one-to-one onto all values of the outputs in ``given``, though these have
    another number of elements: a number and all its digits."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the recovered inputs, always as a tuple."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclasses.dataclass(frozen=True)
class Algebra:
    """Algebraic properties of a component under one Config, from which inverses and log-determinants are derived."""

    rules: tuple[Rule, ...] = ()
    """Inversion rules of the component."""
    linear: Mapping[str, Mapping[str, Fraction]] = dataclasses.field(default_factory=dict)
    """Coefficients of the outputs that are linear combinations of inputs: ``{"out": {"x": 1, "y": -1}}`` is out = x -
    y. The coefficient of a variadic port applies to each of its tensors."""
    lipschitz: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """Upper bounds of the Lipschitz constants of outputs as functions of an input, keyed by (input name, output name).
    The norm is the Euclidean norm over all elements of a sequence."""
    log_det: Mapping[str | tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    """Log-determinants, keyed by :attr:`Rule.target` (the input or inputs that an inversion rule recovers). A value is
    ``"zero"`` for a volume-preserving map, or the name of the method that returns log ``|det d out / d target|``, nats,
    shape [b] (b batch). A rule without an entry has an unknown log-determinant."""
    moves: bool = False
    """True if outputs only rearrange elements of the inputs, without arithmetic, as in a transpose or split."""
    integers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of values n that an integer input takes, 0 to n - 1, by input name; inverses are verified on these values."""
    rounding: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """Bounds on rounding errors, keyed by (input name, output name): the computed output, and the input that an inversion
    rule computes, differ from their exact values by at most this number times the unit roundoff (2^-24 in float32)
    times the Euclidean norm of what they are computed from. A component with such a bound maps zero to zero."""


def no_signature(config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
    """Return an empty signature, for a component that is not a node of a graph and has no ports."""
    return Signature((), ())


def no_algebra(config: ComponentConfig, signature: Signature) -> Algebra:
    """Return an :class:`Algebra` without inversion rules or other properties: the default for a component."""
    return Algebra()


@dataclasses.dataclass(frozen=True)
class Contract:
    """Description of a component, with which blueprints and graphs are checked without running the component's code."""

    name: str
    """Name without version, such as ``attention``."""
    version: int
    """Version number, from 1."""
    kind: str
    """Kind of the component, a key of :data:`sedd_graph.component.kinds.KINDS`."""
    config: type[ComponentConfig]
    """Class of the component's Config, whose fields are the component's keys in a blueprint."""
    signature: Callable[[ComponentConfig, Mapping[str, int]], Signature]
    """Function ``(config, arity)`` that returns the ports. ``arity`` maps the name of each variadic port to the number
    of edges into it."""
    summary: str = ""
    """First line of the component's docstring."""
    algebra: Callable[[ComponentConfig, Signature], Algebra] = no_algebra
    """Function ``(config, signature)`` that returns the algebraic properties of the component, such as inversion rules.
    Connected ports in ``signature`` have the types of their edges in the graph, so that the properties may depend on
    sizes: ``port.type.dims[-1].size.constant`` is the size of the last axis as an integer, None if it is symbolic."""
    positionwise: bool = False
    """True if outputs at a sequence position depend only on inputs at the same position and on inputs without length
    axis."""
    distribution: str = ""
    """Name and version of the Python distribution that installs the component."""

    @property
    def op(self) -> str:
        """Name with its version, such as ``attention.v1``."""
        return f"{self.name}.v{self.version}"


def size_fields(config: type[ComponentConfig]) -> frozenset[str]:
    """Return the names of the Config fields that YAML may give as expressions over axis names, such as ``4*d``."""

    def marked(annotation: Any, metadata: tuple[Any, ...] = ()) -> bool:
        if any(isinstance(m, SizeMark) for m in metadata):
            return True
        extra = getattr(annotation, "__metadata__", ())
        return any(isinstance(m, SizeMark) for m in extra) or any(marked(a) for a in typing.get_args(annotation))

    return frozenset(n for n, f in config.model_fields.items() if marked(f.annotation, tuple(f.metadata)))
