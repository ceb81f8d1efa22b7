"""How values are called in text: ``f``, ``trunk.3.gate``, ``parts.x1``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sedd_graph.graph.model import Ref

__all__ = ["Names"]


class Names:
    """Names of the values of one region: the port is left out where a component has only one."""

    def __init__(self, refs: Iterable[Ref]) -> None:
        self._ports = Counter(ref.step for ref in refs if ref.step)

    def value(self, ref: Ref) -> str:
        return ref.step if self._ports[ref.step] == 1 else str(ref)
