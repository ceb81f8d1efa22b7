"""Log-determinant of an invertible block, summed over the steps of its derived inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.engine.fixed_point import log_det as contraction_log_det
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Unit
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.inverse import Contraction, Linear
from sedd_graph.inverse.factors import log

__all__ = ["forward_with_log_det"]


def forward_with_log_det(
    run: LayerRun, batch: int, *, exact_up_to: int = 128, part: range | None = None, total: int | None = None
) -> Tensor:
    """Evaluate a layer in the forward direction and return its log-determinant, with gradients if enabled.

    Args:
        run: Execution of the layer, whose inputs are set (:meth:`LayerRun.put`). On return its outputs are set; most
            other tensors are freed after their last use.
        batch: Number of sequences (rows of the batch), b.
        exact_up_to: Largest number of elements of a sequence for which the log-determinant of a contraction is exact.
            For longer sequences it is an unbiased estimate.
        part: Places of the sequences among ``total`` ones, of which each gets the same estimate however they are divided;
            None: all.
        total: Number of these sequences.

    Returns:
        ``log |det d outputs / d inputs|`` of each sequence in nats, [b].

    Raises:
        UserError: The layer is only proved to be injective, its inputs are integers, a component declares no log-determinant, or rows of the
            batch are not independent.
        EnvironmentFault: A component's log-determinant is not one number for each row.
    """
    layout, values = run.layout, run.values
    program, label = layout.program, layout.region.label
    if program.level == "injective":
        raise UserError(f"block {label!r} has no log-determinant: it is {program.note}")
    if program.discrete:
        raise UserError(
            f"block {label!r} has no log-determinant: {', '.join(layout.streams)} holds integers, and a bijection between "
            "finite sets changes no probability"
        )
    if program.unmeasured:
        raise UserError(f"block {label!r}: {program.unmeasured[0].path} declares no log-determinant")
    if program.mixed_rows:
        raise UserError(f"block {label!r} has no log-determinant of each row: {program.mixed_rows}")
    terms: list[Tensor | float] = []
    for unit, method, last_use in zip(layout.units, layout.log_dets, layout.last_use, strict=True):
        arguments = run.arguments(unit)
        if method is None:
            made = run.evaluate(unit, arguments)
        else:
            made, term = unit.module(run.layer).with_log_det(method, *arguments)
            made = made if isinstance(made, tuple) else (made,)
            terms.append(_checked(run, unit, method, term, batch))
        run.put(unit.outputs, made)
        for value in last_use:
            values[value] = None
    for d in program.derivations:
        if isinstance(d, Linear) and d.factor != 1:
            terms.append(log(d.factor) * (values[layout.index[d.targets[0]]].numel() // batch))
        elif isinstance(d, Contraction):
            at = values[layout.index[d.target]]
            found = contraction_log_det(
                run.remainder(d), at, lipschitz=d.bound, exact_up_to=exact_up_to, part=part, total=total
            ).value
            terms += [found, log(abs(d.scale)) * (at.numel() // batch)]
    summed = sum(terms[1:], terms[0]) if terms else 0.0
    if isinstance(summed, Tensor):
        return summed
    like: Tensor = values[next(iter(layout.outputs.values()))]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((batch,), summed, dtype=dtype, device=like.device)


def _checked(run: LayerRun, unit: Unit, method: str, term: object, batch: int) -> Tensor:
    """Return a component's log-determinant, verified to be one number for each row, [b]."""
    if isinstance(term, Tensor) and term.shape == (batch,):
        return term
    found = f"shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
    path = ".".join(unit.path)
    node = next(node for node in run.layout.flat.nodes if node.path == path)
    contract = node.op.contract
    raise EnvironmentFault(
        f"block {run.layout.region.label!r}, node {path!r}: op {contract.name!r} ({contract.distribution}): its "
        f"log-determinant {method!r} gives {found}, not one number for each of {batch} rows, [{batch}]"
    )
