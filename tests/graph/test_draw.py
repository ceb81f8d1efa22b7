"""Drawings: golden trees, distinct Mermaid ids, SVG whose boxes do not overlap and whose edges are direct, JSON that can be run."""

import itertools
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_model
from sedd_graph.graph import draw
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg, to_tree
from sedd_graph.graph.model import Graph
from sedd_graph.runs.check import check
from tests.conftest import BLUEPRINTS
from tests.graph.nested import write_nested

GOLDEN = Path(__file__).parent / "golden"
SVG = "{http://www.w3.org/2000/svg}"


def assert_golden(name: str, text: str) -> None:
    """Compare with a golden file; ``UPDATE_GOLDEN=1`` writes it."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture(params=[p.stem for p in BLUEPRINTS] + ["nested"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Graph:
    name = request.param
    return check(write_nested(tmp_path) if name == "nested" else next(p for p in BLUEPRINTS if p.stem == name)).graph


def test_trees_are_the_golden_ones(graph: Graph) -> None:
    assert_golden(f"{graph.name}.txt", to_tree(graph) + "\n")


def test_no_golden_tree_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {p.stem for p in BLUEPRINTS} | {"nested"}


def test_json_is_the_golden_one(small: Callable[..., Path]) -> None:
    assert_golden("small.json", to_json(check(small(("depth: 2", "depth: 1"))).graph))


def test_edges_of_json_resolve(graph: Graph) -> None:
    data = json.loads(to_json(graph))
    nodes = {n["path"]: n for n in data["nodes"]}
    types = dict(data["inputs"])
    for node in data["nodes"]:
        types |= {f"{node['path']}.{port}": found for port, found in node["outputs"].items()}
    edges = {(e["from"], e["to"]): e["type"] for e in data["edges"]}
    assert len(nodes) == graph.root.size == len(data["nodes"])
    for (source, target), found in edges.items():
        path, _, port = target.rpartition(".")
        assert types[source] == found
        assert source in nodes[path]["inputs"][port]
    listed = [(v, f"{n['path']}.{p}") for n in data["nodes"] for p, values in n["inputs"].items() for v in values]
    assert set(listed) == edges.keys()
    for output in data["outputs"].values():
        assert types[output["from"]] == output["type"]
    order = list(types)
    for (source, target), _ in edges.items():  # every node comes after what feeds it
        own = next(v for v in order if v.startswith(target.rpartition(".")[0] + "."))
        assert order.index(source) < order.index(own)


@pytest.mark.parametrize("name", ["nested", "sedd-tiny", "first"])
def test_a_program_that_follows_the_json_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    report = check(write_nested(tmp_path) if name == "nested" else next(p for p in BLUEPRINTS if p.stem == name))
    torch.manual_seed(0)
    model = build_model(report.graph, discover()).eval()
    for parameter in model.parameters():  # some start at zero, and would hide a wrong edge
        torch.nn.init.normal_(parameter, std=0.2)
    made = {
        "int": lambda *s: torch.randint(0, 9, s),
        "float": torch.rand,
        "bool": lambda *s: torch.ones(s, dtype=torch.bool),
    }
    data = json.loads(to_json(report.graph))
    values = {}
    for port, text in data["inputs"].items():
        kind, *axes = text.split()
        values[port] = made[kind](*[{"batch": 2, "length": 6}.get(a) or int(a) for a in axes])
    with torch.no_grad():
        expected = model(**values)
        for node in data["nodes"]:
            module = model.get_submodule(node["path"])
            ports = module.signature(module.config, {"*": sum(map(len, node["inputs"].values()))}).inputs
            arguments: list[torch.Tensor | None] = []
            for port in ports:
                fed = [values[v] for v in node["inputs"].get(port.name, [])]
                arguments += fed if fed or port.variadic else [None]
            result = module(*arguments)
            results = result if isinstance(result, tuple) else (result,)
            values |= {f"{node['path']}.{p}": r for p, r in zip(node["outputs"], results, strict=True)}
    for port, output in data["outputs"].items():
        torch.testing.assert_close(values[output["from"]], expected[port], rtol=0, atol=0)


# -- Mermaid ----------------------------------------------------------------------------------------------------------

DECLARED = re.compile(r"(?:^\s*|--> )(?:subgraph )?(\w+)[\[(]", re.MULTILINE)
JOINED = re.compile(r"^\s*(\w+) --> (\w+)", re.MULTILINE)


def folded(graph: Graph) -> set[tuple[str, ...]]:
    """Every box of a drawing with repeats folded, from the paths with repeats counted out."""
    boxes = set()
    for path, _ in graph.root.walk():
        parts = [p for p in path.split(".") if not p.isdecimal()]
        boxes |= {tuple(parts[: i + 1]) for i in range(len(parts))}
    return boxes


def assert_sound(text: str, boxes: int) -> None:
    """Each box has an id of its own, and each edge joins two of them."""
    ids = DECLARED.findall(text)
    assert len(set(ids)) == len(ids) == boxes, ids
    assert {end for pair in JOINED.findall(text) for end in pair} <= set(ids)


def test_mermaid_ids_are_apart_and_edges_join_them(graph: Graph) -> None:
    text = to_mermaid(graph)
    assert_sound(text, len(folded(graph)) + len(graph.root.inputs) + len(graph.root.outputs))
    assert len(JOINED.findall(text)) >= len(graph.root.steps)
    assert text.count("subgraph ") == len(re.findall(r"^\s*end$", text, re.MULTILINE))


CLASH = """\
blueprint: 1
name: clash
axes: {b: batch, d: 4}
inputs: {x: float b d, input: float b d}
outputs: {x: output, input_x: a_b.x, same: x}
blocks:
  part: {inputs: {x: float b d}, outputs: {x: b_}, nodes: {b: {op: rms_norm, in: x}, b_: {op: rms_norm, in: b}}}
nodes:
  a: {block: part, in: x}
  a_: {block: part, in: input}
  a_b: {block: part, in: a}
  a_u: {op: add, in: [a, a_, a_b]}
  a__b: {op: add, in: [a_u, x]}
  output: {op: add, in: [a__b, input]}
"""


def test_names_whose_ids_could_collide(tmp_path: Path) -> None:
    """``a_b`` and ``a.b``, a node called like an output, an output that is an input."""
    (tmp_path / "clash.yaml").write_text(CLASH)
    graph = check(tmp_path / "clash.yaml").graph
    text = to_mermaid(graph)
    assert_sound(text, 6 + 3 * 2 + 2 + 3)
    assert ("i_x", "o_same") in JOINED.findall(text)
    ET.fromstring(to_svg(graph))


# -- SVG --------------------------------------------------------------------------------------------------------------

Rectangle = tuple[float, float, float, float]
MOVED = re.compile(r"translate\((-?[\d.]+),(-?[\d.]+)\)")


def placed(item: ET.Element, x: float = 0.0, y: float = 0.0) -> Iterator[tuple[ET.Element, float, float]]:
    """Every element under ``item`` with the origin of its coordinates: groups move what they hold."""
    for child in item:
        if moved := MOVED.fullmatch(child.get("transform", "")):
            yield from placed(child, x + float(moved[1]), y + float(moved[2]))
        else:
            yield child, x, y


def rectangles(root: ET.Element) -> list[tuple[str, Rectangle]]:
    found = []
    for item, dx, dy in placed(root):
        if item.tag == f"{SVG}rect":
            x, y, width, height = (float(item.get(k, "0")) for k in ("x", "y", "width", "height"))
            found.append((item.findtext(f"{SVG}title", ""), (x + dx, y + dy, x + dx + width, y + dy + height)))
    return found


def inside(a: Rectangle, b: Rectangle) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def apart(a: Rectangle, b: Rectangle) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_svg_is_xml_and_its_boxes_are_nested_or_apart(graph: Graph) -> None:
    root = ET.fromstring(to_svg(graph))
    assert root.tag == f"{SVG}svg"
    found = rectangles(root)
    assert {title for title, _ in found if title} == {".".join(box) for box in folded(graph)}
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    for (one, a), (two, b) in itertools.combinations(found, 2):
        assert inside(a, (0, 0, width, height))
        if one and two.startswith(one + "."):
            assert inside(b, a)
        elif found[0][1] not in (a, b):  # the first is the frame around all
            assert apart(a, b) or inside(b, a), (one, two)


NUMBER = r"(-?[\d.]+)"
MOVE = re.compile(rf"M{NUMBER},{NUMBER}|V{NUMBER}|C{NUMBER},{NUMBER} {NUMBER},{NUMBER} {NUMBER},{NUMBER}")


Points = list[tuple[float, float]]


def points(path: str, dx: float, dy: float) -> Points:
    """Points along a path, close together."""
    found: Points = []
    for move in MOVE.finditer(path):
        numbers = [float(n) for n in move.groups() if n is not None]
        x, y = found[-1] if found else (0.0, 0.0)
        if move[0][0] == "M":
            found.append((numbers[0], numbers[1]))
        elif move[0][0] == "V":
            found += [(x, y + (numbers[0] - y) * i / 50) for i in range(1, 51)]
        else:
            xs, ys = [x, *numbers[::2]], [y, *numbers[1::2]]
            for i in range(1, 51):
                s = i / 50
                weights = ((1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s * s * (1 - s), s**3)
                found.append((float(np.dot(weights, xs)), float(np.dot(weights, ys))))
    return [(x + dx, y + dy) for x, y in found]


def edges(root: ET.Element) -> list[Points]:
    wires = [(item, dx, dy) for item, dx, dy in placed(root) if item.tag == f"{SVG}path"]
    return [points(wire.get("d", ""), dx, dy) for wire, dx, dy in wires]


def test_no_edge_runs_behind_a_box(graph: Graph) -> None:
    """An edge may lie within a frame as a whole, but passes through no box."""
    root = ET.fromstring(to_svg(graph))
    wires = edges(root)
    assert len(wires) >= len(graph.root.steps)
    for wire in wires:
        assert len(wire) > 50
        for title, (left, top, right, foot) in rectangles(root):
            within = [left < x < right and top + 0.1 < y < foot - 0.1 for x, y in wire]
            assert all(within) or not any(within), title


def crossings(root: ET.Element) -> int:
    """Number of times that two wires change sides, of all that are drawn, by their heights."""
    found = 0
    for one, two in itertools.combinations(edges(root), 2):
        a, b = np.array(one), np.array(two)
        top, foot = max(a[0, 1], b[0, 1]), min(a[-1, 1], b[-1, 1])
        if top < foot:
            heights = np.linspace(top, foot, 600)
            apart = np.interp(heights, a[:, 1], a[:, 0]) - np.interp(heights, b[:, 1], b[:, 0])
            sides = np.sign(apart[np.abs(apart) > 0.3])
            found += int((sides[1:] != sides[:-1]).sum())
    return found


def test_few_wires_cross(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than in the blueprint's order, where any cross; of no blueprint more than five."""
    after = crossings(ET.fromstring(to_svg(graph)))
    monkeypatch.setattr(draw, "arrange", lambda box, layers: box.arrange(layers))
    before = crossings(ET.fromstring(to_svg(graph)))
    assert after < before or after == before == 0
    assert after <= 5


def test_an_edge_runs_down_and_turns_back_at_most_once(graph: Graph) -> None:
    """Out to its lane and back from it; not from side to side on the way."""
    for wire in edges(ET.fromstring(to_svg(graph))):
        assert all(a[1] <= b[1] + 0.1 for a, b in itertools.pairwise(wire))
        sides = [b[0] > a[0] for a, b in itertools.pairwise(wire) if abs(a[0] - b[0]) > 1e-6]
        assert sum(a != b for a, b in itertools.pairwise(sides)) <= 1


def test_an_edge_into_a_frame_ends_above_the_input_that_it_feeds(tmp_path: Path) -> None:
    root = ET.fromstring(to_svg(check(write_nested(tmp_path)).graph))
    boxes = rectangles(root)
    frames = [box for _, box in boxes if any(other != box and inside(other, box) for _, other in boxes)][1:]
    for frame in frames:
        ports = [(box[0] + box[2]) / 2 for title, box in boxes if not title and inside(box, frame)]
        for end in (wire[-1] for wire in edges(root) if abs(wire[-1][1] - frame[1]) < 3.5):
            if frame[0] < end[0] < frame[2]:
                assert min(abs(end[0] - x) for x in ports) < 0.2


def test_svg_escapes_what_it_is_given(small: Callable[..., Path]) -> None:
    graph = check(small()).graph
    odd = Graph(name="<script>&\"'", root=graph.root, axes=graph.axes)
    texts = [t.text for t in ET.fromstring(to_svg(odd)).iter(f"{SVG}text")]
    assert "<script>&\"'" in texts
