"""Base class of components that are ``nn.Module``: nodes of the network graph, and kernels, schedules and the like.

The ports of a node are read from the annotations of ``forward`` when its class is defined, so that a wrong annotation
raises at import and not during training. This module does not depend on blueprints or graphs.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.contract import Algebra, ComponentConfig, Port, Rule, Signature
from sedd_graph.component.declared import Declared
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.kv_cache import KVCache
from sedd_graph.component.strict import branches

__all__ = ["Component", "ComponentConfig", "Context", "solves"]

KEY = "key"
"""Name of the argument of ``forward`` that is not a port: it receives the keys from which a component computes its
random numbers, int32 [b], one per batch row (:mod:`sedd_graph.component.counter_rng`)."""

_KIND_OF_DTYPES = {"Float": "float", "Int": "int", "Bool": "bool"}


@dataclasses.dataclass(frozen=True)
class Context:
    """Axis sizes, connected input ports and path of one component in its graph; an argument of its constructor."""

    axes: Mapping[str, int]
    """Axis sizes by the names in the annotations of this component's ``forward``. The batch and length axes are absent,
    since their sizes are known only at run time. Components of a token or string process that are not nodes, such as
    kernels, get one size: ``n``, the number of token states (data tokens, and states that only noise produces, such as
    the mask)."""
    connected: frozenset[str] = frozenset()
    """Names of the input ports to which an edge is connected."""
    path: str = ""
    """Dotted path of the node in the graph, such as ``trunk.0.attend``."""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def solves(
    target: str | tuple[str, ...],
    *,
    given: tuple[str, ...],
    cost: float = 1.0,
    iterative: bool = False,
    log_det: str | None = None,
) -> Callable[[_Method], _Method]:
    """Mark a method (decorator) as an inversion rule, which recovers the input ``target`` from the ports ``given``.

    The solver of inverses calls the method with the tensors at the ports ``given``, in that order and without
    gradients.

    >>> @solves("x", given=("out", "shift"), log_det="zero")
    ... def inverse(self, out, shift):
    ...     return out - shift

    Args:
        target: Name of the recovered input, or a tuple of names if the method returns a tuple of inputs.
        given: Names of the output ports and other input ports that the method takes.
        cost: Cost of one call, in evaluations of ``forward``.
        iterative: True if the result is exact only up to a tolerance, as with fixed-point iteration.
        log_det: ``"zero"`` if the log-determinant of the Jacobian d out / d target is zero, or the name of a method
            that takes all inputs of ``forward`` and returns log ``|det d out / d target|``, nats, shape [b] (b batch).
            None if the log-determinant is unknown.
    """

    def mark(method: _Method) -> _Method:
        method.__solves__ = (Rule(target, tuple(given), method.__name__, cost, iterative), log_det)  # type: ignore[attr-defined]
        return method

    return mark


class Component(nn.Module, Declared):
    """Base class of components that are ``nn.Module``. A subclass has a ``kind`` and a nested ``Config``.

    The input and output ports of a node are the jaxtyping annotations of its ``forward``:

    >>> class Double(Component, kind="arithmetic"):
    ...     class Config(ComponentConfig):
    ...         by: float = 2.0
    ...     config: Config
    ...     def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    ...         return x * self.config.by

    A component with randomness (dropout) takes ``key: Tensor | None = None`` as the last argument of ``forward``. The
    key is not a port: the engine passes an int32 tensor [b] that differs for each step, row and node, or None to
    disable dropout (evaluation). :func:`sedd_graph.component.counter_rng.dropout` computes the dropout mask from the
    key.

    Raises:
        TypeError: When a subclass is defined without a ``Config``, with an unknown kind, or with a port that is not
            annotated.
    """

    outputs: ClassVar[tuple[str, ...]] = ("out",)
    """Names of the output ports, in the order in which ``forward`` returns them."""
    keyed: ClassVar[bool] = False
    """True if ``forward`` has an argument ``key`` (for random numbers, such as dropout masks); set automatically from
    the signature of ``forward``."""
    positionwise: ClassVar[bool] = False
    """True if the outputs at a sequence position depend only on inputs at the same position and on inputs without a
    length axis. Samplers evaluate such a component only at the positions that change."""
    moves: ClassVar[bool] = False
    """True if outputs only rearrange elements of the inputs, without arithmetic, as in a transpose or split."""
    kv_cache: KVCache | None = None
    """KV cache, set by the engine during block-by-block generation, else None. An attention component passes its keys
    and values to the cache and attends to the keys and values that the cache returns; other components ignore it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "kind") or cls.is_abstract():
            return
        cls.keyed = KEY in inspect.signature(cls.forward).parameters
        if KINDS[cls.kind].is_node and "signature" not in cls.__dict__:
            _signature_of_forward(cls)

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__()
        self.config = config
        self.context = context

    @classmethod
    def signature(cls, config: Any, arity: Mapping[str, int]) -> Signature:
        """Return the input and output ports; by default, those annotated in ``forward``.

        Override this method only if the ports depend on ``config`` or ``arity``.

        Args:
            config: The component's Config.
            arity: Number of edges into each variadic port, by port name.
        """
        return _signature_of_forward(cls)

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        """Return the algebraic properties from which inverses and log-determinants are derived.

        By default, these are the inversion rules (the methods marked with :func:`solves`, each of which recovers an
        input), their log-determinants, and :attr:`moves`. To add linear relations, Lipschitz bounds, or inversion rules
        that depend on the Config, override this method and extend the result of ``super()``.

        Args:
            config: The component's Config.
            signature: The component's ports.
        """
        marked = [m.__solves__ for n in dir(cls) if hasattr(m := inspect.getattr_static(cls, n), "__solves__")]
        return Algebra(
            rules=tuple(rule for rule, _ in marked),
            log_det={rule.target: log_det for rule, log_det in marked if log_det is not None},
            moves=cls.moves,
        )

    def with_log_det(self, method: str, *inputs: Any) -> tuple[Any, Any]:
        """Return the outputs of ``forward`` and the log-determinant of its Jacobian for the same inputs.

        By default ``forward`` and ``method`` are called one after the other. Override this method if they share
        computation.

        Args:
            method: Name of the method that returns the log-determinant, the argument ``log_det`` of :func:`solves`.
            inputs: All inputs of ``forward``.

        Returns:
            The outputs of ``forward``, and log ``|det d out / d target|``, nats, shape [b] (b batch), where ``target``
            is the input that the inversion rule recovers.
        """
        return self(*inputs), getattr(self, method)(*inputs)

    def penalty(self, key: Tensor) -> Tensor | None:
        """Return an auxiliary training loss of the component, a function of its parameters; None if it has none.

        In training the engine adds it to the loss of every row, times the number of tokens (or real numbers) of the row.
        Bounds and evaluations are without it. By default a component has none.

        Args:
            key: Keys from which random numbers are computed, int32 [b] (b batch), one per row.

        Returns:
            Penalties, nats per token, float [b], or None.
        """
        return None

    def axis(self, name: str) -> int:
        """Return the size of the axis that ``forward``'s annotations call ``name``.

        Raises :class:`KeyError` for batch and length.
        """
        return self.context.axes[name]


def _port_type(annotation: Any, where: str) -> PortType:
    if not (isinstance(annotation, type) and hasattr(annotation, "dim_str")):
        raise TypeError(f"{where}: annotate with jaxtyping, such as Float[Tensor, 'b l d'] (found {annotation!r})")
    name = annotation.__name__.split("[")[0]
    if name not in _KIND_OF_DTYPES:
        raise TypeError(f"{where}: use Float, Int or Bool (found {name})")
    return parse_port_type(f"{_KIND_OF_DTYPES[name]} {annotation.dim_str}".strip())


def _signature_of_forward(cls: type[Component]) -> Signature:
    """Read the ports from ``forward``: jaxtyping annotations, ``| None = None`` for optional, ``*xs`` for variadic."""
    hints = cls.forward.__annotations__
    inputs = []
    for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]:
        if name == KEY:
            continue
        where = f"{cls.__qualname__}.forward({name})"
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(f"{where}: keyword-only arguments cannot be ports")
        if name not in hints:
            raise TypeError(f"{where}: annotate every port, such as {name}: Float[Tensor, 'b l d']")
        optional = parameter.default is None
        options = branches(hints[name]) if optional else []
        annotation = options[0] if len(options) == 1 else hints[name]
        variadic = parameter.kind is parameter.VAR_POSITIONAL
        inputs.append(Port(name, _port_type(annotation, where), optional, variadic))
    where = f"{cls.__qualname__}.forward -> "
    if "return" not in hints:
        raise TypeError(f"{where}: annotate what forward returns")
    returned: Any = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    if len(parts) != len(cls.outputs):
        raise TypeError(f"{where}: {len(parts)} value(s) returned, but outputs = {cls.outputs}")
    outputs = tuple(Port(n, _port_type(a, where + n)) for n, a in zip(cls.outputs, parts, strict=True))
    return Signature(inputs=tuple(inputs), outputs=outputs)
