"""The change of volume of a block, by the terms that its derived inverse names (see :mod:`sedd_graph.inverse.program`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sedd_graph.engine.fixed_point import log_det as contraction_log_det
from sedd_graph.engine.units import Layout, Values
from sedd_graph.errors import UserError
from sedd_graph.inverse import Contraction, Linear

__all__ = ["forward"]


def forward(
    layout: Layout, layer: nn.Module, key: Tensor | None, values: Values, batch: int, *, exact_up_to: int = 128
) -> Tensor:
    """Fill in the outputs among ``values`` from the region's inputs, and return log |det d outputs / d inputs| of each of
    ``batch`` sequences, in nats, [b]; both with gradients where they are enabled.

    Contractions of more than ``exact_up_to`` numbers are estimated without bias. Raises :class:`UserError` where a
    component that is solved declares no log-determinant, or the program has none.
    """
    program, label = layout.program, layout.region.label
    if program.level == "injective":
        raise UserError(f"block {label!r} has no log-determinant: it is {program.note}")
    if program.unmeasured:
        raise UserError(f"block {label!r}: {program.unmeasured[0].path} declares no log-determinant")
    terms: list[Tensor | float] = []
    for unit, method, past in zip(layout.units, layout.log_dets, layout.spent, strict=True):
        arguments = [None if v < 0 else values[v] for v in unit.inputs]
        if method is None:
            made = layout.evaluate(unit, layer, key, arguments)
        else:
            made, term = unit.module(layer).with_log_det(method, *arguments)
            made = made if isinstance(made, tuple) else (made,)
            terms.append(term)
        for value, tensor in zip(unit.outputs, made, strict=False):
            values[value] = tensor
        for value in past:
            values[value] = None
    for d in program.derivations:
        if isinstance(d, Linear) and d.factor != 1:
            terms.append(math.log(d.factor) * values[layout.index[d.targets[0]]].numel() / batch)
        elif isinstance(d, Contraction):
            at = values[layout.index[d.target]]
            g = layout.remainder(d, layer, key, values)
            found = contraction_log_det(g, at, lipschitz=d.bound, exact_up_to=exact_up_to).value
            terms += [found, math.log(abs(d.scale)) * at.numel() / batch]
    total = sum(terms[1:], terms[0]) if terms else 0.0
    if isinstance(total, Tensor):
        return total
    like: Tensor = values[next(iter(layout.outputs.values()))]
    return torch.full((batch,), total, device=like.device)
