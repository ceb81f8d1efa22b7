"""Position-wise suffix of a network: its last nodes, each of which maps every position independently.

It is evaluated where its outputs are read (:mod:`sedd_graph.engine.split`). With a vocabulary of 50,257 tokens most of the
work is in the output head, which is in the suffix. Axes: b batch, l positions of a row, k
selected positions of a row.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from sedd_graph.component.axes import PortType, Size
from sedd_graph.graph.model import Op, Region, Step

__all__ = ["PositionwiseSuffix", "length_dim", "take"]

_LENGTHS = (Size.of("length"), Size.of("l"))
"""Sizes that mark the position axis: ``length`` in a graph, ``l`` in a component's signature."""


def length_dim(found: PortType) -> int | None:
    """Return the index of the position axis of a tensor type, the axis whose size is the number of positions of a row.

    Its size is written ``length`` in a graph and ``l`` in the signature of a component. None if there is no such axis.

    Args:
        found: The tensor type.

    Raises:
        ValueError: The type has several position axes, an axis whose size is another expression in the length (such as
            ``2*length``), or a variadic dimension (such as ``*s``), which may include the position axis.
    """
    where = [i for i, dim in enumerate(found.dims) if dim.variadic is None and dim.size in _LENGTHS]
    other = [d for d in found.dims if d.variadic or ({"length", "l"} & d.size.symbols and d.size not in _LENGTHS)]
    if other or len(where) > 1:
        raise ValueError(f"{found} has no one axis of positions")
    return where[0] if where else None


def take(value: Tensor, at: Tensor, dim: int) -> Tensor:
    """Return the entries of ``value`` at selected positions.

    Args:
        value: Tensor [b, ..., l, ...] with the position axis at ``dim``; for ``dim`` 0, [l, ...] shared by all rows.
        at: Positions, int64 [b, k].
        dim: Index of the position axis.

    Returns:
        Tensor [b, ..., k, ...]; for ``dim`` 0, [b, k, ...].
    """
    if dim == 0:
        return value[at]
    # [b, ..., l, ...]: all of the other dimensions
    shape = [at.shape[0], *[1] * (dim - 1), at.shape[1], *[1] * (value.dim() - dim - 1)]
    full = [*value.shape[:dim], at.shape[1], *value.shape[dim + 1 :]]
    return value.gather(dim, at.view(shape).expand(full))


class PositionwiseSuffix:
    """Position-wise suffix of a graph: its last nodes, which are evaluated only at the positions that are read.

    A node is position-wise if its outputs at a position depend only on its inputs at that position, and on inputs
    without position axis. The suffix is the largest set of position-wise nodes whose outputs are read by no node
    outside the set, such as a final norm and the output head.

    Args:
        root: Top-level region of the graph.
        exclude: Names of nodes that are not in the suffix, and so neither are the nodes that they read.

    Attributes:
        outputs: For each output of the graph, in order: whether a node of the suffix computes it, and the index of its
            position axis (None: no such axis).
    """

    def __init__(self, root: Region, exclude: Collection[str] = ()) -> None:
        users: dict[str, list[str]] = {step.name: [] for step in root.steps}
        for step in root.steps:
            for refs in step.inputs.values():
                for ref in refs:
                    if ref.step:
                        users[ref.step].append(step.name)
        self.dims: dict[str, tuple[int | None, ...]] = {}
        """Index of the position axis of each argument (None: no such axis), by name of the node of the suffix."""
        for step in reversed(root.steps):
            own = step.name not in exclude and all(user in self.dims for user in users[step.name])
            dims = self._dims(root, step) if own else None
            if dims is not None:
                self.dims[step.name] = dims
        self.outputs = [(ref.step in self.dims, length_dim(root.type_of(ref))) for ref in root.outputs.values()]

    @staticmethod
    def _dims(root: Region, step: Step) -> tuple[int | None, ...] | None:
        """Return the index of the position axis of each argument; None if the step is not position-wise."""
        if not isinstance(step.body, Op) or not step.body.contract.positionwise:
            return None
        found: list[int | None] = []
        try:
            if any(length_dim(t) != 1 for t in step.outputs.values()):
                return None
            for port in step.body.signature.inputs:
                refs = step.inputs.get(port.name, ())
                found += [length_dim(root.type_of(r)) for r in refs] if refs else [] if port.variadic else [None]
        except ValueError:
            return None
        return tuple(found)
