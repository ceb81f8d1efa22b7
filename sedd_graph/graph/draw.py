"""Output formats of a graph: a text tree for the terminal, Mermaid and SVG for pages, JSON for programs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from sedd_graph.component.kinds import KINDS
from sedd_graph.graph.layout import PAD, Box, Edge
from sedd_graph.graph.model import Graph, Op, Ref, Region, Step
from sedd_graph.graph.order import arrange

__all__ = ["InverseArrows", "to_json", "to_mermaid", "to_svg", "to_tree"]

InverseArrows = Mapping[Region, Sequence[tuple[str, str]]]
"""Arrows of the derived inverses in a drawing: for each region, pairs (name of the source box, name of the target box).

The box of a step has the step's name. The boxes of the region's inputs and outputs have the names of these, after ``>``
for an input and ``<`` for an output: ``>x``, ``<y``."""

_INVERSE, _WIRE = "#dc2626", "#64748b"


def _label(step: Step) -> str:
    """Return the name of a step's component or block, with its number of repeats."""
    if isinstance(step.body, Op):
        return step.body.contract.name
    return f"{step.body.label} x {step.body.repeat}" if step.body.repeat else step.body.label


def _types(step: Step) -> str:
    """Return the types of a step's outputs as text."""
    shown = [str(t) if n == "out" or len(step.outputs) == 1 else f"{n}: {t}" for n, t in step.outputs.items()]
    return ", ".join(shown)


def _inner(step: Step) -> Region | None:
    """Return the region of a step's block (one repeat of a repeated block); None for a component."""
    if not isinstance(step.body, Region):
        return None
    inner = step.body.steps[0].body if step.body.repeat else step.body
    return inner if isinstance(inner, Region) else None


def to_tree(graph: Graph) -> str:
    """Return a text tree of all nodes with the types of their outputs. A repeated block is shown once."""
    lines = [graph.name]
    rows: list[tuple[str, str, str]] = []

    def visit(region: Region, prefix: str) -> None:
        for index, step in enumerate(region.steps):
            last = index == len(region.steps) - 1
            rows.append((f"{prefix}{'`-' if last else '|-'} {step.name}", _label(step), _types(step)))
            inner = _inner(step)
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
    """Return the graph as JSON: inputs, outputs, axes, one node per component (counting every repeat) and all edges.

    A value is identified by the path and output port of the component that computes it (``trunk.0.attend.gate.out``),
    or by the name of an input of the graph. A node's ``inputs``, an edge's ``from`` and an output's ``from`` identify
    values; an edge's ``to`` is the path and input port of a component. Blocks are expanded and do not appear.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, str]] = []

    def visit(region: Region, prefix: str, given: Mapping[str, str]) -> dict[str, str]:
        """Add the nodes and edges of ``region``. Takes the values of its inputs, and returns those of its outputs."""
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


# -- Mermaid --------------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'").replace("<", "&lt;").replace(">", "&gt;") + '"'


def _id(kind: str, path: str) -> str:
    """Return a unique id of letters, digits and underscores for ``path``, whose names do not begin with underscores."""
    return f"{kind}_" + path.replace("_", "_u").replace(".", "__")


def _source(ref: Ref, prefix: str, inputs: str = "") -> str:
    """The id of the box that a value comes from; ``inputs`` is the prefix of the ids of inputs."""
    return _id("n", prefix + ref.step) if ref.step else _id("i", inputs + ref.port)


class _Flowchart:
    """The lines of a Mermaid flowchart, written region by region; ``back`` has the arrows of inverses."""

    def __init__(self, inverses: InverseArrows) -> None:
        self.inverses = inverses
        self.lines = ["flowchart TB"]
        self.back: list[str] = []

    def steps(self, region: Region, prefix: str, indent: str) -> None:
        """Write the steps of a region and their incoming edges. Inside a block, its frame represents its inputs."""
        for step in region.steps:
            path, inner = f"{prefix}{step.name}", _inner(step)
            box = f"{_id('n', path)}[{_quoted(f'{step.name}: {_label(step)}')}]"
            if inner is None:
                self.lines.append(f"{indent}{box}")
            else:
                self.lines.append(f"{indent}subgraph {box}")
                self.steps(inner, path + ".", indent + "  ")
                if inner in self.inverses:
                    self.both_directions(inner, path + ".", indent + "  ")
                self.lines.append(f"{indent}end")
            for refs in step.inputs.values():
                sources = [_source(ref, prefix) for ref in refs if ref.step or not prefix]
                self.lines.extend(f"{indent}{source} --> {_id('n', path)}" for source in sources)

    def both_directions(self, region: Region, prefix: str, indent: str) -> None:
        """Write the inputs and outputs of an inverted region, and the arrows of its inverse."""
        for name in region.inputs:
            self.lines.append(f"{indent}{_id('i', prefix + name)}([{_quoted(name)}])")
        for step in region.steps:
            for ref in (r for refs in step.inputs.values() for r in refs if not r.step):
                self.lines.append(f"{indent}{_id('i', prefix + ref.port)} --> {_id('n', prefix + step.name)}")
        for name, ref in region.outputs.items():
            self.lines.append(
                f"{indent}{_source(ref, prefix, prefix)} --> {_id('o', prefix + name)}([{_quoted(name)}])"
            )
        for pair in self.inverses[region]:
            start, end = (_id({">": "i", "<": "o"}.get(e[0], "n"), prefix + e.lstrip("<>")) for e in pair)
            self.back.append(f"  {start} -.-> {end}")


def to_mermaid(graph: Graph, inverses: InverseArrows | None = None) -> str:
    """Return the graph as a Mermaid flowchart. A block is drawn as a subgraph, and a repeated block is drawn once.

    Args:
        graph: The graph.
        inverses: For each region with a derived inverse, its arrows as pairs (source, target) of names of steps, or of
            inputs (``>x``) and outputs (``<y``), see :data:`InverseArrows`. They are drawn in red, and such a region
            also shows its inputs and outputs. None draws no inverses.
    """
    chart = _Flowchart({region: pairs for region, pairs in (inverses or {}).items() if pairs})
    for name, found in graph.root.inputs.items():
        chart.lines.append(f"  {_id('i', name)}([{_quoted(f'{name}: {found}')}])")
    chart.steps(graph.root, "", "  ")
    for name, ref in graph.root.outputs.items():
        label = _quoted(f"{name}: {graph.root.type_of(ref)}")
        chart.lines.append(f"  {_source(ref, '')} --> {_id('o', name)}([{label}])")
    if chart.back:
        count = sum(" --> " in line for line in chart.lines)
        styled = ",".join(str(count + i) for i in range(len(chart.back)))
        chart.lines += [*chart.back, f"  linkStyle {styled} stroke:{_INVERSE}"]
    return "\n".join(chart.lines) + "\n"


# -- SVG ------------------------------------------------------------------------------------------------------------

_PORT = "#e2e8f0"


def _boxed(region: Region, box: Box, inverses: InverseArrows, *, top: bool) -> Box:
    """Fill ``box``, the frame of ``region``, with the boxes of its inputs, steps and outputs."""
    for name, found in region.inputs.items():
        box.children[f">{name}"] = Box(name, str(found) if top else "", _PORT, "")
    for step in region.steps:
        inner, path = _inner(step), f"{box.path}.{step.name}".lstrip(".")
        title = f"{step.name}: {_label(step)}"
        if inner is not None:
            box.children[step.name] = _boxed(inner, Box(title, "", "#fafafa", path), inverses, top=False)
        elif isinstance(step.body, Op):
            title = step.name if step.name == _label(step) else title
            box.children[step.name] = Box(title, _types(step), KINDS[step.body.contract.kind].colour, path)
        box.edges += [
            Edge(ref.step or f">{ref.port}", ref.port, step.name, port)
            for port, refs in step.inputs.items()
            for ref in refs
        ]
    for name, ref in region.outputs.items():
        box.children[f"<{name}"] = Box(name, str(region.type_of(ref)) if top else "", _PORT, "")
        box.edges.append(Edge(ref.step or f">{ref.port}", ref.port, f"<{name}", ""))
    box.back += inverses.get(region, ())
    arrange(box, _layers(box))
    return box


def _layers(box: Box) -> list[list[str]]:
    """Children by the length of the longest path to them from an input, in the blueprint's order; outputs last."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(box.children)
    graph.add_edges_from((edge.source, edge.target) for edge in box.edges)
    order = {name: number for number, name in enumerate(box.children)}
    layers = [sorted(layer, key=order.__getitem__) for layer in nx.topological_generations(graph)]
    inner = [[name for name in layer if not name.startswith("<")] for layer in layers]
    outputs = [name for name in box.children if name.startswith("<")]
    return [layer for layer in (*inner, outputs) if layer]


def to_svg(graph: Graph, inverses: InverseArrows | None = None) -> str:
    """Return the graph as an SVG drawing in layers from top to bottom. All text is escaped.

    Blocks are drawn as frames, a repeated block once; output types are shown below names.

    Args:
        graph: The graph.
        inverses: For each region with a derived inverse, its arrows as pairs (source, target) of names of steps, or of
            inputs (``>x``) and outputs (``<y``), see :data:`InverseArrows`. They are drawn in red. None draws no
            inverses.
    """
    box = _boxed(graph.root, Box(graph.name, "", "#ffffff", ""), inverses or {}, top=True)
    width, height = f"{box.width + 16:.0f}", f"{box.height + 16:.0f}"
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": width,
            "height": height,
            "font-family": "ui-sans-serif, system-ui, sans-serif",
        },
    )
    tips = ET.SubElement(svg, "defs")
    for name, colour in {"tip": _WIRE, "back": _INVERSE}.items():
        size = {"markerWidth": "6", "markerHeight": "6", "orient": "auto"}
        tip = ET.SubElement(tips, "marker", {"id": name, "viewBox": "0 0 6 6", "refX": "5", "refY": "3", **size})
        ET.SubElement(tip, "path", {"d": "M0,0 L6,3 L0,6 z", "fill": colour})
    box.x = box.y = 8
    _draw(box, svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _draw(box: Box, parent: ET.Element) -> None:
    """Add ``box`` and its contents to the drawing, in a group with its own origin."""
    group = ET.SubElement(parent, "g", {"transform": f"translate({box.x:.1f},{box.y:.1f})"})
    corner = "10" if box.children else "6" if box.path else "12"
    size = {"width": f"{box.width:.1f}", "height": f"{box.height:.1f}", "rx": corner}
    rect = ET.SubElement(group, "rect", {**size, "fill": box.fill, "stroke": "#64748b" if box.children else "#94a3b8"})
    ET.SubElement(rect, "title").text = box.path
    if not box.children:
        middle = {"x": f"{box.width / 2:.1f}", "text-anchor": "middle"}
        style = {"y": "17" if box.note else "25", "font-size": "12", "font-weight": "600", "fill": "#0f172a"}
        ET.SubElement(group, "text", {**middle, **style}).text = box.title
        if box.note:
            ET.SubElement(group, "text", {**middle, "y": "31", "font-size": "10", "fill": "#475569"}).text = box.note
        return
    style = {"font-size": "12.5", "font-weight": "700", "fill": "#334155"}
    ET.SubElement(group, "text", {"x": str(PAD), "y": "18", **style}).text = box.title
    wire = {"fill": "none", "stroke": _WIRE, "stroke-opacity": "0.65", "marker-end": "url(#tip)"}
    for path in box.edge_paths():
        ET.SubElement(group, "path", {"d": path, **wire})
    for child in box.children.values():
        _draw(child, group)
    back = {"stroke": _INVERSE, "stroke-opacity": "0.7", "stroke-dasharray": "5 3", "marker-end": "url(#back)"}
    for path in box.back_paths():
        ET.SubElement(group, "path", {"d": path, **wire, **back})
