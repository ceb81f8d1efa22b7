"""Verification of the optimum of an objective: its expected loss is least at the outputs of a perfect network.

Axes: b rows, l positions, n states, e pairs of a clean and a noisy row, u distinct inputs, q times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.verify.objective_draws import Wrong
from sedd_graph.verify.objective_terms import predicted
from sedd_graph.verify.objective_values import pairs
from sedd_graph.verify.toy import Toy
from sedd_graph.verify.worst import worst

__all__ = ["optimum_faults"]


def optimum_faults(
    toy: Toy, objective: Objective, output: str, low: float, times: int
) -> tuple[list[Wrong], dict[str, int]]:
    """Return where the expected loss is not least at the outputs of a perfect network.

    For each noisy row, the gradient in the outputs is 0 on the average over the clean rows, and random changes of all
    outputs make the expected loss larger. Times at which the objective declares another optimum are not verified.

    Returns:
        The faults; and the number of times by the reason why they are not verified, that of those verified by "".
    """
    generator, reasons = torch.Generator().manual_seed(12), dict[str, int]()
    for t in _times_of(toy, objective, low, times):
        draw, batch, chance, _ = pairs(toy, objective, torch.tensor([t], dtype=torch.float64))
        reason = objective.off_optimum(draw, toy.parts.kernel, toy.parts.schedule) or ""
        reasons[reason] = reasons.get(reason, 0) + 1
        shift = _shifts(toy, draw, batch, generator)
        if not reason and (faults := _off(toy, objective, output, t, draw, batch, chance, shift)):
            return faults, reasons
    return [], reasons


def _off(
    toy: Toy, objective: Objective, output: str, t: float, draw: Draw, batch: Batch, chance: Tensor, shift: Tensor
) -> list[Wrong]:
    """Return what is wrong with the optimum at the time ``t``, by all pairs of rows and a change of all outputs."""
    kernel, schedule = toy.parts.kernel, toy.parts.schedule
    name = "log_x0" if objective.measure == "steps" else output
    perfect = toy.outputs_for(draw, batch, name)[name].clamp(min=-60)
    losses = []
    with torch.enable_grad():
        raw = perfect.clone().requires_grad_()
        loss = objective.loss(predicted(toy, objective, raw, draw, output), draw, batch, kernel, schedule).double()
        rows = torch.autograd.grad((loss * chance).sum(), raw, allow_unused=True)[0] if loss.requires_grad else None
    losses.append(float((loss.detach() * chance).sum()))
    rows = torch.zeros_like(raw) if rows is None else rows.double()
    if not bool(rows.isfinite().all()):
        return [Wrong("optimum", f"the gradient at t = {t:.3g} is not finite")]
    whole, parts = (_gather(toy, draw, batch, v) for v in (rows, rows.abs()))
    size = parts.flatten(1).amax(1)
    gap = float((whole.abs().flatten(1).amax(1) / (size + 1e-5 * size.max() + 1e-12)).max())
    if not gap < 2e-3:
        return [
            Wrong("optimum", f"at the true posterior the gradient is {gap:.2g} of that of single rows, at t = {t:.3g}")
        ]
    for k in (-1.0, 1.0):
        other = predicted(toy, objective, perfect + k * shift, draw, output)
        losses.append(float((objective.loss(other, draw, batch, kernel, schedule).double() * chance).sum()))
    rise = -worst(*(losses[0] - other for other in losses[1:]))
    if not rise > 1e-4 * max(abs(losses[0]), 1e-9):
        return [Wrong("optimum", f"other outputs have a loss that is larger by {rise:.2g} nats only, at t = {t:.3g}")]
    return []


def _times_of(toy: Toy, objective: Objective, low: float, times: int) -> list[float]:
    """Return the times at which the optimum is verified: where noise neither hides the clean row nor leaves it all."""
    if objective.measure == "masked":
        return [0.5]
    schedule = toy.parts.schedule
    ends = schedule.sigma(torch.tensor([max(low, 1e-4), 1.0], dtype=torch.float64))
    sigma = torch.logspace(math.log10(0.03), math.log10(4.0), times, dtype=torch.float64)
    sigma = sigma.clamp(ends[0], ends[1]) if toy.parts.kernel.steps is None else _noisy_steps(toy, sigma)
    found: list[float] = schedule.time(sigma).tolist()
    return found


def _noisy_steps(toy: Toy, sigma: Tensor) -> Tensor:
    """Return the first steps of a kernel in discrete time that change as many tokens as noise ``sigma`` [q] usually does.

    The share of changed tokens, relative to that after many steps, is 1 - exp(-sigma).
    """
    total = toy.parts.kernel.steps or 1
    p = toy.parts.kernel.transition_matrix(torch.arange(1.0, total + 1, dtype=torch.float64))[
        :, : toy.tokens, : toy.tokens
    ]
    changed = 1 - p.diagonal(dim1=1, dim2=2).mean(1)
    found = torch.searchsorted(changed.cummax(0).values / changed.max(), -torch.expm1(-sigma))
    return (found + 1).clamp(max=total).double()


def _keys(toy: Toy, draw: Draw, batch: Batch) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield the positions of each block, and the index of the network's input at each row, int64 [e], and their number."""
    for start in range(0, toy.length, toy.block):
        here = slice(start, start + toy.block)
        code = toy.code(torch.cat([batch.tokens[:, :start], draw.xt[:, here]], 1), toy.states)
        codes, row = torch.unique(code, return_inverse=True)
        yield here, row, len(codes)


def _gather(toy: Toy, draw: Draw, batch: Batch, rows: Tensor) -> Tensor:
    """Sum values of rows [e, l, n] over the rows with the same input of the network, [u, block, n]."""
    return torch.cat(
        [
            torch.zeros(count, *rows[:, here].shape[1:], dtype=rows.dtype).index_add(0, row, rows[:, here])
            for here, row, count in _keys(toy, draw, batch)
        ]
    )


def _shifts(toy: Toy, draw: Draw, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return random changes of the outputs, equal for equal inputs of the network, [e, l, n]."""
    found = [
        0.5 * torch.randn(count, toy.block, toy.states, generator=generator)[row]
        for _, row, count in _keys(toy, draw, batch)
    ]
    return torch.cat(found, 1)
