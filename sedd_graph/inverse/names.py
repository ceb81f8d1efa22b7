"""Text for values and lists: ``f``, ``trunk.3.gate``, ``parts.x1``; ``a, b and c``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sedd_graph.graph.model import Ref

__all__ = ["Names", "join_and"]


class Names:
    """Names of the values of one region. The port is left out where a component has only one."""

    def __init__(self, refs: Iterable[Ref]) -> None:
        self._ports = Counter(ref.step for ref in refs if ref.step)

    def value(self, ref: Ref) -> str:
        """Return the name of a value."""
        return ref.step if self._ports[ref.step] == 1 else str(ref)


def join_and(texts: Iterable[str], most: int = 12) -> str:
    """Join ``texts`` as ``a, b and c``; beyond ``most`` of them, the rest is counted."""
    found = list(texts)
    if len(found) > most:
        found = [*found[: most - 1], f"{len(found) - most + 1} more"]
    if len(found) < 2:
        return found[0] if found else "nothing"
    return f"{', '.join(found[:-1])} and {found[-1]}"
