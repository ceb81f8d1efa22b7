"""Arguments and results of the conformance checks: :class:`Case` for any component, :class:`Trial` for a graph node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_graph.component.axes import PortType
from sedd_graph.component.check import Proof
from sedd_graph.component.contract import ComponentConfig, Signature

if TYPE_CHECKING:
    from sedd_graph.component.base import Component

__all__ = ["Case", "Failures", "Found", "Trial", "shape_of"]

Failures = list[tuple[str, str]]
"""List of failed checks, each as (name of the check, description of the error)."""
Found = Iterable[tuple[str, str]]
"""Iterable of failed checks, each as (name of the check, description of the error), for checks that are generators."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Component class under test, with the arguments of :func:`sedd_graph.testing.conformance.check_component`.

    Attributes:
        cls: Class of the component.
        config: Validated Config of the component.
        axes: Sizes of the static axes of a graph node, by axis name.
        connected: Names of the optional ports of a graph node that are connected.
        compile: True if ``forward`` of a graph node is also tested under ``torch.compile``.
        root: Folder that relative file names in the Config start from.
        partners: Component classes with which a process component is combined, in place of the built-in ones.
        proof: Strength of the verification of a process on vectors: ``full``, or ``quick`` with fewer cases.
    """

    cls: Any
    config: ComponentConfig
    axes: Mapping[str, int]
    connected: tuple[str, ...]
    compile: bool
    root: Path
    partners: tuple[type, ...]
    proof: Proof = "full"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Graph node under test.

    Attributes:
        component: The node's module.
        signature: Input and output ports of the node.
        sizes: Size of every axis by name, including ``b`` (batch) and ``l`` (length).
        connected: Names of the optional ports that are connected.
    """

    component: Component
    signature: Signature
    sizes: Mapping[str, int]
    connected: tuple[str, ...]

    def values(self, draw: Any, *more: str) -> Iterator[tuple[str, Any]]:
        """Yield (port name, value) for each input port.

        Args:
            draw: Function that returns a random tensor of the port type that it is called with. It is called twice for
                a variadic port.
            more: Names of optional ports to connect, in addition to ``connected``.

        Yields:
            The port name, with a tensor, a list of two tensors for a variadic port, or None for an unconnected port.
        """
        for port in self.signature.inputs:
            if port.variadic:
                yield port.name, [draw(port.type) for _ in range(2)]
            else:
                fed = not port.optional or port.name in (*self.connected, *more)
                yield port.name, draw(port.type) if fed else None


def shape_of(type_: PortType, sizes: Mapping[str, int]) -> list[int]:
    """Return the shape of a tensor of port type ``type_``.

    Args:
        type_: The port type. A variadic dimension stands for the two axes ``b`` (batch) and ``l`` (length).
        sizes: Axis sizes by name, including ``b`` and ``l``.
    """
    shape: list[int] = []
    for dim in type_.dims:
        shape += [sizes["b"], sizes["l"]] if dim.variadic else [dim.size.evaluate(sizes)]
    return shape
