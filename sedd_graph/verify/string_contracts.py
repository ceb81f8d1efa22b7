"""Verification of what every objective and sampler of strings must keep to: random numbers, times, rows, given tokens.

Axes: r rows, w positions of a padded string (position 0 holds the BOS token), v data tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringDraw, StringObjective, StringTable
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.string_draws import LIMIT, check_draws, misfit
from sedd_graph.verify.string_forced import ForcedDraws
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.worst import worst

__all__ = ["check_minimum", "check_objective_contract", "check_objective_draws", "same"]

STATISTIC = 2.3
"""Largest accepted Kolmogorov-Smirnov statistic times the root of the number of draws: by chance once in 20,000."""


STEEPEST = 5.0
"""Largest accepted slope of the mean loss at the perfect network, in standard deviations."""


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dataclasses, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def same(a: Any, b: Any) -> bool:
    """Return whether all tensors of two values are equal."""
    one, other = list(tensors(a)), list(tensors(b))
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def _batch(table: StringTable, rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = table.batch(torch.multinomial(table.law, rows, replacement=True, generator=generator))
    size = (0, 4)
    return Batch(*(torch.nn.functional.pad(x, size) for x in (batch.tokens, batch.attend, batch.corrupt, batch.loss)))


def check_objective_contract(table: StringTable, objective: StringObjective[Any, Any], schedule: Schedule) -> Check:
    """Verify the use of inputs and random numbers by an objective.

    A draw must depend only on the clean rows and on the seed, and each rank must draw its rows of the global batch. The
    loss of a row must not depend on other rows, nor on network outputs at padding. The batch and the global random
    number generators must remain unchanged.

    Args:
        table: An enumerable instance of the kernel, which provides clean rows and network outputs.
        objective: The objective.
        schedule: Total noise as a function of time.
    """
    kernel, wrong = table.kernel, list[str]()

    def draw(batch: Batch, seed: int, start: int = 0, total: int | None = None, *, bound: bool = False) -> StringDraw:
        source = Randomness(torch.Generator().manual_seed(seed), start=start, total=total)
        make = objective.bound_draw if bound else objective.corrupt
        found: StringDraw = make(batch, kernel, schedule, random=source)
        return found

    batch, other, before = _batch(table, 24, 1), _batch(table, 24, 2), generators_state()
    copy = _batch(table, 24, 1)
    for bound in (False, True):
        kind = "draws for the bound" if bound else "draws for training"
        first = draw(batch, 3, bound=bound)
        draw(other, 4, bound=bound)
        if not same(first, draw(batch, 3, bound=bound)):
            wrong.append(f"{kind} with the same seed differ")
        if torch.equal(first.sigma, draw(batch, 5, bound=bound).sigma):
            wrong.append(f"{kind} with another seed have the same noise levels")
    whole, part = draw(batch, 3), draw(batch.rows(8, 16), 3, 8, 24)
    if not (torch.equal(whole.xt[8:16], part.xt) and torch.equal(whole.sigma[8:16], part.sigma)):
        wrong.append("a rank does not draw its rows of the global batch")
    outputs = {k: x.clone() for k, x in table.outputs(Strings(whole.xt, whole.attend), whole.sigma).items()}
    nats = objective.loss(outputs, whole, kernel)
    for x in outputs.values():
        x[~whole.attend] = 1.0
    if not torch.allclose(nats, objective.loss(outputs, whole, kernel), rtol=1e-5, atol=1e-6):
        wrong.append("the loss depends on outputs at padding")
    mine = {k: x[8:16] for k, x in outputs.items()}
    if not torch.allclose(nats[8:16], objective.loss(mine, part, kernel), rtol=1e-5, atol=1e-6):
        wrong.append("the loss of a row depends on other rows")
    if not same(batch, copy):
        wrong.append("the clean rows are changed in place")
    if generators_state() != before:
        wrong.append("a global random number generator is used")
    claim = "draws depend on the given rows and random numbers alone, and the loss of a row on this row"
    how = "seeds, rows of a rank, padding, global generators, repeated calls"
    return Check("objective.contract", claim, not wrong, "; ".join(wrong) or "kept", how)


def check_minimum(table: StringTable, objective: StringObjective[Any, Any], schedule: Schedule) -> Check:
    """Verify with random draws that the training loss and the loss of the bound are least at a perfect network.

    Random perturbations are added to its outputs, and subtracted. The average of the two mean losses must exceed the
    mean loss without a perturbation, and their difference must be 0 up to chance.

    Args:
        table: An enumerable instance of the kernel, which provides clean strings and a perfect network. Its noise is
            not enumerated but drawn.
        objective: The objective.
        schedule: Total noise as a function of time.
    """
    rows, size, wrong, steepest = 24_000, 0.3, list[str](), 0.0
    generator = torch.Generator().manual_seed(17)
    for make, name in ((objective.corrupt, "training"), (objective.bound_draw, "the bound")):
        batch = table.batch(torch.multinomial(table.law, rows, replacement=True, generator=generator))
        draw = make(batch, table.kernel, schedule, random=Randomness(generator))
        strings = Strings(draw.xt, draw.attend)
        perfect, index = table.outputs(strings, draw.sigma), table.number(strings)
        for _ in range(4):
            nats = []
            push = {
                k: size * torch.randn(len(table.strings) + 1, *x.shape[1:], generator=generator)[index]
                for k, x in perfect.items()
            }
            for sign in (-1, 0, 1):
                moved = {k: x + sign * push[k] for k, x in perfect.items()}
                if "log_x0" in moved:
                    moved["log_x0"] = moved["log_x0"].log_softmax(-1)
                nats.append(objective.loss(moved, draw, table.kernel).double())
            slope, rise = (nats[2] - nats[0]) / 2, (nats[2] + nats[0]) / 2 - nats[1]
            # the slope of a convex loss has a part of third order in the push
            odds = abs(float(slope.mean())) / (
                float(slope.std()) / math.sqrt(rows) + size * float(rise.mean().abs()) / 5
            )
            steepest = worst(steepest, odds)
            if not float(rise.mean()) > 0 or not odds < STEEPEST:
                wrong.append(name)
    claim = "the losses of training and of the bound are least at the perfect network"
    how = f"{rows:,} draws, four random directions, forth and back"
    value = (
        f"slope of {steepest:.1f} standard deviations (at most {STEEPEST:g})" if not wrong else f"not so: {wrong[0]}"
    )
    return Check("objective.minimum", claim, not wrong, value, how)


def check_objective_draws(
    table: EnumeratedTable, objective: StringObjective[Any, Any], schedule: Schedule, proof: Proof
) -> list[Check]:
    """Verify that the noisy strings and noise levels that an objective draws follow the process.

    Args:
        table: The enumeration.
        objective: The objective.
        schedule: Total noise as a function of time.
        proof: Strength of the verification.

    Returns:
        A check of the noisy strings given the noise level, and one of the noise levels.
    """
    kernel = table.kernel

    def sample(batch: Batch, sigma: Tensor, source: Randomness) -> Strings:
        draw = objective.corrupt(batch, kernel, schedule, random=source, t=schedule.time(sigma))
        return Strings(draw.xt, draw.attend)

    end = float(schedule.sigma(torch.ones(1, dtype=torch.float64)))
    levels = table.levels()[:: 4 if proof == "quick" else 6]
    levels = levels[levels < end]
    sigma = schedule.sigma(schedule.time(levels)).double()
    claim = "noisy strings of training and of the bound follow the process at their noise level"
    found = check_draws("objective.draws", claim, table, sample, sigma, "quick", many=1 if proof == "quick" else 3)
    rows = 1_000 if proof == "quick" else 2_500
    draw = objective.bound_draw(
        _batch(table, rows, 7), kernel, schedule, random=Randomness(torch.Generator().manual_seed(8))
    )
    inside = draw.sigma < end * (1 - 1e-6)
    off = misfit(table, Strings(draw.xt[inside], draw.attend[inside]), draw.sigma[inside].double(), 16)
    if not worst(*off) < LIMIT:
        found = dataclasses.replace(
            found, holds=False, value=f"draws for the bound: {worst(*off):.1f} standard deviations"
        )
    return [found, _check_times(ForcedDraws(table, objective, schedule), proof)]


def _check_times(forced: ForcedDraws, proof: Proof) -> Check:
    """Verify that drawn noise levels are those of uniform numbers, by a Kolmogorov-Smirnov test."""
    table, rows, statistic = forced.table, 1_024 if proof == "quick" else 4_096, 0.0
    shortest = int(table.clean_strings[0])
    batch = table.batch(torch.full((rows,), shortest))
    case = torch.zeros(rows, dtype=torch.int64)
    for make, given in ((forced.objective.corrupt, forced.training), (forced.objective.bound_draw, forced.bound)):
        source = Randomness(torch.Generator().manual_seed(9))
        seen = make(batch, table.kernel, forced.schedule, random=source).sigma.double().sort().values
        even = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
        expected = given(case, even)[0].sigma.double().sort().values
        # low-discrepancy draws are more even than independent ones, so that both must be allowed
        place = torch.searchsorted(expected.contiguous(), seen.contiguous()).double() / rows
        last = seen >= expected[-1] * (1 - 1e-6)  # where the noise level is clamped
        gap = (place - even).abs().masked_fill(last, 0.0)
        statistic = worst(statistic, float(gap.max()) * math.sqrt(rows))
    claim = "noise levels of training and of the bound are drawn as the loss weighs them"
    how = f"Kolmogorov-Smirnov statistic of {rows:,} draws times the root of their number"
    return Check("objective.times", claim, statistic < STATISTIC, f"{statistic:.2f} (at most {STATISTIC:g})", how)
