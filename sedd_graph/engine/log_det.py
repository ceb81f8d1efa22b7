"""Log-determinant of an invertible block, summed over the steps of its derived inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.engine.fixed_point import log_det as contraction_log_det
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.errors import UserError
from sedd_graph.inverse import Contraction, Linear

__all__ = ["forward_with_log_det"]


def forward_with_log_det(run: LayerRun, batch: int, *, exact_up_to: int = 128) -> Tensor:
    """Evaluate a layer in the forward direction and return its log-determinant, with gradients if enabled.

    Args:
        run: Execution of the layer, whose inputs are set (:meth:`LayerRun.put`). On return its outputs are set; most
            other tensors are freed after their last use.
        batch: Number of sequences (rows of the batch), b.
        exact_up_to: Largest number of elements of a sequence for which the log-determinant of a contraction is exact.
            For longer sequences it is an unbiased estimate.

    Returns:
        ``log |det d outputs / d inputs|`` of each sequence in nats, [b].

    Raises:
        UserError: The layer is only proved to be injective, or a component declares no log-determinant.
    """
    layout, values = run.layout, run.values
    program, label = layout.program, layout.region.label
    if program.level == "injective":
        raise UserError(f"block {label!r} has no log-determinant: it is {program.note}")
    if program.unmeasured:
        raise UserError(f"block {label!r}: {program.unmeasured[0].path} declares no log-determinant")
    terms: list[Tensor | float] = []
    for unit, method, last_use in zip(layout.units, layout.log_dets, layout.last_use, strict=True):
        arguments = run.arguments(unit)
        if method is None:
            made = run.evaluate(unit, arguments)
        else:
            made, term = unit.module(run.layer).with_log_det(method, *arguments)
            made = made if isinstance(made, tuple) else (made,)
            terms.append(term)
        run.put(unit.outputs, made)
        for value in last_use:
            values[value] = None
    for d in program.derivations:
        if isinstance(d, Linear) and d.factor != 1:
            terms.append(math.log(d.factor) * values[layout.index[d.targets[0]]].numel() / batch)
        elif isinstance(d, Contraction):
            at = values[layout.index[d.target]]
            found = contraction_log_det(run.remainder(d), at, lipschitz=d.bound, exact_up_to=exact_up_to).value
            terms += [found, math.log(abs(d.scale)) * at.numel() / batch]
    total = sum(terms[1:], terms[0]) if terms else 0.0
    if isinstance(total, Tensor):
        return total
    like: Tensor = values[next(iter(layout.outputs.values()))]
    return torch.full((batch,), total, device=like.device)
