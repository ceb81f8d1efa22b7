"""Position-wise suffix of a network: the last steps, whose output at a position depends on that position alone.

A sampler that changes a few tokens evaluates the suffix only at those positions; at a vocabulary of 50,257 the head is most
of the work. Axes: b batch, l length, k positions of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sedd_graph.component.axes import PortType, Size
from sedd_graph.engine.regions import Model, RegionModule
from sedd_graph.graph.model import Op, Region, Step

__all__ = ["PositionwiseSuffix", "length_dim", "take"]

_LENGTHS = (Size.of("length"), Size.of("l"))
"""Names of the axis of positions in a graph and in a component's signature."""


def length_dim(found: PortType) -> int | None:
    """Return the dimension of the positions, or None.

    Raises :class:`ValueError` where a dimension depends on the length in another way, or may.
    """
    where = [i for i, dim in enumerate(found.dims) if dim.variadic is None and dim.size in _LENGTHS]
    other = [d for d in found.dims if d.variadic or ({"length", "l"} & d.size.symbols and d.size not in _LENGTHS)]
    if other or len(where) > 1:
        raise ValueError(f"{found} has no one axis of positions")
    return where[0] if where else None


def take(value: Tensor, at: Tensor, dim: int) -> Tensor:
    """Return ``value`` at positions ``at`` int64 [b, k] of dimension ``dim``. With ``dim`` 0 all rows share the value."""
    if dim == 0:
        return value[at]
    # [b, ..., l, ...]: all of the other dimensions
    shape = [at.shape[0], *[1] * (dim - 1), at.shape[1], *[1] * (value.dim() - dim - 1)]
    full = [*value.shape[:dim], at.shape[1], *value.shape[dim + 1 :]]
    return value.gather(dim, at.view(shape).expand(full))


class PositionwiseSuffix:
    """Position-wise suffix of a graph's top-level steps."""

    def __init__(self, root: Region) -> None:
        users: dict[str, list[str]] = {step.name: [] for step in root.steps}
        for step in root.steps:
            for refs in step.inputs.values():
                for ref in refs:
                    if ref.step:
                        users[ref.step].append(step.name)
        self.dims: dict[str, tuple[int | None, ...]] = {}
        """For each step of the suffix, the dimension of positions of each argument of its call."""
        for step in reversed(root.steps):
            dims = self._dims(root, step) if all(user in self.dims for user in users[step.name]) else None
            if dims is not None:
                self.dims[step.name] = dims
        self.outputs = [(ref.step in self.dims, length_dim(root.type_of(ref))) for ref in root.outputs.values()]

    @staticmethod
    def _dims(root: Region, step: Step) -> tuple[int | None, ...] | None:
        """Return the dimension of positions of each argument; None where the step is not position-wise."""
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

    def run(self, model: Model, inputs: Mapping[str, Tensor], at: Tensor) -> dict[str, Tensor]:
        """Return the outputs of ``model`` by name, each [b, k, ...], at positions ``at`` int64 [b, k]; no dropout."""
        root = model.root
        values: list[Any] = [inputs[name] for name in model.input_names]
        narrow: set[int] = set()
        for name, places in root.plan.steps:
            arguments: list[Any] = [None if a < 0 else values[a] for a in places]
            dims = self.dims.get(name)
            if dims is not None:
                for i, (place, dim) in enumerate(zip(places, dims, strict=True)):
                    if dim is not None and place not in narrow:
                        arguments[i] = take(arguments[i], at, dim)
            step: Any = root._modules[name]
            made = step(None, *arguments) if isinstance(step, RegionModule) else step(*arguments)
            made = made if isinstance(made, tuple) else (made,)
            if dims is not None:
                narrow.update(range(len(values), len(values) + len(made)))
            values.extend(made)
        found = [values[i] for i in root.plan.returned[: len(self.outputs)]]
        return {
            name: value if done or dim is None else take(value, at, dim)
            for name, value, (done, dim) in zip(model.output_names, found, self.outputs, strict=True)
        }
