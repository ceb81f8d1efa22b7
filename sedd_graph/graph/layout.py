"""Layered layout of nested boxes: computes the position of each box and the path of each edge, in pixels, y downwards.

The boxes of each layer are centred on a common vertical line. An edge that crosses layers runs vertically in one lane
beside their boxes, so that it bends only near its source and its target (Sugiyama et al. 1981, with all dummy nodes of
an edge at the same x).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["PAD", "Box", "Edge", "Key"]

GAP_X, GAP_Y, PAD, HEAD, LEAF_HEIGHT, CHAR, LANE, TIP = 28, 34, 14, 24, 40, 6.7, 12, 3
"""Sizes in pixels: horizontal and vertical gap between boxes, padding and title height of a frame, height of a box
without children, width of a character, distance between lanes, and length of an arrow's tip."""


class Edge(NamedTuple):
    """An edge between two boxes of the same frame.

    Attributes:
        source: Name of the box that the edge leaves.
        output: Output port of ``source``.
        target: Name of the box that the edge enters.
        input: Input port of ``target``.
    """

    source: str
    output: str
    target: str
    input: str


Key = tuple[str, str]
"""A value: the name of the box that computes it, and its output port."""


class _Lane(NamedTuple):
    """A vertical lane: the x coordinate at which the edges of a value cross the layers ``first`` to ``last``."""

    x: float
    first: int
    last: int


@dataclasses.dataclass
class Box:
    """A box of the drawing: a component, an input or an output; or, if it has children, the frame around a block.

    Coordinates are in pixels, relative to the enclosing frame. Children named ``>name`` and ``<name`` represent the
    inputs and outputs of the block.

    Attributes:
        title: First line of text.
        note: Second line of text, such as types.
        fill: CSS colour.
        path: Dotted path of the step.
        x: Left edge.
        y: Top edge.
        height: Height.
        children: Boxes inside the frame, by name.
        edges: Edges between children.
    """

    title: str
    note: str
    fill: str
    path: str
    x: float = 0.0
    y: float = 0.0
    height: float = LEAF_HEIGHT
    children: dict[str, Box] = dataclasses.field(default_factory=dict)
    edges: list[Edge] = dataclasses.field(default_factory=list)
    back: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Arrows of the derived inverse, as pairs of children's names (source, target)."""

    def __post_init__(self) -> None:
        self.width = self._least = max(CHAR * len(self.title) * 1.05, CHAR * 0.88 * len(self.note)) + 24
        self._layer: dict[str, int] = {}
        self._spans: list[tuple[float, float]] = []
        self._lanes: dict[Key, _Lane] = {}

    @property
    def middle(self) -> float:
        """The x coordinate of the box's centre."""
        return self.x + self.width / 2

    def arrange(self, layers: Sequence[Sequence[str]], sides: Mapping[Key, bool] | None = None) -> None:
        """Position the children in layers, and set this frame's size so that it contains them and their edges.

        Args:
            layers: Names of the children of each layer, from top to bottom.
            sides: For some values that cross layers, whether their lane is to the right of the boxes; others take the
                nearer side.
        """
        self._spans = []
        self._layer = {name: number for number, layer in enumerate(layers) for name in layer}
        y = float(HEAD + PAD)
        for layer in layers:
            boxes = [self.children[name] for name in layer]
            tall = max(box.height for box in boxes)
            x = -(sum(box.width for box in boxes) + GAP_X * (len(boxes) - 1)) / 2
            for box in boxes:
                box.x, box.y = x, y + (tall - box.height) / 2
                x += box.width + GAP_X
            self._spans.append((y, y + tall))
            y += tall + GAP_Y
        self._choose_lanes(layers, sides or {})
        lanes = [lane.x for lane in self._lanes.values()]
        left = min([*(box.x for box in self.children.values()), *lanes])
        right = max([*(box.x + box.width for box in self.children.values()), *lanes])
        inner = max(right - left, self._least - 2 * PAD)
        shift = PAD + (inner - (right - left)) / 2 - left
        for box in self.children.values():
            box.x += shift
        self._lanes = {key: lane._replace(x=lane.x + shift) for key, lane in self._lanes.items()}
        self.width, self.height = inner + 2 * PAD, y - GAP_Y + PAD

    def _choose_lanes(self, layers: Sequence[Sequence[str]], sides: Mapping[Key, bool]) -> None:
        """Assign one lane to all edges of each value that crosses layers: the nearer free lane, left or right."""
        ends: dict[Key, int] = {}
        self._lanes = {}
        for edge in self.edges:
            key = edge.source, edge.output
            ends[key] = max(ends.get(key, 0), self._layer[edge.target])
        for key, end in sorted(ends.items(), key=lambda item: item[1] - self._layer[item[0][0]]):
            first, last = self._layer[key[0]] + 1, end - 1
            if first > last:
                continue
            passed = [self.children[name] for layer in layers[first : last + 1] for name in layer]
            taken = [lane.x for lane in self._lanes.values() if lane.first <= last and first <= lane.last]
            right = _free(max(box.x + box.width for box in passed) + GAP_X / 2, LANE, taken)
            left = _free(min(box.x for box in passed) - GAP_X / 2, -LANE, taken)
            source = self._leaves(*key)
            to_right = sides.get(key, abs(left - source) >= abs(right - source) - 1)
            x = right if to_right else left
            self._lanes[key] = _Lane(x, first, last)

    def _leaves(self, name: str, output: str) -> float:
        """Return the x coordinate at which a value leaves a child: below the output's box, if the child is a frame."""
        child = self.children[name]
        inner = child.children.get(f"<{output}")
        return child.x + inner.middle if inner else child.middle

    def _arrivals(self, target: str) -> dict[int, float]:
        """Return the x coordinate at which each edge into a child ends, by the index of the edge.

        The edge ends above the input's box if the child is a frame; else the edges are spread over the child's top.
        """
        child = self.children[target]
        into = [number for number, edge in enumerate(self.edges) if edge.target == target]
        if child.children:
            inner = {number: child.children.get(f">{self.edges[number].input}") for number in into}
            return {number: child.x + box.middle if box else child.middle for number, box in inner.items()}
        into.sort(key=lambda number: self._comes_from(self.edges[number]))
        step = min(14.0, 0.6 * child.width / max(1, len(into)))
        straight = [i for i, number in enumerate(into) if abs(self._comes_from(self.edges[number]) - child.middle) < 1]
        centre = straight[0] if straight else (len(into) - 1) / 2
        return {number: child.middle + step * (i - centre) for i, number in enumerate(into)}

    def _comes_from(self, edge: Edge) -> float:
        """Return the x coordinate of an edge just above the layer of its target."""
        passes = self._layer[edge.target] - self._layer[edge.source] > 1
        return self._lanes[edge.source, edge.output].x if passes else self._leaves(edge.source, edge.output)

    def edge_paths(self) -> list[str]:
        """Return an SVG path (attribute ``d``) per edge in ``edges``, from the source's bottom to the target's top."""
        ends = {number: x for name in self.children for number, x in self._arrivals(name).items()}
        return [self._path(edge, ends[number]) for number, edge in enumerate(self.edges)]

    def _path(self, edge: Edge, end: float) -> str:
        source, target = self.children[edge.source], self.children[edge.target]
        first, last = self._layer[edge.source], self._layer[edge.target]
        x, y = self._leaves(edge.source, edge.output), self._spans[first][1]
        path = [f"M{x:.1f},{source.y + source.height:.1f} V{y:.1f}"]
        if last - first > 1:
            lane = self._comes_from(edge)
            path += [_bend(x, y, lane, self._spans[first + 1][0]), f"V{self._spans[last - 1][1]:.1f}"]
            x, y = lane, self._spans[last - 1][1]
        path += [_bend(x, y, end, self._spans[last][0] - TIP), f"V{target.y - TIP:.1f}"]
        return " ".join(path)

    def lane_sides(self) -> dict[Key, bool]:
        """Return, for each value that crosses layers, whether its lane is in the right half of the frame."""
        return {key: lane.x > self.width / 2 for key, lane in self._lanes.items()}

    def crossings(self) -> int:
        """Return the number of crossings of wires of different values in this frame, without those in its children.

        Wires bend only between layers, where two of them cross once if they change their order.
        """
        ends = {number: x for name in self.children for number, x in self._arrivals(name).items()}
        gaps: dict[int, set[tuple[Key, float, float]]] = {}
        for number, edge in enumerate(self.edges):
            first, last, key = self._layer[edge.source], self._layer[edge.target], (edge.source, edge.output)
            x, lane = self._leaves(*key), self._comes_from(edge)
            gaps.setdefault(first, set()).add((key, x, lane if last - first > 1 else ends[number]))
            if last - first > 1:
                gaps.setdefault(last - 1, set()).add((key, lane, ends[number]))
        pairs = (pair for wires in gaps.values() for pair in itertools.combinations(wires, 2))
        return sum(a[0] != b[0] and (a[1] - b[1]) * (a[2] - b[2]) < 0 for a, b in pairs)

    def back_paths(self) -> list[str]:
        """Return an SVG path (attribute ``d``) for each arrow in ``back``, from its source box to its target box.

        Both ends are to the right of the middle of their boxes, so that the arrow is apart from the edges.
        """
        return [self._back_path(self.children[source], self.children[target]) for source, target in self.back]

    def _back_path(self, source: Box, target: Box) -> str:
        x1, x2 = source.x + source.width * 0.75, target.x + target.width * 0.75
        up = source.y > target.y
        y1, y2 = (source.y, target.y + target.height + TIP) if up else (source.y + source.height, target.y - TIP)
        bend = (-1 if up else 1) * max(14.0, abs(y2 - y1) / 2)
        return f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2:.1f}"


def _free(x: float, step: float, taken: Iterable[float]) -> float:
    """Return the first of x, x + step, ... that is far enough from every lane in ``taken``."""
    while any(abs(x - other) < abs(step) for other in taken):
        x += step
    return x


def _bend(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return SVG path commands for an S-curve from the current point (x1, y1) down to (x2, y2)."""
    middle = (y1 + y2) / 2
    return f"C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"
