"""Split of a network in two: the trunk, evaluated at all positions, and a position-wise end, evaluated at a few.

Axes: b batch, l length, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sedd_graph.component.axes import PortType, Size
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.stage import Stage
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix, length_dim
from sedd_graph.engine.regions import Model, Plan, RegionModule
from sedd_graph.graph.model import Graph, Op, Ref, Step

__all__ = ["Layout", "Split", "begin", "outputs_of", "split"]

_ROWS = (Size.of("batch"), Size.of("b"))
"""Sizes that mark the axis of rows."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a tensor that the end reads, of which the entries at some positions are taken.

    Attributes:
        rows: Whether its first axis is that of rows.
        length: Index of the axis of positions; None if it has none.
    """

    rows: bool
    length: int | None

    @classmethod
    def of(cls, found: PortType) -> Layout:
        """Return the layout of a tensor type.

        Raises:
            ValueError: The type has several axes of positions or of rows, or rows elsewhere than first.
        """
        length = length_dim(found)
        rows = [i for i, dim in enumerate(found.dims) if dim.variadic or {"batch", "b"} & dim.size.symbols]
        if (
            rows not in ([], [0])
            or (rows and found.dims[0].size not in _ROWS)
            or (not rows and length not in (None, 0))
        ):
            raise ValueError(f"{found} has no one axis of rows, the first")
        return cls(bool(rows), length)

    def take(self, value: Tensor, groups: Groups) -> Tensor:
        """Return the entries at the positions of groups, [g, ..., m, ...], or [g, ...] without positions.

        A tensor with neither rows nor positions, such as a weight, is returned whole.

        Args:
            value: Tensor of this layout.
            groups: The groups.
        """
        if self.length is None:
            return value[groups.row] if self.rows else value
        if not self.rows:
            return value[groups.place]
        return value.movedim(self.length, 1)[groups.row[:, None], groups.place].movedim(1, self.length)

    def zeros(self, value: Tensor) -> Tensor:
        """Return zeros to which :meth:`add` adds gradients: like ``value``, in float32 where many are summed in bfloat16."""
        summed = self.length is None and value.element_size() < 4
        return value.new_zeros(value.shape, dtype=value.new_zeros(()).float().dtype if summed else value.dtype)

    def add(self, total: Tensor, gradient: Tensor, groups: Groups) -> None:
        """Add the gradient of what :meth:`take` returned to that of the tensor, ``total``, in place."""
        if self.length is None:
            total.index_add_(0, groups.row, gradient.to(total.dtype)) if self.rows else total.add_(gradient)
        elif not self.rows:
            total.index_add_(0, groups.place.reshape(-1), gradient.flatten(0, 1).to(total.dtype))
        else:
            where = groups.row[:, None] * total.shape[self.length] + groups.place
            flat = total.movedim(self.length, 1).flatten(0, 1)
            if flat.data_ptr() == total.data_ptr():
                flat.index_add_(0, where.reshape(-1), gradient.movedim(self.length, 1).flatten(0, 1))
            else:
                rows = groups.row[:, None].expand_as(groups.place)
                total.movedim(self.length, 1).index_put_(
                    (rows, groups.place), gradient.movedim(self.length, 1), accumulate=True
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A network as a trunk and a position-wise end.

    Attributes:
        trunk: Module of the nodes before the end: the network's inputs to the tensors that the end reads, followed by the
            saved activations. Its components are those of the network.
        layouts: Layout of each of these tensors.
        steps: Nodes of the end, in order: the name, and for each argument its index among the tensors read and those
            computed by the end; -1 for an optional port that is not connected.
        counts: Number of outputs of each of these nodes.
        outputs: The network's outputs: name, and index as above.
        width: Largest number of values that a node of the end computes at a position, such as the size of the vocabulary.
    """

    trunk: RegionModule
    layouts: tuple[Layout, ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    counts: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]
    width: int


def outputs_of(parts: Split, nodes: Sequence[nn.Module], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Evaluate the end of a network, and return the network's outputs by name.

    Args:
        parts: The split network.
        nodes: Modules of the nodes of the end, in order.
        values: The tensors that the end reads.
    """
    found: list[Any] = list(values)
    for node, (_, places) in zip(nodes, parts.steps, strict=True):
        made = node(*[None if i < 0 else found[i] for i in places])
        found.extend(made if isinstance(made, tuple) else (made,))
    return {name: found[i] for name, i in parts.outputs}


def begin(
    model: Model, parts: Split | None, inputs: Mapping[str, Tensor], key: Tensor | None = None
) -> tuple[Stage, dict[str, Tensor]]:
    """Evaluate the trunk of a network.

    Args:
        model: Module of the network.
        parts: The network as a trunk and an end; None if it has no such end: it is evaluated whole.
        inputs: Input tensors by name.
        key: Dropout key of each row, int32 [b]; None turns dropout off.

    Returns:
        What the outputs are computed from where they are read, and the saved activations by dotted path.
    """
    if parts is None:
        outputs, saved = model.run(inputs, key)
        return Stage.of(outputs), saved
    layouts, modules = parts.layouts, model.root._modules
    nodes: list[Any] = [modules[name] for name, _ in parts.steps]
    values = parts.trunk(key, *[inputs[name] for name in model.input_names])

    def finish(values: Sequence[Tensor], groups: Groups) -> dict[str, Tensor]:
        taken = [layout.take(value, groups) for layout, value in zip(layouts, values, strict=True)]
        return outputs_of(parts, nodes, taken)

    stage = Stage(tuple(values[: len(layouts)]), tuple(layout.rows for layout in layouts), finish)
    return stage, dict(zip(model.tap_names, values[len(layouts) :], strict=True))


def split(graph: Graph, model: Model) -> Split | None:
    """Split a network before its position-wise end: its last nodes that map every position independently.

    Nodes that draw random numbers (dropout), and nodes whose activations are saved, stay in the trunk.

    Args:
        graph: Typed graph of the network.
        model: Its module.

    Returns:
        The split; None if no output is computed by such an end.
    """
    root, plan = graph.root, model.root.plan
    modules: dict[str, Any] = model.root._modules
    held = [s.name for s in root.steps if s.save is not None or modules[s.name].keyed]
    try:
        suffix = PositionwiseSuffix(root, held)
    except ValueError:  # an output without one axis of positions
        return None
    if not any(inside for inside, _ in suffix.outputs):
        return None
    # all values of the plan, in its order; those without a port are saved activations within regions
    values, counts = [Ref("", name) for name in root.inputs], []
    for step in root.steps:
        inner = 0 if isinstance(step.body, Op) else modules[step.name].plan.saved
        made = [Ref(step.name, port) for port in _ports(step)] + [Ref(step.name, "")] * inner
        values += made
        counts.append(len(made))
    before = [i for i, ref in enumerate(values) if ref.step not in suffix.dims]
    steps = list(zip(plan.steps, counts, strict=True))
    end = [(name, places, count) for (name, places), count in steps if name in suffix.dims]
    outputs = plan.returned[: len(root.outputs)]
    read = {i for _, places, _ in end for i in places if i >= 0} | set(outputs)
    needed = [i for i in before if i in read]
    try:
        layouts = tuple(Layout.of(root.type_of(values[i])) for i in needed)
    except ValueError:
        return None
    place = {-1: -1} | {old: new for new, old in enumerate(before)}
    kept = [number for number, ((name, _), _) in enumerate(steps) if name not in suffix.dims]
    own = tuple((plan.steps[n][0], tuple(place[i] for i in plan.steps[n][1])) for n in kept)
    returned = tuple(place[i] for i in [*needed, *plan.returned[len(root.outputs) :]])
    trunk = RegionModule({name: modules[name] for name, _ in own}, Plan(own, returned, plan.saved, tuple(kept)))
    inside = [i for i, ref in enumerate(values) if ref.step in suffix.dims]
    local = {-1: -1} | {old: new for new, old in enumerate([*needed, *inside])}
    return Split(
        trunk,
        layouts,
        tuple((name, tuple(local[i] for i in places)) for name, places, _ in end),
        tuple(count for _, _, count in end),
        tuple((name, local[i]) for name, i in zip(root.outputs, outputs, strict=True)),
        max(_width(root.type_of(values[i])) for i in inside),
    )


def _ports(step: Step) -> list[str]:
    return [p.name for p in step.body.signature.outputs] if isinstance(step.body, Op) else list(step.body.outputs)


def _width(found: PortType) -> int:
    """Return the number of values of a tensor at a position."""
    sizes = [dim.size.constant for dim in found.dims if dim.variadic is None]
    return math.prod(size for size in sizes if size is not None)
