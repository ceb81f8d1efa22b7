"""Order of the boxes of each layer of a drawing, and side of each lane, so that few wires cross.

The barycentre heuristic (Sugiyama et al. 1981): boxes of a layer are sorted by the mean position of the boxes that they are connected to,
layer by layer, down and up; exchanges of neighbours and of sides follow, as long as they remove crossings. Drawings whose
wires do not cross are left as the blueprint orders them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from sedd_graph.graph.layout import Box, Key

__all__ = ["arrange"]

SWEEPS, LANES, TRIALS = 4, 5, 400
"""Numbers of barycentre sweeps, of lanes whose sides are all tried, and of arrangements that are tried for one frame."""

Layers = list[list[str]]
Sides = dict[Key, bool]


def arrange(box: Box, layers: Sequence[Sequence[str]]) -> None:
    """Position the children of a frame in layers, with few crossings of its wires.

    Args:
        box: The frame, whose children are arranged already.
        layers: Names of the children of each layer, from top to bottom, in the blueprint's order.
    """
    search = _Search(box, [list(layer) for layer in layers])
    if search.best:
        for candidate in [search.layers, *search.sweeps()]:
            search.try_sides(candidate)
        while search.best and search.improve():
            pass
    box.arrange(search.layers, search.sides)


class _Search:
    """The best arrangement of a frame so far: order of its layers, and lanes that are right (True) or left of their boxes."""

    def __init__(self, box: Box, layers: Layers) -> None:
        self._box, self._tried = box, 0
        self.layers, self.sides = layers, Sides()
        box.arrange(layers)
        self.best = box.crossings()

    def attempt(self, layers: Layers, sides: Sides) -> bool:
        """Retain an arrangement if fewer wires cross, and return whether that is so."""
        self._tried += 1
        if self._tried > TRIALS:
            return False
        self._box.arrange(layers, sides)
        if (found := self._box.crossings()) >= self.best:
            return False
        self.layers, self.sides, self.best = layers, sides, found
        return True

    def try_sides(self, layers: Layers) -> None:
        """Try an order with every choice of sides, if the lanes are few."""
        self._box.arrange(layers)
        keys = list(self._box.lane_sides())[:LANES]
        for chosen in itertools.product((False, True), repeat=len(keys)):
            self.attempt(layers, dict(zip(keys, chosen, strict=True)))

    def sweeps(self) -> Iterator[Layers]:
        """Yield orders of the layers by the barycentre heuristic, downwards and upwards in turn."""
        layers = self.layers
        for sweep in range(SWEEPS):
            layers = self._swept(layers, down=sweep % 2 == 0)
            yield layers

    def _swept(self, layers: Layers, *, down: bool) -> Layers:
        place = {name: (2 * i + 1) / len(layer) for layer in layers for i, name in enumerate(layer)}
        level = {name: number for number, layer in enumerate(layers) for name in layer}
        made = [list(layer) for layer in layers]
        for number in range(len(layers)) if down else reversed(range(len(layers))):

            def centre(name: str, number: int = number) -> float:
                ends = [(edge.source, edge.target) for edge in self._box.edges if name in (edge.source, edge.target)]
                near = [
                    place[a if b == name else b] for a, b in ends if (level[a if b == name else b] < number) == down
                ]
                return sum(near) / len(near) if near else place[name]

            made[number].sort(key=centre)
            place |= {name: (2 * i + 1) / len(made[number]) for i, name in enumerate(made[number])}
        return made

    def improve(self) -> bool:
        """Try exchanges of two neighbours, and of the sides of lanes; return whether one removed a crossing."""
        for number, layer in enumerate(self.layers):
            for i, j in itertools.combinations(range(len(layer)), 2):
                changed = list(layer)
                changed[i], changed[j] = changed[j], changed[i]
                if self.attempt([*self.layers[:number], changed, *self.layers[number + 1 :]], self.sides):
                    return True
        self._box.arrange(self.layers, self.sides)
        lanes = self._box.lane_sides()
        return any(self.attempt(self.layers, {**self.sides, key: not right}) for key, right in lanes.items())
