"""The change of volume of a block, by the terms that its derived inverse names (see :mod:`sedd_graph.inverse.program`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sedd_graph.engine.fixed_point import log_det as contraction_log_det
from sedd_graph.engine.units import Layout, Values
from sedd_graph.errors import UserError
from sedd_graph.inverse import Contraction, Linear, Solve

__all__ = ["log_det"]


def log_det(
    layout: Layout, layer: nn.Module, key: Tensor | None, values: Values, batch: int, *, exact_up_to: int = 128
) -> Tensor:
    """log |det d outputs / d inputs| of each of ``batch`` sequences, in nats, [b], with gradients where they are enabled.

    ``values`` are those of :meth:`Layout.forward`. Contractions of more than ``exact_up_to`` numbers are estimated without
    bias. Raises :class:`UserError` where a component that is solved declares no log-determinant, or the program has none.
    """
    if layout.program.level == "injective":
        raise UserError(f"block {layout.region.label!r} has no log-determinant: it is {layout.program.note}")
    total: Tensor | float = 0.0
    for d in layout.program.derivations:
        if isinstance(d, Solve) and d.log_det != "zero":
            if d.log_det is None:
                raise UserError(f"block {layout.region.label!r}: {d.path} declares no log-determinant")
            unit = layout.by_path[d.path]
            arguments = [None if v < 0 else values[v] for v in unit.inputs]
            total = total + getattr(unit.module(layer), d.log_det)(*arguments)
        elif isinstance(d, Linear) and d.factor != 1:
            total = total + math.log(d.factor) * values[layout.index[d.targets[0]]].numel() / batch
        elif isinstance(d, Contraction):
            at = values[layout.index[d.target]]
            g = layout.remainder(d, layer, key, values)
            found = contraction_log_det(g, at, lipschitz=d.bound, exact_up_to=exact_up_to).value
            total = total + found + math.log(abs(d.scale)) * at.numel() / batch
    return torch.as_tensor(total).expand(batch)
