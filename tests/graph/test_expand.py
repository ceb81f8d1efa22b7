"""Expansion: stable names, one region for all repeats, and each way in which a graph cannot be made."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import networkx as nx
import pytest
from jaxtyping import Float
from torch import Tensor

from sedd_graph.blueprint.load import load
from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.registry import Registry, discover
from sedd_graph.engine.construct import build_shapes
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.expand import expand
from sedd_graph.graph.model import Graph, Op, Region
from tests.conftest import BLUEPRINTS
from tests.graph.nested import write_nested


class Folded(Component, kind="mixer"):
    """Asks for a width that it cannot tell apart into two."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l h*r"], y: Float[Tensor, "h"] | None = None) -> Float[Tensor, "b l"]:
        raise NotImplementedError


REGISTRY = discover() | Registry.of({"folded": Folded})


def graph_of(path: Path) -> Graph:
    return expand(load(path), REGISTRY)


@pytest.mark.parametrize(
    "name", ["nested", *(p.stem for p in BLUEPRINTS if "small" not in p.stem and "medium" not in p.stem)]
)
def test_node_path_is_module_path_is_state_dict_key(name: str, tmp_path: Path) -> None:
    path = write_nested(tmp_path) if name == "nested" else next(p for p in BLUEPRINTS if p.stem == name)
    graph = graph_of(path)
    model = build_shapes(graph, REGISTRY)
    steps, modules = dict(graph.root.walk()), dict(model.named_modules())
    for where, step in steps.items():
        assert isinstance(step.body, Op)
        assert type(modules[where]) is REGISTRY.component(step.body.contract.op)
        assert modules[where].context.path == where
    assert sum(isinstance(m, Component) for m in model.modules()) == len(steps) == graph.root.size
    owners = {next(w for w in steps if key.startswith(w + ".")) for key in model.state_dict()}
    assert owners == {w for w in steps if list(modules[w].parameters())}
    held = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(held[key].shape == value.shape for key, value in model.state_dict().items())
    assert set(model.tap_names) == {where for where, _, _ in graph.taps}


def test_names_of_nested_blocks_and_repeats(tmp_path: Path) -> None:
    graph = graph_of(write_nested(tmp_path))
    stack = ["norm", "mix.conv", "mix.parts", "mix.swapped", "mix.attention", "fed"]
    expected = [f"first.{half}.{s}" for half in ("half1.0", "half2") for s in stack]
    expected += [f"wide.{i}.{half}.{s}" for i in range(2) for half in ("half1.0", "half1.1", "half2") for s in stack]
    assert [path for path, _ in graph.root.walk()] == [*expected, "join"]
    saved = [f"{w}.norm.out" for w in ("first.half1.0", "first.half2")]
    saved += [f"wide.{i}.{half}.norm.out" for i in range(2) for half in ("half1.0", "half1.1", "half2")]
    assert [path for path, _, _ in graph.taps] == [*saved, "wide.y"]


def test_parameters_and_axes_are_those_of_each_use(tmp_path: Path) -> None:
    graph = graph_of(write_nested(tmp_path))
    widths = {p: s.body.config.model_dump()["width"] for p, s in graph.root.walk() if p.endswith("conv") and isinstance(s.body, Op)}  # fmt: skip
    assert widths["first.half1.0.mix.conv"] == 3
    assert {w for p, w in widths.items() if p != "first.half1.0.mix.conv"} == {1}


def test_repeats_share_one_region(small: Callable[..., Path]) -> None:
    trunk = graph_of(small(("depth: 2", "depth: 4096"))).root.by_name["trunk"].body
    assert isinstance(trunk, Region)
    assert (trunk.repeat, trunk.size, len(trunk.steps)) == (4096, 5 * 4096, 4096)
    assert len({id(s.body) for s in trunk.steps}) == 1
    assert nx.is_directed_acyclic_graph(trunk.digraph)
    assert nx.dag_longest_path_length(trunk.digraph) == 4096


def test_nodes_may_be_written_in_any_order(tmp_path: Path, small: Callable[..., Path]) -> None:
    lines = small().read_text().splitlines()
    at = lines.index("nodes:")
    lines[at + 1 : at + 4] = lines[at + 3 : at : -1]
    (tmp_path / "turned.yaml").write_text("\n".join(lines))
    assert [s.name for s in graph_of(tmp_path / "turned.yaml").root.steps] == ["embed", "trunk", "head"]


TINY = """\
blueprint: 1
name: tiny
params: {half: 0.5}
axes: {b: batch, l: length, d: 12, e: 4}
inputs: {x: float b l d}
outputs: {y: LAST}
nodes:
"""


def tiny(nodes: Mapping[str, str], blocks: Mapping[str, str] | None = None) -> str:
    text = TINY.replace("LAST", list(nodes)[-1]) + "".join(f"  {n}: {{{v}}}\n" for n, v in nodes.items())
    return text + ("blocks:\n" + "".join(f"  {n}: {{{v}}}\n" for n, v in blocks.items()) if blocks else "")


def problems(path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(BlueprintError) as error:
        expand(load(path), REGISTRY)
    for problem in error.value.problems:
        here, key = text.splitlines()[problem.line - 1][problem.col - 1 :], problem.path.rpartition(".")[2]
        assert here.startswith(f"{key}:") or re.fullmatch(r".*\[\d+\]", key), (here, problem)
    return [f"{p.path}: {p.message}" for p in error.value.problems]


BODY = "inputs: {x: TYPE}, outputs: {x: n}, nodes: {n: {op: rms_norm, in: x}}"
REFUSED: list[tuple[str, Mapping[str, str], Mapping[str, str], list[str]]] = [
    (
        "an axis of an op that nothing binds",
        {"n": "op: folded, in: x"},
        {},
        ["nodes.n.in: input 'x' of op 'folded' expects float b l h*r, but receives float batch length 12: h*r = 12 cannot be solved for h and r; so far b=batch, l=length"],
    ),
    (
        "a dimension of a block that only the blueprint's axes can tell",
        {"n": "block: part, in: x"},
        {"part": BODY.replace("TYPE", "float b l d+e")},
        ["nodes.n.in: input 'x' of block 'part' expects float b l d+e, but receives float batch length 12: d+e = 16, not 12; so far b=batch, l=length, d=12, e=4"],
    ),
    (
        "a dimension of a block that nothing tells",
        {"n": "block: part, in: x"},
        {"part": BODY.replace("TYPE", "float b l h*r")},
        ["nodes.n.in: input 'x' of block 'part' expects float b l h*r, but receives float batch length 12: h*r = 12 cannot be solved for h and r; so far b=batch, l=length"],
    ),
    (
        "a declared size that is not one",
        {"n": "op: rms_norm, in: x, out: float b l d-3*e"},
        {},
        ["nodes.n.out: port type 'float b l d-3*e': d-3*e = 0, but a size is at least 1"],
    ),
    (
        "a declared type of a block's output",
        {"n": "block: part, in: x, out: {x: float b l e, z: float b}"},
        {"part": BODY.replace("TYPE", "float b l d")},
        [
            "nodes.n.out.x: output 'x' is float batch length 12, not float batch length 4",
            "nodes.n.out.z: no output 'z'; outputs: x",
        ],
    ),
    (
        "a port of an input",
        {"n": "op: rms_norm, in: x.out"},
        {},
        ["nodes.n.in: 'x' is an input and has no ports"],
    ),
    (
        "one of several outputs",
        {"s": "op: split, in: x, with: {sizes: [d//2, d//2]}", "n": "op: rms_norm, in: s"},
        {},
        ["nodes.n.in: 's' has several outputs: name one of s.x0, s.x1"],
    ),
    (
        "two values for one port",
        {"n": "op: rms_norm, in: {x: [x, x]}"},
        {},
        ["nodes.n.in.x[1]: input 'x' of op 'rms_norm' takes one value, not several"],
    ),
    (
        "sizes in a list",
        {"s": "op: split, in: x, with: {sizes: [d//5, q, l]}", "n": "op: rms_norm, in: s.x0"},
        {},
        [
            "nodes.s.with.sizes[0]: 12 is not divisible by 5",
            "nodes.s.with.sizes[1]: unknown axis 'q'; known: b, l, d, e",
            "nodes.s.with.sizes[2]: 'l' depends on length, which is known only when a step runs",
        ],
    ),
    (
        "a list that is too short, or whose items are wrong",
        {"s": "op: split, in: x, with: {sizes: [12]}", "t": "op: split, in: x, with: {sizes: [{}, 6]}", "n": "op: add, in: [s.x0, t.x0]"},
        {},
        [
            "nodes.s.with.sizes: tuple should have at least 2 items after validation, not 1",
            "nodes.t.with.sizes[0]: must be an integer, not a mapping",
        ],
    ),
    (
        "a repeat that no one knows",
        {"n": "block: part, repeat: l, in: x"},
        {"part": BODY.replace("TYPE", "float b l d")},
        ["nodes.n.repeat: repeat is length: it must be from 1 to 4096"],
    ),
    (
        "parameters of the wrong kind",
        {"m": "op: rms_norm, in: x, out: '${params.half}'", "n": "block: part, repeat: '${params.half}', in: m"},
        {"part": BODY.replace("TYPE", "float b l d")},
        [
            "nodes.m.out: must be a string or a mapping, not 0.5",
            "nodes.n.repeat: must be an integer or a string, not 0.5",
        ],
    ),
    (
        "a star in a blueprint",
        {"n": "op: rms_norm, in: x, out: float *s d"},
        {},
        ["nodes.n.out: port type 'float *s d': a starred axis cannot stand in a blueprint"],
    ),
    (
        "an axis that a block does not know",
        {"n": "block: part, in: x"},
        {"part": "inputs: {x: float b l dd}, outputs: {x: n}, nodes: {n: {op: rms_norm, in: x, out: float b l ddd}}"},
        ["blocks.part.nodes.n.out: unknown axis 'ddd' (did you mean 'dd'?); known: b, l, d, e, dd"],
    ),
    (
        "a block with a problem that two blocks use",
        {"m": "block: one, in: x", "k": "block: two, in: x", "n": "op: add, in: [m, k]"},
        {n: BODY.replace("TYPE", "float b l d").replace("op: rms_norm", "block: part") for n in ("one", "two")} | {"part": BODY.replace("TYPE", "float b l d").replace("rms_norm", "rmsnorm")},
        ["blocks.part.nodes.n.op: unknown op 'rmsnorm' (did you mean 'rms_norm'?); `sedd-graph components` lists them"],
    ),
    (
        "a node called like an input",
        {"x": "op: rms_norm, in: x"},
        {},
        ["nodes.x: node 'x' has the name of an input"],
    ),
    (
        "more components than there may be",
        {"n": "block: big, repeat: 4096, in: x"},
        {"big": "inputs: {x: float b l d}, outputs: {x: n}, nodes: {n: {block: part, repeat: 32, in: x}}", "part": BODY.replace("TYPE", "float b l d")},
        ["nodes.n.repeat: expands to more than 100000 components"],
    ),
    (
        "blocks nested too deep",
        {"n": "block: p0, in: x"},
        {f"p{i}": f"inputs: {{x: float b l d}}, outputs: {{x: n}}, nodes: {{n: {{block: p{i + 1}, in: x}}}}" for i in range(40)},
        ["blocks.p31.nodes.n.block: blocks nested deeper than 32"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "blocks", "messages"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_cannot_be_expanded(
    nodes: Mapping[str, str], blocks: Mapping[str, str], messages: list[str], tmp_path: Path
) -> None:
    assert problems(tmp_path / "tiny.yaml", tiny(nodes, blocks)) == messages


def test_a_block_may_use_the_axes_of_the_blueprint(tmp_path: Path) -> None:
    nodes = {"n": "block: part, in: x"}
    (tmp_path / "tiny.yaml").write_text(tiny(nodes, {"part": BODY.replace("TYPE", "float b l e+w")}))
    region = graph_of(tmp_path / "tiny.yaml").root.by_name["n"].body
    assert isinstance(region, Region)
    assert str(region.output_types["x"]) == "float batch length 12"  # e = 4 is the blueprint's, so w is 8


def test_a_problem_of_an_include_names_its_file(tmp_path: Path) -> None:
    path = write_nested(tmp_path)
    inner = tmp_path / "inner.yaml"
    inner.write_text(inner.read_text().replace("heads: 2", "heads: 5"))
    with pytest.raises(BlueprintError) as error:
        graph_of(path)
    assert {(p.file, p.line, p.path) for p in error.value.problems} == {
        (str(inner), 11, "blocks.mix.nodes.attention.in.x")
    }
