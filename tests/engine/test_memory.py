"""Memory of a block that runs without gradients: the number of values alive does not grow with its depth."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sedd_graph
from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import RegionModule, last_use
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.claims import uses
from sedd_graph.graph.model import Region, Running
from sedd_graph.inverse import Solve


def chain(folder: Path, layers: int) -> tuple[RegionModule, Layout]:
    nodes = "".join(f"      n{i}: {{op: plu, in: {'x' if i == 0 else f'n{i - 1}'}}}\n" for i in range(layers))
    path = folder / "chain.yaml"
    path.write_text(
        "blueprint: 1\nname: chain\naxes: {b: batch, l: length, d: 4}\ninputs: {x: float b l d}\noutputs: {x: whole}\n"
        "blocks:\n  whole:\n    invertible: {level: bijective}\n    inputs: {x: float b l d}\n"
        f"    outputs: {{x: n{layers - 1}}}\n    nodes:\n{nodes}nodes:\n  whole: {{block: whole, in: x}}\n"
    )
    graph = sedd_graph.check(path).graph
    (use,) = uses(graph.root)
    return build_block(use.layer, discover()), Layout(use.layer, ())


def watch(layer: nn.Module, method: str) -> list[int]:
    """How many of the results of ``method`` are alive at each of its calls."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []

    def watched(component: nn.Module) -> None:
        plain = getattr(component, method)

        def call(*arguments: Any) -> Any:
            counts.append(len(alive))
            made = plain(*arguments)
            alive.add(made[0] if isinstance(made, tuple) else made)
            return made

        setattr(component, method, call)

    for component in layer.children():
        watched(component)
    return counts


def test_last_use() -> None:
    # 0, 1 go in; the steps compute 2, 3, 4
    assert last_use([(0, 1), (2, -1), (2, 0)], [4]) == ((1,), (), (0, 2))
    assert last_use([(0, 1), (2, 2)], [0]) == ((1,), (2,))
    assert last_use([], [0]) == ()


@pytest.mark.parametrize("layers", [2, 12])
def test_a_block_holds_one_value_at_a_time(tmp_path: Path, layers: int) -> None:
    layer, layout = chain(tmp_path, layers)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        counts = watch(layer, "forward")
        (y,) = layer(None, x)
    assert len(counts) == layers
    assert max(counts) <= 1
    with torch.no_grad():
        measured, run = watch(layer, "with_log_det"), LayerRun(layout, layer)
        run.put(layout.inputs.values(), [x])
        log = forward_with_log_det(run, len(x))
    assert len(measured) == layers
    assert max(measured) <= 1
    assert torch.equal(run.values[layout.outputs["x"]], y)
    slopes = torch.stack([p.diagonal().sum() for name, p in layer.named_parameters() if name.endswith("weight")]).sum()
    assert torch.allclose(log, 3 * slopes.expand(2))
    (method,) = {d.rule.method for d in layout.program.derivations if isinstance(d, Solve)}
    inverted, run = watch(layer, method), LayerRun(layout, layer)
    run.put(layout.outputs.values(), [y])
    run.invert()
    assert len(inverted) == layers
    assert max(inverted) <= 1
    assert torch.allclose(run.values[layout.inputs["x"]], x, atol=1e-4)


def test_with_gradients_a_block_gives_the_same(tmp_path: Path) -> None:
    layer, layout = chain(tmp_path, 5)
    layer.double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (y,) = layer(None, x)
    run = LayerRun(layout, layer)
    run.put(layout.inputs.values(), [x])
    forward_with_log_det(run, len(x))
    (one,), (other,) = (torch.autograd.grad(v.square().sum(), x) for v in (y, run.values[layout.outputs["x"]]))
    assert torch.equal(one, other)


def test_a_block_that_only_moves_numbers_changes_no_volume(tmp_path: Path) -> None:
    path = tmp_path / "moves.yaml"
    path.write_text(
        "blueprint: 1\nname: moves\naxes: {b: batch, l: length, d: 4}\ninputs: {x: float b l d}\noutputs: {x: whole}\n"
        "blocks:\n  whole:\n    invertible: {level: volume_preserving}\n    inputs: {x: float b l 2*h}\n"
        "    outputs: {x: out}\n    nodes:\n      half: {op: split, in: x, with: {sizes: [h, h]}}\n"
        "      out: {op: concat, in: [half.x1, half.x0]}\nnodes:\n  whole: {block: whole, in: x}\n"
    )
    (use,) = uses(sedd_graph.check(path).graph.root)
    layer, layout = build_block(use.layer, discover()), Layout(use.layer, ())
    x = torch.randn(2, 3, 4)
    run = LayerRun(layout, layer)
    run.put(layout.inputs.values(), [x])
    assert torch.equal(forward_with_log_det(run, 2), torch.zeros(2))
    assert torch.equal(run.values[layout.outputs["x"]], x.roll(2, -1))


def test_a_block_that_claims_no_inverse_is_not_run_reversibly(tmp_path: Path) -> None:
    """Whoever builds a block by hand gets an error, not stored activations."""
    chain(tmp_path, 2)
    path = tmp_path / "chain.yaml"
    path.write_text(path.read_text().replace("    invertible: {level: bijective}\n", ""))
    region = next(step.body for step in sedd_graph.check(path).graph.root.steps if isinstance(step.body, Region))
    with pytest.raises(BlueprintError, match="block 'whole' claims no inverse"):
        build_block(region, discover(), running=Running("reversible"))
