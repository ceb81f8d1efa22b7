"""Verification that the loss of an objective is the sum over the positions that it declares to read.

Axes: b rows, l positions, g groups of positions of one row, m positions of a group, n states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.groups import group, levels, rows_of
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective
from sedd_graph.verify.objective_terms import predicted, random_outputs
from sedd_graph.verify.toy import Toy

__all__ = ["position_faults", "sums_positions"]

TOLERANCE = 1e-4
"""Tolerance of the sum over positions, and of its gradient, relative to the largest of the row; rounding is 1e-6 of it."""
SIZES = (1, 2)
"""Numbers of positions of a group."""


def sums_positions(objective: Objective, draw: Draw, batch: Batch) -> bool:
    """Return whether the loss of a draw is evaluated at its positions: it is declared, and each row has one noisy row."""
    return objective.sums_positions and len(draw.xt) == len(batch)


def position_faults(
    toy: Toy, objective: Objective, draw: Draw, batch: Batch, output: str, generator: torch.Generator
) -> Iterator[str]:
    """Compare the loss of rows with the sum of the losses of their positions, at random network outputs.

    So is the reconstruction term, where there is one. Positions that are not read must have no gradient.

    Args:
        toy: Data set with a known distribution, its kernel and its schedule.
        objective: The objective, which declares :attr:`Objective.sums_positions`.
        draw: Noisy rows, b of them.
        batch: The clean rows, b of them.
        output: Kind of network output, ``log_score`` or ``log_x0``.
        generator: Random number generator of the outputs.

    Yields:
        A description of each deviation.
    """
    kernel, schedule, part = toy.parts.kernel, toy.parts.schedule, objective.of_positions()
    request = DrawRequest(batch, kernel, schedule, Randomness(generator))
    yield from _compare(toy, objective, objective.loss, part.loss, draw, batch, output, generator)
    lowest = objective.reconstruction_draw(request)
    if lowest is not None:
        whole, own = objective.reconstruction, part.reconstruction
        for text in _compare(toy, objective, whole, own, lowest, batch, output, generator):
            yield f"in the reconstruction term, {text}"


def _compare(
    toy: Toy,
    objective: Objective,
    whole: Callable[..., Tensor],
    part: Callable[..., Tensor],
    draw: Draw,
    batch: Batch,
    output: str,
    generator: torch.Generator,
) -> Iterator[str]:
    """Compare the loss ``whole`` of rows with the sum of the loss ``part`` of groups; yield what differs."""
    kernel, schedule = toy.parts.kernel, toy.parts.schedule
    read = objective.read_positions(draw, batch, kernel)
    if read.dtype != torch.bool or read.shape != draw.xt.shape:
        yield f"'read_positions' returns {read.dtype} {list(read.shape)}, not bool {list(draw.xt.shape)}"
        return
    raw = random_outputs(toy, objective, draw, output, generator)
    with torch.enable_grad():
        mine = raw.clone().requires_grad_()
        loss = whole(predicted(toy, objective, mine, draw, output), draw, batch, kernel, schedule)
        gradient = _gradient(loss, mine)
    if bool((gradient[~read] != 0).any()):
        yield "positions that are not read have a gradient"
    for size in SIZES:
        groups, _ = group(read, levels(draw), size)
        row = groups.row[:, None]
        with torch.enable_grad():
            mine = raw.clone().requires_grad_()
            outputs = predicted(toy, objective, mine, draw, output)
            short = {name: value[row, groups.place] for name, value in outputs.items()}
            terms = part(short, *rows_of(draw, batch, groups), kernel, schedule)
            if terms.shape != groups.row.shape:
                yield f"the loss of {len(groups.row)} rows of {size} positions has the shape {list(terms.shape)}"
                return
            found = _gradient(terms, mine)
        total = torch.zeros(len(batch), dtype=torch.float64).index_add(0, groups.row, terms.detach().double())
        expected = loss.detach().double()
        scale = expected.abs() + expected.abs().mean() + 1e-6
        if not (gap := float(((total - expected).abs() / scale).nan_to_num(nan=torch.inf).max())) < TOLERANCE:
            yield f"the sum over the positions that are read is {gap:.2g} off"
        largest = gradient.abs().flatten(1).amax(1) + gradient.abs().mean() + 1e-6
        off = (found - gradient).abs().flatten(1).amax(1) / largest
        if not (steep := float(off.nan_to_num(nan=torch.inf).max())) < TOLERANCE:
            yield f"the gradient of that sum is {steep:.2g} off"


def _gradient(losses: Tensor, outputs: Tensor) -> Tensor:
    """Return the gradient of the sum of ``losses`` in ``outputs``, zeros if it does not depend on them."""
    found = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)[0] if losses.requires_grad else None
    return torch.zeros_like(outputs) if found is None else found
