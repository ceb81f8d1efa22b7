"""Location of errors that components raise while a block is verified, and verification of what inversion rules return."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.errors import EnvironmentFault, SeddGraphError
from sedd_graph.inverse import Solve
from sedd_graph.inverse.flat import Flat, Node

__all__ = ["check_rules", "located"]


def located(error: Exception, flat: Flat) -> str:
    """Return the text of an error, with the block, node, op and Python package of the component that raised it.

    Args:
        error: The error. The component is the innermost one in its traceback.
        flat: The flattened block.
    """
    text = str(error) if isinstance(error, SeddGraphError) else f"{type(error).__name__}: {error}"
    path = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Component):
            path = owner.context.path
    if path is None:
        return text
    found = [node for node in flat.nodes if path == node.path or path.endswith(f".{node.path}")]
    if not found:
        return f"{path}: {text}"
    return f"{_named(flat, max(found, key=lambda node: len(node.path)))}: {text}"


def _named(flat: Flat, node: Node) -> str:
    contract = node.op.contract
    return f"block {flat.region.label!r}, node {node.path!r}: op {contract.name!r} ({contract.distribution})"


@torch.no_grad()
def check_rules(run: LayerRun) -> None:
    """Verify that each inversion rule of a layer's inverse returns tensors like those that the forward pass read.

    Their values are not compared.

    Args:
        run: Execution of the layer, after :meth:`LayerRun.forward`.

    Raises:
        EnvironmentFault: A rule or log-determinant names no method, or a rule returns another number of tensors, or a
            tensor of another shape or data type.
    """
    layout = run.layout
    nodes = {node.path: node for node in layout.flat.nodes}
    for step in layout.inverse:
        d = step.derivation
        if not isinstance(d, Solve):
            continue
        where, module = _named(layout.flat, nodes[d.path]), layout.by_path[d.path].module(run.layer)
        for what, name in (("inversion rule", d.rule.method), ("log-determinant", d.log_det)):
            if name not in (None, "zero") and not callable(getattr(module, name, None)):
                raise EnvironmentFault(f"{where}: its {what} names {name!r}, which is no method")
        made = getattr(module, d.rule.method)(*[None if v < 0 else run.values[v] for v in step.given])
        parts = made if isinstance(made, tuple) else (made,)
        rule = f"{where}: its inversion rule {d.rule.method!r}"
        if len(parts) != len(d.rule.targets):
            raise EnvironmentFault(f"{rule} gives {len(parts)} values, not one for each of {', '.join(d.rule.targets)}")
        for name, value, part in zip(d.rule.targets, step.targets, parts, strict=True):
            expected = run.values[value]
            if not isinstance(part, Tensor):
                raise EnvironmentFault(f"{rule} gives {name!r} as a {type(part).__name__}, not a tensor")
            if part.shape != expected.shape or part.dtype != expected.dtype:
                raise EnvironmentFault(f"{rule} gives {name!r} as {_described(part)}, not as {_described(expected)}")


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
