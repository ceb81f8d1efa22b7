"""Verification of the value of a bound with a perfect network: it is the entropy of the data, and nothing is left out.

Axes: b rows, v data tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective
from sedd_graph.verify.objective_draws import Wrong, random_batch
from sedd_graph.verify.objective_values import decoded, pairs, prior_cost, value_of
from sedd_graph.verify.toy import Toy

__all__ = ["bound_faults"]

TIGHT = 5e-4
"""Tolerance of the enumerated bound, nats per sequence, beside the error of the quadrature."""
LATE = 0.3
"""A time at which the reconstruction term has a size, as it has not at the least time."""
DECODED = 1e-3
"""Tolerance of the enumerated reconstruction term, relative."""
ROUNDING = 1e-6
"""Tolerance of the enumerated reconstruction term for rounding in float32, nats per sequence."""
COST = 2e-3
"""Tolerance of the constant that a bound in discrete time adds for each clean token, nats."""
COMPLETE = 200
"""Number of rows whose reconstruction term is verified to be 0, for an objective whose loss counts all noise."""
OMITTED = 0.01
"""Largest share of the entropy that a bound may omit or add: noise below the least time, and the prior."""


def bound_faults(
    toy: Toy, objective: Objective, output: str, low: float, cost: Tensor, nodes: int
) -> tuple[str, list[Wrong]]:
    """Compare the enumerated value of the bound of a perfect network with the entropy of the data.

    Args:
        toy: Data set with a known distribution, and a perfect network for it.
        objective: The objective.
        output: Kind of network output, ``log_score`` or ``log_x0``.
        low: Least time that the objective draws.
        cost: Constant that the objective adds for each clean token, nats, float64 [v].
        nodes: Quadrature nodes per interval of time.

    Returns:
        A text with both values, and what is wrong.
    """
    value = value_of(toy, objective, output, low, cost, nodes)
    added = float((cost[toy.sequences].sum(-1) * toy.law).sum())
    total, gap = value.nats + added, abs(value.nats - value.expected)
    text = f"{total:.4f} against {toy.entropy:.4f} nats"
    if not gap < TIGHT + value.error:
        return text, [Wrong("tight", f"{text}: {gap:.2g} off the enumerated value ({value.how})")]
    if objective.measure != "time" and (wrong := _added(toy, objective, output)) is not None:
        return text, [wrong]
    if objective.measure == "steps":
        # a step of all positions is drawn position by position, so that few steps give a loose bound: its end is verified
        row, random = Batch.of(toy.sequences[:1]), Randomness(torch.Generator())
        draw = objective.corrupt(row, toy.parts.kernel, toy.parts.schedule, random=random, t=torch.ones(1))
        last = float(draw.sigma.reshape(-1)[0])
        prior = prior_cost(toy, last)
        if bool((cost.abs() > COST).any()) and not bool(((cost - prior).abs() < COST * (1 + prior)).all()):
            text = f"the cost of a token is {float(cost.max()):.3g} nats, and its divergence from the prior {float(prior.max()):.3g}"
            return text, [Wrong("tight", text)]
        kept = toy.entropy - toy.entropy_given(last)
        if not kept <= OMITTED * toy.entropy:
            text = f"{text}: the last step does not start at the prior, and {kept:.2g} nats of the data are left in it"
            return text, [Wrong("tight", text)]
        return text, []
    if objective.measure == "time":
        left, wrong = _left_out(toy, objective, output)
        if wrong is not None:
            return text, [wrong]
        total += left
        text = f"{total:.4f} against {toy.entropy:.4f} nats"
    if objective.slack > OMITTED:
        text += f" (declared slack {objective.slack:.0%})"
    limit, side = (OMITTED, "omitted") if total < toy.entropy else (max(OMITTED, objective.slack), "added")
    if not abs(total - toy.entropy) <= limit * toy.entropy:
        return text, [Wrong("tight", f"{text}: {abs(total - toy.entropy):.2g} nats are {side}")]
    return text, []


def _left_out(toy: Toy, objective: Objective, output: str) -> tuple[float, Wrong | None]:
    """Return the mean of what evaluation adds to the loss, :meth:`Objective.reconstruction`, and what is wrong with it.

    With a perfect network it is the mean of -log p(x_0 | x_t), in nats per sequence, at the least time and at any other.
    """
    kernel, schedule = toy.parts.kernel, toy.parts.schedule
    batch = random_batch(toy, 8, torch.Generator().manual_seed(1))
    probe = objective.reconstruction_draw(DrawRequest(batch, kernel, schedule, Randomness(torch.Generator())))
    if probe is None:
        return 0.0, None
    values = []
    for t in (probe.t.reshape(-1)[:1].double(), torch.tensor([LATE], dtype=torch.float64)):
        draw, batch, chance, _ = pairs(toy, objective, t)
        outputs = toy.outputs_for(draw, batch, output)
        nats = objective.reconstruction(outputs, draw, batch, kernel, schedule).double()
        found, expected = (float((v * chance).sum()) for v in (nats, decoded(toy, draw, batch)))
        if not abs(found - expected) < DECODED * expected + ROUNDING:
            text = f"the reconstruction term at t = {float(t):.3g} is {found:.4g} and must be {expected:.4g} nats"
            return 0.0, Wrong("tight", text)
        values.append(found)
    return values[0], None


def _added(toy: Toy, objective: Objective, output: str) -> Wrong | None:
    """Return what is wrong with a reconstruction term that is added to a loss which counts all noise: any but 0 is."""
    kernel, schedule, generator = toy.parts.kernel, toy.parts.schedule, torch.Generator().manual_seed(1)
    batch = random_batch(toy, COMPLETE, generator)
    draw = objective.reconstruction_draw(DrawRequest(batch, kernel, schedule, Randomness(generator)))
    if draw is None:
        return None
    outputs = toy.outputs_for(draw, batch, output)
    nats = objective.reconstruction(outputs, draw, batch, kernel, schedule).double()
    if float(nats.abs().max()) < ROUNDING:
        return None
    text = f"evaluation adds a reconstruction term of {float(nats.mean()):.3g} nats to a loss that counts all noise"
    return Wrong("tight", text)
