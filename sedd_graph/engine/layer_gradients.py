"""Gradients of one layer, unit by unit: from its outputs to its inputs and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.engine.layer_run import LayerRun, Tape
from sedd_graph.engine.layout import Layout, Unit

__all__ = ["accumulated", "gradient_flow", "propagate"]


def propagate(run: LayerRun, gradients: list[Any]) -> dict[nn.Parameter, Tensor]:
    """Propagate gradients from the layer's outputs to its inputs and parameters.

    The layer's inputs must be known, as after :meth:`LayerRun.invert`, and ``needs_grad`` given. Components and nested
    blocks that have not been evaluated are evaluated first.

    Args:
        run: The layer, with its tensors.
        gradients: Gradient of the loss with respect to each graph value, by index; None for zero. On entry, the
            gradients of the layer's outputs are set. The method adds the others in place, those of the layer's
            inputs included.

    Returns:
        Gradients of the layer's parameters.
    """
    for unit in run.layout.units:  # in forward order, so that arguments are known
        known = unit.factors is not None and all(run.values[v] is not None for v in unit.outputs)
        if unit not in run.tapes and not known:
            run.record(unit)
    found: dict[nn.Parameter, Tensor] = {}
    for unit in reversed(run.layout.units):
        tape = run.tapes.pop(unit, None)
        arriving = [gradients[v] for v in unit.outputs]
        if all(g is None for g in arriving):
            continue
        if unit.factors is not None:
            for value, factor in zip(unit.inputs, unit.factors, strict=True):
                if run.needs_grad and run.needs_grad[value] and factor:
                    gradient = arriving[0] if factor == 1 else arriving[0] * float(factor)
                    gradients[value] = accumulated(gradients[value], gradient)
        elif tape is not None:
            _propagate_unit(run, unit, tape, gradients, found)
    return found


def _propagate_unit(
    run: LayerRun, unit: Unit, tape: Tape, gradients: list[Any], found: dict[nn.Parameter, Tensor]
) -> None:
    leaves = [
        (v, leaf)
        for v, leaf in zip(unit.inputs, tape.leaves, strict=True)
        if v >= 0 and run.needs_grad and run.needs_grad[v]
    ]
    parameters = [p for p in unit.module(run.layer).parameters() if p.requires_grad]
    arriving = [gradients[v] for v in unit.outputs]
    pairs = [(o, g) for o, g in zip(tape.outputs, arriving, strict=False) if g is not None and o.requires_grad]
    if not pairs or not (leaves or parameters):
        return
    outputs = [o for o, _ in pairs]
    # the evaluation had autocast; products of the backward pass have none, as elsewhere
    with full_precision(outputs[0]):
        made = torch.autograd.grad(
            outputs,
            [leaf for _, leaf in leaves] + parameters,
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
    for (value, _), gradient in zip(leaves, made, strict=False):
        gradients[value] = accumulated(gradients[value], gradient)
    for parameter, gradient in zip(parameters, made[len(leaves) :], strict=True):
        if gradient is not None:
            total = found.get(parameter)
            found[parameter] = gradient if total is None else total + gradient


def accumulated(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients of equal shape, where None stands for zero."""
    return gradient if total is None else total if gradient is None else total + gradient


def gradient_flow(layout: Layout, layer: nn.Module, inputs: Sequence[bool]) -> list[bool]:
    """Return for each tensor that a layer computes or receives whether it requires a gradient, by graph-value index.

    Args:
        layout: Layout of the layer, which numbers its tensors (graph values).
        layer: Module of the layer; its trainable parameters require gradients.
        inputs: For each input of the layer, whether it requires a gradient.
    """
    found = [False] * layout.count
    for value, needed in zip(layout.inputs.values(), inputs, strict=True):
        found[value] = needed
    for unit in layout.units:
        flows = any(v >= 0 and found[v] for v in unit.inputs) or any(
            p.requires_grad for p in unit.module(layer).parameters()
        )
        for value in unit.outputs:
            found[value] = flows and layout.flat.types[value].kind == "float"
    return found
