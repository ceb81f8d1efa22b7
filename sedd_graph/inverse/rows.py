"""Verification that a log-determinant can be stated for each row of a batch: no row influences another one.

A component or contraction computes one log-determinant for each index of axis 0. These are the log-determinants of the
rows of the batch only if axis 0 of the tensors concerned is the axis ``batch``, as their port types tell. It is assumed
that a component treats the indices of axis 0 independently; no such assumption is made for other axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sedd_graph.component.axes import AxisError, PortType, Size
from sedd_graph.graph.model import Ref
from sedd_graph.inverse.flat import Flat, Node, numbers
from sedd_graph.inverse.program import Contraction, Derivation, Linear, Solve

__all__ = ["batch_first", "mixed_rows"]

_BATCH = "batch"


def batch_first(found: PortType) -> bool:
    """Return whether axis 0 of a port type is the batch, and the size of no other axis depends on the batch."""
    places = [i for i, d in enumerate(found.dims) if _BATCH in d.size.symbols]
    return places == [0] and found.dims[0].size == Size.of(_BATCH)


def mixed_rows(flat: Flat, derivations: Iterable[Derivation]) -> str:
    """Return why a region's log-determinant cannot be stated separately for each row of the batch; empty if it can.

    Args:
        flat: The flattened region.
        derivations: Derivations of its inverse program.
    """
    if not any(map(_depends, flat.types)):
        return ""
    of_path = {node.path: node for node in flat.nodes}
    types = dict(zip(flat.refs, flat.types, strict=True))
    for d in derivations:
        if (reason := _of_term(d, of_path, types)) is not None:
            return reason
    for node in flat.nodes:
        if (reason := _of_node(flat, node)) is not None:
            return reason
    return ""


def _of_term(d: Derivation, of_path: Mapping[str, Node], types: Mapping[Ref, PortType]) -> str | None:
    """Return why the term of a derivation has no value for each row, or None where it has."""
    if isinstance(d, Solve) and d.log_det not in (None, "zero"):
        node = of_path[d.path]
        ports = {name: types[refs[0]] for name, refs in d.inputs.items()} | dict(node.step.outputs)
        for name, found in ports.items():
            if not batch_first(found) and (name in d.rule.targets or name in node.step.outputs or _depends(found)):
                return (
                    f"op {node.op.contract.name!r} ({d.path}) computes a log-determinant for each index of axis 0, and "
                    f"at its port {name!r} ({found}) that axis is not the batch: move the batch to axis 0 before it"
                )
    elif isinstance(d, Contraction):
        found = types[d.target]
        if not batch_first(found):
            return (
                f"the log-determinant of the contraction that gives {d.target} ({found}) is one for each index of axis 0, "
                "which is not the batch: move the batch to axis 0 before it"
            )
    elif isinstance(d, Linear) and d.factor != 1:
        found = types[d.targets[0]]
        try:
            numbers(found) // Size.of(_BATCH)
        except AxisError:
            return f"{d.targets[0]} ({found}) does not hold the same number of elements for each row of the batch"
    return None


def _of_node(flat: Flat, node: Node) -> str | None:
    """Return why a component may let one row influence another one, or None where it does not."""
    ins = [flat.types[v] for v in node.needs]
    outs = [flat.types[v] for v in node.outputs.values()]
    if not any(_depends(found) for found in ins):
        return None
    if all(batch_first(found) or not _depends(found) for found in ins) and all(map(_depends, outs)):
        # rows on axis 0 of all that goes in: the component keeps them apart, wherever its outputs have them
        return None
    if node.algebra.linear.keys() >= node.outputs.keys():
        return None
    if node.algebra.moves and all(map(_whole, [*ins, *outs])) and not set(map(str, ins)) & set(map(str, outs)):
        return None  # axes in another order, a split or a concatenation
    if node.op.contract.positionwise and not any(_BATCH in t.dims[-1].size.symbols for t in [*ins, *outs] if t.dims):
        return None
    found = next((t for t in ins if _depends(t) and not batch_first(t)), outs[0])
    return (
        f"op {node.op.contract.name!r} ({node.path}) takes the indices of axis 0 for independent rows, and at {found} that "
        "axis is not the batch: one row of the batch may influence another one"
    )


def _depends(found: PortType) -> bool:
    return _BATCH in found.symbols


def _whole(found: PortType) -> bool:
    """Return whether one axis of a port type is the batch, and no other one depends on it, or none does."""
    sizes: Iterator[Size] = (d.size for d in found.dims if _BATCH in d.size.symbols)
    return [size == Size.of(_BATCH) for size in sizes] in ([], [True])
