"""The inputs of the conformance checks: a component under one Config, and a node with the sizes of its axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_graph.component.axes import PortType
from sedd_graph.component.contract import ComponentConfig, Signature

if TYPE_CHECKING:
    from sedd_graph.component.base import Component

__all__ = ["Case", "Failures", "Found", "Trial", "shape_of"]

Failures = list[tuple[str, str]]
"""Failed checks, as (name of the check, what is wrong)."""
Found = Iterable[tuple[str, str]]
"""Failed checks as they are found; see :data:`Failures`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The class under test, its validated Config, and the arguments of ``check_component``."""

    cls: Any
    config: ComponentConfig
    axes: Mapping[str, int]
    connected: tuple[str, ...]
    compile: bool
    root: Path
    partners: tuple[type, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A node of a graph with the sizes of all its axes and the names of the optional ports that are fed."""

    component: Component
    signature: Signature
    sizes: Mapping[str, int]
    connected: tuple[str, ...]

    def values(self, draw: Any, *more: str) -> Iterator[tuple[str, Any]]:
        """Yield a value for each input: ``draw(type)``, two of them for a variadic port, None for a port that is not fed.

        ``more`` names further optional ports to feed.
        """
        for port in self.signature.inputs:
            if port.variadic:
                yield port.name, [draw(port.type) for _ in range(2)]
            else:
                fed = not port.optional or port.name in (*self.connected, *more)
                yield port.name, draw(port.type) if fed else None


def shape_of(type_: PortType, sizes: Mapping[str, int]) -> list[int]:
    """Return the shape of a port under ``sizes``; a variadic dimension becomes (batch, length)."""
    shape: list[int] = []
    for dim in type_.dims:
        shape += [sizes["b"], sizes["l"]] if dim.variadic else [dim.size.evaluate(sizes)]
    return shape
