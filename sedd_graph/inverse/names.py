"""How values are called in text: ``f``, ``trunk.3.gate``, ``parts.x1``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sedd_graph.graph.model import Ref

__all__ = ["Names", "listed"]


class Names:
    """Names of the values of one region: the port is left out where a component has only one."""

    def __init__(self, refs: Iterable[Ref]) -> None:
        self._ports = Counter(ref.step for ref in refs if ref.step)

    def value(self, ref: Ref) -> str:
        return ref.step if self._ports[ref.step] == 1 else str(ref)


def listed(texts: Iterable[str], most: int = 12) -> str:
    """``a, b and c``; beyond ``most``, how many more."""
    found = list(texts)
    if len(found) > most:
        found = [*found[: most - 1], f"{len(found) - most + 1} more"]
    if len(found) < 2:
        return found[0] if found else "nothing"
    return f"{', '.join(found[:-1])} and {found[-1]}"
