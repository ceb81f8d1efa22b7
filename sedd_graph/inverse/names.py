"""Display names of values, such as ``trunk.3.gate`` or ``parts.x1``, and lists in words, such as ``a, b and c``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sedd_graph.graph.model import Ref

__all__ = ["Names", "join_and"]


class Names:
    """Display names of the values of one region.

    The name is the dotted path of the component that computes the value, followed by the port if the component has
    several outputs; for an input of the region, the name of the input.

    Args:
        refs: References of all values of the region.
    """

    def __init__(self, refs: Iterable[Ref]) -> None:
        self._ports = Counter(ref.step for ref in refs if ref.step)

    def value(self, ref: Ref) -> str:
        """Return the display name of the value with the reference ``ref``."""
        return ref.step if self._ports[ref.step] == 1 else str(ref)


def join_and(texts: Iterable[str], most: int = 12) -> str:
    """Join texts to a list in words, such as ``a, b and c``.

    Args:
        texts: Elements of the list.
        most: Largest number of elements; surplus ones are replaced by their number, such as ``3 more``.
    """
    found = list(texts)
    if len(found) > most:
        found = [*found[: most - 1], f"{len(found) - most + 1} more"]
    if len(found) < 2:
        return found[0] if found else "nothing"
    return f"{', '.join(found[:-1])} and {found[-1]}"
