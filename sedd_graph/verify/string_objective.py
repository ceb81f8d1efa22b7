"""Verification of objectives of strings by enumeration: the bound, the training loss and their gradients.

The kernel's ``sample`` is replaced by one that returns enumerated cases, and the objective's uniform numbers by the
nodes of a quadrature. The mean loss is then a sum, which is compared with that of a perfect network, and with the
definition of the loss for random outputs.

Axes: r selected cases, b noise levels, s strings of the table, w positions of a padded string, v data tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringKernel, StringObjective
from sedd_graph.verify.string_forced import LAST, Draw, ForcedDraws
from sedd_graph.verify.string_reference import Reference
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.worst import worst

__all__ = ["NATS", "check_enumerated", "check_reverse", "notes"]

NATS = 1e-3
"""Largest accepted error of an enumerated bound, nats per string."""
REVERSE = (0.05, 0.7, 2.5)
"""Values of total noise at which the rates that samplers get are verified."""
LIKELY = 1e-6
"""Least probability of a noisy string at which they are verified."""


def notes(kernel: StringKernel, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
    """Return what an objective declares of its loss, as checks without a verdict; [] if it declares nothing.

    Args:
        kernel: The forward process.
        objective: The objective.
        schedule: Total noise as a function of time.
    """
    found, claim = [], "share of training times whose weight is capped"
    if (capped := objective.capped(kernel, schedule)) > 0:
        found.append(
            Check("objective.capped", claim, None, f"{capped:.3f}", "times at which training_factor is below 1")
        )
    if (caveat := objective.caveat(kernel)) is not None:
        found.append(Check("objective.loose", caveat, None, "see objective.bound", "by how much, on the toy"))
    return found


def check_enumerated(
    table: EnumeratedTable, objective: StringObjective[Any, Any], schedule: Schedule, proof: Proof
) -> list[Check]:
    """Verify the bound, the training loss and their gradients by enumeration.

    Args:
        table: The enumeration.
        objective: The objective.
        schedule: Total noise as a function of time.
        proof: Strength of the verification.

    Returns:
        The results of the checks.
    """
    name = "objective.bound" if objective.caveat(table.kernel) is not None else "objective.tight"
    quick, large = proof == "quick", table.kernel.data_tokens > min(table.kernel.toys)
    costly = table.rounding > EnumeratedTable.rounding  # many noisy strings, and alignments of each
    nodes = 12 if quick or large else 16 if costly else 24
    times = 8 if quick or large else 24 if costly else 96
    try:
        forced = ForcedDraws(table, objective, schedule)
        return [
            _refined(lambda count: _bound(name, forced, count), nodes),
            _refined(lambda count: _training(forced, count), nodes),
            _pointwise(forced, times),
            _wrong(forced, 4 if quick or large else 12),
            check_reverse(table, objective),
            *_spared(table, objective, schedule),
        ]
    except ValueError as error:
        return [Check(name, "the mean loss is enumerated", False, str(error), "draws of enumerated cases")]


def _refined(check: Callable[[int], Check], nodes: int) -> Check:
    """Return a check by quadrature; if it fails, with up to eight times as many nodes, so that none fails for want of them."""
    found = check(nodes)
    for more in (2, 8):
        if found.holds:
            break
        found = check(more * nodes)
    return found


def _nodes(count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of Gauss-Legendre quadrature over (0, 1), float64 [count] each."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(count))
    return ((nodes + 1) / 2).float().double(), weights / 2


ENDS = torch.tensor([0.0, LAST], dtype=torch.float64)
"""The least and the largest uniform number."""


def _perfect_loss(forced: ForcedDraws, draw: Draw, u: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """Return a perfect network's mean loss and the total noise at each of the numbers ``u``, float64 [b] each."""
    first, sigma = draw(torch.zeros(len(u), dtype=torch.int64), u)
    found = forced.sums(sigma, first.sigma.double(), pairs=pairs)
    drawn, _ = draw(found.case, u[found.level])
    outputs = found.gather(found.perfect, drawn.xt.shape[1])
    return found.mean(forced.objective.loss(outputs, drawn, forced.table.kernel), len(u)), sigma


def _bound(name: str, forced: ForcedDraws, count: int) -> Check:
    """Verify that the mean loss of draws for the bound is the bound of a perfect network."""
    table, (u, weights) = forced.table, _nodes(count)
    sigma = forced.bound(torch.zeros(2, dtype=torch.int64), ENDS)[1]
    mean, _ = _perfect_loss(forced, forced.bound, u, pairs=forced.bound_pairs)
    found, omitted = float(weights @ mean), float(table.spent(sigma[:1]))
    expected, slack = table.whole - omitted, NATS + table.rounding * table.whole
    value, above = f"{found:.5f} against {expected:.5f} nats", table.whole - table.entropy
    claim = "with a perfect network the bound is the entropy of the data"
    holds = abs(found - expected) < slack and abs(above) < 1e-5
    if name == "objective.bound":
        claim = "with a perfect network the bound is the enumerated one, and not below the entropy of the data"
        value = f"{value}; with all noise {above:.4f} above the entropy"
        holds = abs(found - expected) < slack and above > -1e-5
    how = f"enumerated at {count} nodes; noise below {float(sigma[0]):.0e}, {omitted:.5f} nats, is not counted; tolerance {slack:.4f}"
    return Check(name, claim, holds, value, how)


def _training(forced: ForcedDraws, count: int) -> Check:
    """Verify that the mean training loss, over the times that are drawn, is the bound between these times."""
    table, (u, weights) = forced.table, _nodes(count)
    # nodes that are dense near u = 0, where the loss of some schedules changes fast
    nodes, weights = (u**3).float().double(), weights * 3 * u**2
    low, high = forced.training(torch.zeros(2, dtype=torch.int64), ENDS)[1]
    mean, sigma = _perfect_loss(forced, forced.training, nodes, pairs=forced.training_pairs)
    factor = forced.objective.training_factor(table.kernel, forced.schedule, forced.schedule.time(sigma)).double()
    found = float(weights @ (mean / factor))
    expected = float(table.spent(high[None]) - table.spent(low[None]))
    slack, more = NATS + (table.rounding + 1e-4) * table.whole, forced.objective.training_excess
    claim = "with a perfect network the training loss is the bound between its first and last noise level"
    value = f"{found:.5f} against {expected:.5f} nats"
    if more:
        claim += ", or larger by what the objective declares"
        value += f": {found - expected:.4f} more, for any network"
    how = f"enumerated at {count} nodes, total noise {float(low):.1e} to {float(high):.3g}; tolerance {slack:.4f}"
    return Check("objective.training", claim, -slack < found - expected < (1e9 if more else slack), value, how)


def _times(schedule: Schedule, count: int, seed: int) -> Tensor:
    """Return times in (0, 1), float64 [count], even in log sigma below a noise of 0.05, and even in t above it."""
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    middle = float(schedule.time(torch.tensor([0.05], dtype=torch.float64)))
    low = count // 4
    grid = torch.cat(
        [
            torch.linspace(0, 1, low + 1, dtype=torch.float64)[:-1],
            torch.linspace(0, 1, count - low + 1, dtype=torch.float64)[:-1],
        ]
    )
    share = torch.cat([torch.full((low,), 1 / low), torch.full((count - low,), 1 / (count - low))]).double()
    place = grid + share * jitter
    small = 1e-3 * (middle / 1e-3) ** place[:low] if middle > 1e-3 else middle + place[:low] * 1e-3
    return torch.cat([small, middle + (1 - middle) * place[low:]]).clamp(max=1.0)


def _slopes(forced: ForcedDraws, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return total noise, and its derivative times the declared factor of training, at the times ``t``."""
    sigma, slope = forced.schedule.sigma(t).double(), forced.schedule.dsigma(t).double()
    return sigma, slope * forced.objective.training_factor(forced.table.kernel, forced.schedule, t).double()


def _pointwise(forced: ForcedDraws, count: int) -> Check:
    """Verify that the mean training loss at each of several times is that of a perfect network."""
    t = _times(forced.schedule, count, 12)
    sigma, slope = _slopes(forced, t)
    mean, seen = _perfect_loss(forced, forced.at_times, t, pairs=forced.training_pairs)
    expected = slope * forced.table.rate(sigma)
    size = expected.abs() + 1e-3 * expected.abs().max() * sigma.clamp(max=1)
    slack = 1e-3 + 20 * forced.table.rounding
    error = (mean - expected) / size
    if forced.objective.training_excess:
        error = -error.clamp(max=0)
    largest = worst(float(error.abs().max()), float(((seen - sigma).abs() / sigma).max()))
    claim = "at every time a perfect network's training loss is the rate at which noise adds to the bound"
    how = f"enumerated at {len(t)} times, relative; tolerance {slack:.4f}"
    return Check("objective.rate", claim, largest < slack, f"{largest:.1e}", how)


def _wrong(forced: ForcedDraws, count: int) -> Check:
    """Verify the mean training loss of random outputs, and its gradients, by the definition of the loss."""
    table, objective, t = forced.table, forced.objective, _times(forced.schedule, count, 13)
    sigma, slope = _slopes(forced, t)
    found = forced.sums(sigma, sigma, pairs=False, least=1e-9)
    found = found.only(table.exact[found.here])
    if forced.prompt is not None:
        found = found.only(_keeps(table, forced.prompt)[found.case])
    draw, _ = forced.at_times(found.case, t[found.level])
    reference = Reference(forced, found, sigma, slope)
    outputs = {name: _random(table, name, x, seed) for seed, (name, x) in enumerate(found.perfect.items())}
    for x in outputs.values():
        x.requires_grad_()
    means, values = [], []
    for given in (outputs, found.perfect):
        nats = objective.loss(found.gather(given, draw.xt.shape[1]), draw, table.kernel)
        means.append(found.mean(nats, len(t)))
        values.append(reference.loss(given))
    (value, size), (best, _) = values
    error = float(((means[0] - means[1] - value + best).abs() / size).max().detach())
    gradients = [torch.autograd.grad(x.sum(), list(outputs.values()), allow_unused=True) for x in (means[0], value)]
    for name, one, other in zip(outputs, *gradients, strict=True):
        one, other = (torch.zeros_like(outputs[name]) if x is None else x for x in (one, other))
        scale = reference.scale(name, outputs) + 1e-7 * size.view(-1, *[1] * (one.dim() - 1))
        error = worst(error, float(((one - other).abs() / scale).nan_to_num(nan=1e9).max()))
    slack = 1e-3 + 50 * table.rounding
    claim = (
        "with a wrong network the training loss and its gradients are those of the enumerated rates, least at the truth"
    )
    how = f"random outputs at {len(t)} times, {len(found.case):,} cases, relative; tolerance {slack:.4f}"
    return Check("objective.wrong", claim, error < slack, f"{error:.1e}", how)


def check_reverse(table: EnumeratedTable, objective: StringObjective[Any, Any]) -> Check:
    """Verify that samplers get the rates of the reverse process from a perfect network, at every likely string.

    Some samplers do not depend on the sum of the rates, so that their samples do not show it.
    """
    error = 0.0
    for sigma in torch.tensor(REVERSE, dtype=torch.float64):
        likely = (table.at(sigma[None])[0] > LIKELY) & table.exact
        strings = table.rows(likely.nonzero()[:, 0])
        perfect = table.outputs(strings, sigma.expand(len(strings.tokens)))
        found = objective.rates(perfect, strings, table.clean)
        for name in table.factors(sigma[None]):
            where = strings.attend.view(*strings.attend.shape, *[1] * (perfect[name].dim() - 2))
            made, true = (torch.where(where, x[name].double(), -math.inf).exp() for x in (found, perfect))
            error = worst(error, float(((made - true).abs() / (1e-2 + true)).max()))
    slack = 1e-4 + 50 * table.rounding
    claim = "of the outputs of a perfect network the objective makes the rates of the reverse process"
    how = f"every likely string at {len(REVERSE)} noise levels, relative; tolerance {slack:.4f}"
    return Check("objective.reverse", claim, error < slack, f"{error:.1e}", how)


def _keeps(table: EnumeratedTable, prompt: Tensor) -> Tensor:
    """Return the cases whose noisy string begins with the first ``prompt`` [e] tokens of the clean string, bool [e].

    These tokens are the same ones: noise has not touched them.
    """
    cases = table.cases
    clean, noisy = (table.rows(x).tokens[:, 1:] for x in (cases.x0, cases.here))
    inside = torch.arange(clean.shape[1]) < prompt[:, None]
    kept = torch.ones_like(inside)
    if cases.kept is not None:
        kept[:, : cases.kept.shape[1]] = cases.kept
    return ((clean == noisy) & kept | ~inside).all(-1)


def _spared(table: EnumeratedTable, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
    """Verify the training loss of rows whose first tokens are not to be corrupted; [] if the kernel spares no tokens."""
    if not table.kernel.supports_prompts or table.cases.kept is None:
        return []
    forced = ForcedDraws(table, objective, schedule)
    lengths = table.rows(table.cases.x0).lengths
    forced.prompt = torch.minimum(lengths, 1 + table.cases.x0 % 2)
    check = _wrong(forced, 4)
    claim = "with a prompt, whose tokens are not to be corrupted, the training loss is that of the other tokens"
    return [dataclasses.replace(check, name="objective.spared", claim=claim)]


def _random(table: EnumeratedTable, name: str, perfect: Tensor, seed: int) -> Tensor:
    """Return random outputs around the perfect ones, and positive where these are 0."""
    noise = torch.randn(perfect.shape, generator=torch.Generator().manual_seed(20 + seed))
    wrong = perfect.clamp(min=-3.0) + 0.7 * noise
    if name not in table.log_probabilities:
        return wrong
    tokens = torch.arange(perfect.shape[-1]) < table.kernel.data_tokens
    return wrong.masked_fill(~tokens, -1e4).log_softmax(-1)
