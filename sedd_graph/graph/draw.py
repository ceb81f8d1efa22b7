"""The graph for people: a tree for the terminal, Mermaid and SVG for pages, JSON for programs."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from sedd_graph.component.kinds import KINDS
from sedd_graph.graph.model import Graph, Op, Ref, Region, Step

__all__ = ["Undo", "to_json", "to_mermaid", "to_svg", "to_tree"]

Undo = Mapping[Region, Sequence[tuple[str, str]]]
"""How regions are undone, as arrows between what is drawn in each: a step, ``>input`` or ``<output``."""

_UNDO = "#dc2626"


def _what(step: Step) -> str:
    if isinstance(step.body, Op):
        return step.body.contract.name
    return f"{step.body.label} x {step.body.repeat}" if step.body.repeat else step.body.label


def _types(step: Step) -> str:
    shown = [str(t) if n == "out" or len(step.outputs) == 1 else f"{n}: {t}" for n, t in step.outputs.items()]
    return ", ".join(shown)


def _body(step: Step) -> Region | None:
    """The region to look into: of a repeated block, one of its repeats."""
    if not isinstance(step.body, Region):
        return None
    inner = step.body.steps[0].body if step.body.repeat else step.body
    return inner if isinstance(inner, Region) else None


def to_tree(graph: Graph) -> str:
    """Every node once, repeats folded, with the types of what it puts out."""
    lines = [graph.name]
    rows: list[tuple[str, str, str]] = []

    def visit(region: Region, prefix: str) -> None:
        for index, step in enumerate(region.steps):
            last = index == len(region.steps) - 1
            rows.append((f"{prefix}{'`-' if last else '|-'} {step.name}", _what(step), _types(step)))
            inner = _body(step)
            if inner is not None:
                visit(inner, prefix + ("   " if last else "|  "))

    for name, found in graph.root.inputs.items():
        rows.append((f"|> {name}", "input", str(found)))
    visit(graph.root, "")
    for name, ref in graph.root.outputs.items():
        rows.append((f"=> {name}", f"from {ref}", str(graph.root.type_of(ref))))
    widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
    lines += [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join(lines)


def to_json(graph: Graph) -> str:
    """Inputs, outputs and axes; every component as a node, repeats counted out; every edge.

    A value is ``path.port`` of the component that makes it (``trunk.0.attend.gate.out``), or the bare name of an input
    of the graph. A node's ``inputs``, an edge's ``from`` and an output's ``from`` are values; an edge's ``to`` is
    ``path.port`` of an input. Blocks do not show: values are followed through them.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, str]] = []

    def visit(region: Region, prefix: str, given: Mapping[str, str]) -> dict[str, str]:
        """Add what stands in ``region``; from the values of its inputs to the values of its outputs."""
        made = {Ref("", name): value for name, value in given.items()}
        for step in region.steps:
            path = f"{prefix}{step.name}"
            inputs = {port: [made[ref] for ref in refs] for port, refs in step.inputs.items()}
            if isinstance(step.body, Region):
                outputs = visit(step.body, f"{path}.", {port: values[0] for port, values in inputs.items()})
            else:
                outputs = {port: f"{path}.{port}" for port in step.outputs}
                nodes.append(
                    {
                        "path": path,
                        "op": step.body.contract.op,
                        "config": step.body.config.model_dump(mode="json"),
                        "inputs": inputs,
                        "outputs": {port: str(found) for port, found in step.outputs.items()},
                    }
                )
                for port, refs in step.inputs.items():
                    edges.extend(
                        {"from": made[ref], "to": f"{path}.{port}", "type": str(region.type_of(ref))} for ref in refs
                    )
            made |= {Ref(step.name, port): value for port, value in outputs.items()}
        return {name: made[ref] for name, ref in region.outputs.items()}

    root = graph.root
    outputs = visit(root, "", {name: name for name in root.inputs})
    data = {
        "name": graph.name,
        "axes": {n: str(s) for n, s in graph.axes.items()},
        "inputs": {n: str(t) for n, t in root.inputs.items()},
        "outputs": {n: {"from": value, "type": str(root.output_types[n])} for n, value in outputs.items()},
        "nodes": nodes,
        "edges": edges,
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def to_mermaid(graph: Graph, undo: Undo | None = None) -> str:
    """A flowchart; a block is a subgraph, its repeats folded into one. Regions in ``undo`` show both directions."""
    lines, undo = ["flowchart TB"], undo or {}
    back: list[str] = []

    def quoted(text: str) -> str:
        return '"' + text.replace('"', "'").replace("<", "&lt;").replace(">", "&gt;") + '"'

    def key(kind: str, path: str) -> str:
        """An id of letters, digits and underscores, another for every path: names hold underscores, but never begin so."""
        return f"{kind}_" + path.replace("_", "_u").replace(".", "__")

    def visit(region: Region, prefix: str, indent: str) -> None:
        for step in region.steps:
            path = f"{prefix}{step.name}"
            inner = _body(step)
            if inner is None:
                lines.append(f"{indent}{key('n', path)}[{quoted(f'{step.name}: {_what(step)}')}]")
            else:
                lines.append(f"{indent}subgraph {key('n', path)}[{quoted(f'{step.name}: {_what(step)}')}]")
                visit(inner, path + ".", indent + "  ")
                both(inner, path + ".", indent + "  ")
                lines.append(f"{indent}end")
            for refs in step.inputs.values():
                # within a block, an input is the frame that is drawn around it
                sources = [source(ref, prefix) for ref in refs if ref.step or not prefix]
                lines.extend(f"{indent}{found} --> {key('n', path)}" for found in sources)

    def both(region: Region, prefix: str, indent: str) -> None:
        """Within a region that is undone: its inputs and outputs, and the arrows back."""
        if not undo.get(region):
            return
        for name in region.inputs:
            lines.append(f"{indent}{key('i', prefix + name)}([{quoted(name)}])")
        for step in region.steps:
            for ref in (r for refs in step.inputs.values() for r in refs if not r.step):
                lines.append(f"{indent}{key('i', prefix + ref.port)} --> {key('n', prefix + step.name)}")
        for name, ref in region.outputs.items():
            start = key("n", prefix + ref.step) if ref.step else key("i", prefix + ref.port)
            lines.append(f"{indent}{start} --> {key('o', prefix + name)}([{quoted(name)}])")
        for pair in undo[region]:
            ends = [key({">": "i", "<": "o"}.get(e[0], "n"), prefix + e.lstrip("<>")) for e in pair]
            back.append(f"  {ends[0]} -.-> {ends[1]}")

    def source(ref: Ref, prefix: str) -> str:
        return key("n", f"{prefix}{ref.step}") if ref.step else key("i", ref.port)

    for name, found in graph.root.inputs.items():
        lines.append(f"  {key('i', name)}([{quoted(f'{name}: {found}')}])")
    visit(graph.root, "", "  ")
    for name, ref in graph.root.outputs.items():
        label = quoted(f"{name}: {graph.root.type_of(ref)}")
        lines.append(f"  {source(ref, '')} --> {key('o', name)}([{label}])")
    if back:
        count = sum(" --> " in line for line in lines)
        lines += [*back, f"  linkStyle {','.join(str(count + i) for i in range(len(back)))} stroke:{_UNDO}"]
    return "\n".join(lines) + "\n"


# -- SVG ------------------------------------------------------------------------------------------------------------

_GAP_X, _GAP_Y, _PAD, _HEAD, _BOX_H, _CHAR, _LANE = 28, 34, 14, 24, 40, 6.7, 6


class _Box:
    """A drawn region or component with its size; children are placed inside."""

    def __init__(self, title: str, note: str, fill: str, path: str) -> None:
        self.title, self.note, self.fill, self.path = title, note, fill, path
        self.children: dict[str, tuple[_Box, float, float]] = {}
        self.edges: list[tuple[str, str]] = []
        self.back: list[tuple[str, str]] = []
        self.layer: dict[str, int] = {}
        self.spans: list[tuple[float, float]] = []
        self.lanes: dict[tuple[str, int], float] = {}
        """Where an edge from a child goes down through a layer that it skips: x."""
        self.width = max(_CHAR * len(title) * 1.05, _CHAR * 0.88 * len(note)) + 24
        self.height = float(_BOX_H)

    def place(self, layers: list[list[str]], boxes: dict[str, _Box]) -> None:
        """Layers from top to bottom, each centred, with a lane beside the boxes for every child whose edges go past."""
        self.layer = {name: number for number, layer in enumerate(layers) for name in layer}
        last = {a: max(self.layer[t] for s, t in self.edges if s == a) for a, _ in self.edges}
        past = [[a for a in last if self.layer[a] < number < last[a]] for number in range(len(layers))]
        widths = [
            sum(boxes[n].width for n in layer) + _LANE * len(skip) + _GAP_X * (len(layer) + len(skip) - 1)
            for layer, skip in zip(layers, past, strict=True)
        ]
        inner = max([*widths, self.width - 2 * _PAD])
        y = float(_HEAD + _PAD)
        for number, (layer, width) in enumerate(zip(layers, widths, strict=True)):
            x = _PAD + (inner - width) / 2
            tall = max(boxes[n].height for n in layer)
            for name in layer:
                box = boxes[name]
                self.children[name] = (box, x, y + (tall - box.height) / 2)
                x += box.width + _GAP_X
            for name in past[number]:
                self.lanes[name, number] = x + _LANE / 2
                x += _LANE + _GAP_X
            self.spans.append((y, y + tall))
            y += tall + _GAP_Y
        self.width, self.height = inner + 2 * _PAD, y - _GAP_Y + _PAD


def _boxed(region: Region, title: str, note: str, path: str, undo: Undo, *, top: bool) -> _Box:
    box = _Box(title, note, "#ffffff" if top else "#fafafa", path)
    boxes: dict[str, _Box] = {}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, found in region.inputs.items():
        boxes[f">{name}"] = _Box(name, str(found) if top else "", "#e2e8f0", "")
        graph.add_node(f">{name}")
    for step in region.steps:
        inner, where = _body(step), f"{path}.{step.name}".lstrip(".")
        if inner is not None:
            boxes[step.name] = _boxed(inner, f"{step.name}: {_what(step)}", "", where, undo, top=False)
        else:
            colour = KINDS[step.body.contract.kind].colour if isinstance(step.body, Op) else "#eee"
            what = _what(step)
            boxes[step.name] = _Box(
                step.name if step.name == what else f"{step.name}: {what}", _types(step), colour, where
            )
        graph.add_node(step.name)
        for refs in step.inputs.values():
            for ref in refs:
                source = ref.step or f">{ref.port}"
                graph.add_edge(source, step.name)
                box.edges.append((source, step.name))
    for name, ref in region.outputs.items():
        boxes[f"<{name}"] = _Box(name, str(region.type_of(ref)) if top else "", "#e2e8f0", "")
        graph.add_edge(ref.step or f">{ref.port}", f"<{name}")
        box.edges.append((ref.step or f">{ref.port}", f"<{name}"))
    layers = [list(layer) for layer in nx.topological_generations(graph)]
    order = {name: index for index, name in enumerate(graph)}
    for layer in layers:  # as the blueprint has them
        layer.sort(key=order.__getitem__)
    box.place(layers, boxes)
    box.back += undo.get(region, ())
    return box


def to_svg(graph: Graph, undo: Undo | None = None) -> str:
    """A layered drawing, top to bottom: blocks as frames, repeats folded, types under names. All text escaped.

    How the regions in ``undo`` are undone is drawn over them in red.
    """
    box = _boxed(graph.root, graph.name, "", "", undo or {}, top=True)
    parts: list[str] = []

    def text(
        x: float,
        y: float,
        content: str,
        size: float,
        *,
        anchor: str = "middle",
        weight: str = "400",
        fill: str = "#0f172a",
    ) -> None:
        parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{html.escape(content)}</text>'
        )

    def draw(item: _Box, x: float, y: float) -> None:
        stroke = "#64748b" if item.children else "#94a3b8"
        round_ = 10 if item.children else 12 if not item.path else 6
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{item.width:.1f}" height="{item.height:.1f}" rx="{round_}" fill="{item.fill}" stroke="{stroke}"><title>{html.escape(item.path)}</title></rect>'
        )
        if not item.children:
            middle = x + item.width / 2
            text(middle, y + (17 if item.note else 25), item.title, 12, weight="600")
            if item.note:
                text(middle, y + 31, item.note, 10, fill="#475569")
            return
        text(x + _PAD, y + 18, item.title, 12.5, anchor="start", weight="700", fill="#334155")
        for source, target in item.edges:
            parts.append(
                f'<path d="{_way(item, source, target, x, y)}" fill="none" stroke="#64748b" stroke-opacity="0.65" marker-end="url(#tip)"/>'
            )
        for child, cx, cy in item.children.values():
            draw(child, x + cx, y + cy)
        for source, target in item.back:
            parts.append(_arrow_back(item, source, target, x, y))

    draw(box, 8, 8)
    width, height = box.width + 16, box.height + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        'font-family="ui-sans-serif, system-ui, sans-serif">'
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#64748b"/></marker>'
        + (_TIP_BACK if any("#back" in part for part in parts) else "")
        + "</defs>"
        + "".join(parts)
        + "</svg>\n"
    )


_TIP_BACK = (
    '<marker id="back" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    f'<path d="M0,0 L6,3 L0,6 z" fill="{_UNDO}"/></marker>'
)


def _way(item: _Box, source: str, target: str, x: float, y: float) -> str:
    """From the foot of one box to the top of another: straight down through layers, in its lane, and bent between them."""
    (a, ax, ay), (b, bx, by) = item.children[source], item.children[target]
    first, last = item.layer[source], item.layer[target]
    at = x + ax + a.width / 2
    way = [f"M{at:.1f},{y + ay + a.height:.1f} V{y + item.spans[first][1]:.1f}"]
    for number in range(first + 1, last + 1):
        above, (top, foot) = y + item.spans[number - 1][1], item.spans[number]
        to = x + (item.lanes[source, number] if number < last else bx + b.width / 2)
        middle = (above + y + top) / 2
        end = y + foot if number < last else y + by - 3
        way.append(f"C{at:.1f},{middle:.1f} {to:.1f},{middle:.1f} {to:.1f},{y + top - 3:.1f} V{end:.1f}")
        at = to
    return " ".join(way)


def _arrow_back(item: _Box, source: str, target: str, x: float, y: float) -> str:
    """An arrow of the inverse, right of the middle: from the top of one box to the foot of another above it, or down."""
    a, ax, ay = item.children[source]
    b, bx, by = item.children[target]
    x1, x2 = x + ax + a.width * 0.75, x + bx + b.width * 0.75
    up = ay > by
    y1, y2 = (y + ay, y + by + b.height + 3) if up else (y + ay + a.height, y + by - 3)
    bend = (-1 if up else 1) * max(14.0, abs(y2 - y1) / 2)
    return (
        f'<path d="M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2:.1f}" fill="none" '
        f'stroke="{_UNDO}" stroke-opacity="0.7" stroke-dasharray="5 3" marker-end="url(#back)"/>'
    )
