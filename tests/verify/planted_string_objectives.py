"""Faults of objectives of strings: of their losses and draws."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.parts import StringParts
from tests.verify.string_faults import fault, patched

EVERY = ("delete", "indel", "edit_flow", "flexmdm")
BOUND, TRAINED = "objective.tight objective.bound", "objective.training objective.rate objective.wrong"


@fault(*EVERY, names=BOUND)
def bound_2_percent_high(parts: StringParts) -> None:
    """The bound alone, by the weights of its draws."""

    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        draw = m(*a, **k)
        more = {"constant": 1.02 * draw.constant} if hasattr(draw, "constant") else {}
        return dataclasses.replace(draw, weights=1.02 * draw.weights, **more)

    patched(parts.objective, "bound_draw", wrap)


@fault(*EVERY, names=TRAINED)
def training_loss_2_percent_high(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        draw = m(*a, **k)
        more = {"constant": 1.02 * draw.constant} if hasattr(draw, "constant") else {}
        return dataclasses.replace(draw, weights=1.02 * draw.weights, **more)

    patched(parts.objective, "corrupt", wrap)


@fault(*EVERY, names="objective.wrong")
def right_at_the_truth_alone(parts: StringParts) -> None:
    """The gradient is twice too large, and the value at the truth is right."""

    def wrap(m: Any, outputs: Mapping[str, Tensor], draw: Any, kernel: Any) -> Tensor:
        found = m(outputs, draw, kernel)
        return found.detach() + 2 * (found - found.detach())

    patched(parts.objective, "loss", wrap)


@fault("delete", "empty", "flexmdm", names="objective.wrong objective.contract objective.rate objective.tight")
def loss_counts_padding(parts: StringParts) -> None:
    def wrap(m: Any, outputs: Mapping[str, Tensor], draw: Any, kernel: Any) -> Tensor:
        name = "log_insert" if "log_insert" in outputs else "log_gap"
        beyond = (
            outputs[name].float().clamp(min=-30).flatten(2) if outputs[name].dim() > 2 else outputs[name][..., None]
        )
        return m(outputs, draw, kernel) + 0.01 * torch.where(~draw.attend[..., None], beyond.exp(), 0.0).sum((1, 2))

    patched(parts.objective, "loss", wrap)


@fault(*EVERY, names="objective.draws objective.rate objective.training")
def trains_at_higher_noise(parts: StringParts) -> None:
    """Noisy strings are drawn at 5 % more noise than the loss is told."""
    kernel = parts.kernel

    def wrap(m: Any, batch: Any, given: Any, schedule: Any, **k: Any) -> Any:
        other = copy.copy(given)
        other.sample = lambda b, sigma, **how: given.sample(b, 1.05 * sigma, **how)
        return m(batch, other, schedule, **k)

    assert kernel is parts.kernel
    patched(parts.objective, "corrupt", wrap)


@fault("delete", "edit_flow", "flexmdm", names="objective.times objective.training")
def times_are_the_larger_of_two(parts: StringParts) -> None:
    class Larger(Randomness):
        def low_discrepancy(self, rows: int) -> Tensor:
            return torch.maximum(super().low_discrepancy(rows), self.rand(rows))

    def wrap(m: Any, *a: Any, random: Randomness, **k: Any) -> Any:
        if type(random) is not Randomness:
            return m(*a, random=random, **k)
        return m(*a, random=Larger(random.generator, start=random.start, total=random.total), **k)

    patched(parts.objective, "corrupt", wrap)


@fault("delete", "edit_flow", names="objective.contract")
def global_generator(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, random: Randomness, **k: Any) -> Any:
        torch.rand(1)
        return m(*a, random=random, **k)

    patched(parts.objective, "corrupt", wrap)


@fault("delete", "flexmdm", names="objective.contract")
def state_between_draws(parts: StringParts) -> None:
    calls = [0]

    def wrap(m: Any, batch: Any, kernel: Any, schedule: Any, *, random: Randomness, **k: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            random.rand(1)
        return m(batch, kernel, schedule, random=random, **k)

    patched(parts.objective, "corrupt", wrap)


@fault("delete", "edit_flow", "flexmdm", names="objective.contract")
def every_rank_draws_the_first_rows(parts: StringParts) -> None:
    patched(
        parts.objective,
        "corrupt",
        lambda m, *a, random, **k: m(
            *a, random=Randomness(random.generator) if type(random) is Randomness else random, **k
        ),
    )


@fault("edit_flow", "empty", names="objective.rate objective.wrong objective.training")
def weights_are_capped_and_it_is_not_declared(parts: StringParts) -> None:
    patched(
        parts.objective,
        "corrupt",
        lambda m, *a, **k: (lambda d: dataclasses.replace(d, weights=d.weights.clamp(max=4.0)))(m(*a, **k)),
    )


@fault("sampled", names="objective.wrong")
def sampled_targets_of_one_gap_later(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        found = m(*a, **k)
        return dataclasses.replace(found, missing=found.missing.roll(1, -1))

    patched(parts.kernel, "sampled_target", wrap)


@fault(
    "dice",
    "dice_tau",
    names="objective.reverse",
)
def rates_sum_to_one_more(parts: StringParts) -> None:
    """Samples of strings of one known length do not show it: tokens and gaps are drawn in proportion to the rates."""
    patched(parts.objective, "rates", lambda m, outputs, strings, longest: m(outputs, strings, longest + 1))
