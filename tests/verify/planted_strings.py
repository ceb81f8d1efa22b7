"""Faults that are planted in string processes, one at a time, each with the checks that must name it.

A fault changes the components of a process: ``fault(parts)`` returns them, or changes them in place. It is applied to
the toys and to the declared components alike, as a faulty component would be.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringWalk
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts
from sedd_graph.verify.strings import prove_strings
from tests.plans import string_plan
from tests.verify.string_kernels import REGISTRY, part

__all__ = ["FAULTS", "PROCESSES", "Fault", "prove_faulty"]

LINEAR = part("linear_rate", rate_min=0.01, rate_max=40.0)
PROCESSES: dict[str, ProcessPlan] = {
    "delete": string_plan(part("delete"), part("loglinear"), part("dise"), part("string_tau"), 10),
    "sampled": string_plan(part("delete"), part("loglinear"), part("dise", targets="sampled"), part("string_tau"), 10),
    "dice": string_plan(part("delete"), part("loglinear"), part("dice"), part("string_first_hitting"), 10),
    "dice_tau": string_plan(part("delete"), part("loglinear"), part("dice"), part("string_tau"), 10),
    "thinning": string_plan(part("delete"), part("loglinear"), part("dise"), part("string_thinning"), 10),
    "indel": string_plan(part("indel", mean_length=1.0), LINEAR, part("dise"), part("string_tau"), 10),
    "edit_flow": string_plan(
        part("edit_flow", mean_length=2.0), part("cubic"), part("edit_flow_loss"), part("string_tau"), 10
    ),
    "empty": string_plan(part("edit_flow"), part("cubic"), part("edit_flow_loss"), part("string_tau"), 10),
    "flexmdm": string_plan(part("mask_delete", pace=2.0), part("loglinear"), part("flexmdm"), part("flexmdm_tau"), 10),
    "flexmdm_thinning": string_plan(
        part("mask_delete"), part("loglinear"), part("flexmdm"), part("flexmdm_thinning"), 10
    ),
}


class Fault(NamedTuple):
    """A fault of one component.

    Attributes:
        process: Name of the process in :data:`PROCESSES`.
        plant: Changes the components in place.
        names: Checks of which at least one must fail.
    """

    process: str
    plant: Callable[[StringParts], None]
    names: frozenset[str]


FAULTS: dict[str, Fault] = {}


def fault(*processes: str, names: str) -> Callable[[Callable[[StringParts], None]], Callable[[StringParts], None]]:
    """Register a fault of several processes, that the checks ``names``, separated by blanks, must find."""

    def register(plant: Callable[[StringParts], None]) -> Callable[[StringParts], None]:
        for process in processes:
            FAULTS[f"{plant.__name__}-{process}"] = Fault(process, plant, frozenset(names.split()))
        return plant

    return register


def prove_faulty(process: str, plant: Callable[[StringParts], None], proof: Proof) -> list[Check]:
    """Prove a process whose components have a fault."""

    def make(states: int | None) -> StringParts:
        parts = make_parts(PROCESSES[process], REGISTRY, states)
        plant(parts)
        return parts

    return prove_strings(make, proof)


def patched(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Replace the method ``name`` of an object by ``wrap(method, *arguments, **keywords)``."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: wrap(method, *a, **k))


def scaled(factor: float, which: int | None = None) -> Callable[..., Tensor]:
    """A wrap that multiplies the result, or one of its columns, by a factor."""

    def wrap(method: Any, *a: Any, **k: Any) -> Tensor:
        found = method(*a, **k).clone()
        found[..., slice(None) if which is None else which] *= factor
        return found

    return wrap


# -- kernels ----------------------------------------------------------------------------------------------------------


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def noise_5_percent_high(parts: StringParts) -> None:
    patched(parts.kernel, "sample", lambda m, batch, sigma, **k: m(batch, 1.05 * sigma, **k))


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def wrong_in_a_narrow_stretch(parts: StringParts) -> None:
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(batch, torch.where((sigma > 0.4) & (sigma < 0.5), 0.5 * sigma, sigma), **k),
    )


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws objective.contract")
def rows_noised_together(parts: StringParts) -> None:
    class Same(Randomness):
        def rand(self, rows: int, *shape: int) -> Tensor:
            return super().rand(rows, *shape)[:1].expand(rows, *shape)

    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, *, random, width: m(
            batch, sigma, random=Same(random.generator, start=random.start, total=random.total), width=width
        ),
    )


@fault("delete", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def last_token_is_never_lost(parts: StringParts) -> None:
    def wrap(m: Any, batch: Any, sigma: Tensor, **k: Any) -> Any:
        found = m(batch, sigma, **k)
        strings = found[0] if isinstance(found, tuple) else found
        bare = (strings.lengths == 0) & batch.attend.any(-1)
        width = max(2, strings.tokens.shape[1])
        tokens = torch.nn.functional.pad(strings.tokens, (0, width - strings.tokens.shape[1]), value=parts.kernel.start)
        attend = torch.nn.functional.pad(strings.attend, (0, width - strings.attend.shape[1]))
        last = batch.tokens.gather(1, (batch.attend.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
        tokens[:, 1] = torch.where(bare, last, tokens[:, 1])
        attend[:, 1] |= bare
        made = dataclasses.replace(strings, tokens=tokens, attend=attend)
        return (made, *found[1:]) if isinstance(found, tuple) else made

    patched(parts.kernel, "sample", wrap)


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def third_token_is_lost_twice_as_fast(parts: StringParts) -> None:
    """Right for two data tokens."""

    def wrap(m: Any, batch: Any, sigma: Tensor, **k: Any) -> Any:
        many = ((batch.tokens == 2) & batch.attend).any(-1)
        return m(batch, torch.where(many, 1.5 * sigma, sigma), **k)

    patched(parts.kernel, "sample", wrap)


@fault("delete", names="strings.sample objective.draws")
def fourth_position_is_noised_less(parts: StringParts) -> None:
    """Right for strings of three tokens."""
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(batch, torch.where(batch.attend.sum(-1) > 3, 0.8 * sigma, sigma), **k),
    )


@fault("delete", "flexmdm", names="strings.spared")
def prompts_are_noised(parts: StringParts) -> None:
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(dataclasses.replace(batch, corrupt=batch.attend), sigma, **k),
    )


@fault("indel", "edit_flow", names="strings.prior")
def prior_5_percent_long(parts: StringParts) -> None:
    kernel: Any = parts.kernel
    name = "births" if isinstance(kernel, BirthDeath) else "spread"
    value = getattr(kernel, name)
    mean = 1.05 * value / (1 - value)

    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        changed = copy.copy(kernel)
        changed.__class__ = type("Longer", (type(kernel),), {name: mean / (1 + mean), "abstract": True})
        return type(kernel).prior(changed, rows, **k)

    patched(kernel, "prior", wrap)


@fault("indel", "edit_flow", names="strings.prior strings.declared")
def prior_tokens_are_uniform(parts: StringParts) -> None:
    kernel: Any = parts.kernel

    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        changed = copy.copy(kernel)
        changed._buffers = dict(kernel._buffers)
        changed.law = torch.full_like(kernel.law, 1 / len(kernel.law))
        return type(kernel).prior(changed, rows, **k)

    patched(kernel, "prior", wrap)


@fault("indel", "edit_flow", names="strings.prior")
def prior_ignores_what_is_allowed(parts: StringParts) -> None:
    patched(parts.kernel, "prior", lambda m, rows, **k: m(rows, **(k | {"allowed": None})))


@fault("indel", "edit_flow", names="strings.declared")
def prior_is_wrong_for_large_vocabularies_alone(parts: StringParts) -> None:
    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        found = m(rows, **k)
        if parts.kernel.data_tokens <= 3:
            return found
        real = found.attend & (torch.arange(found.tokens.shape[1]) > 0)
        return dataclasses.replace(found, tokens=torch.where(real & (found.tokens == 4), 5, found.tokens))

    patched(parts.kernel, "prior", wrap)


@fault(
    "delete",
    "indel",
    "edit_flow",
    "flexmdm",
    names="strings.insert strings.transport objective.rate objective.tight objective.wrong sampler.rates",
)
def insertion_rate_5_percent_high(parts: StringParts) -> None:
    """Where targets are divided by the rate, as those of ``indel``, only the steps of the sampler disagree with it."""
    patched(parts.kernel, "weights", scaled(1.05, 0))


@fault(
    "indel",
    "edit_flow",
    "flexmdm",
    names="strings.delete strings.transport objective.rate objective.tight objective.wrong sampler.rates",
)
def second_rate_5_percent_low(parts: StringParts) -> None:
    patched(parts.kernel, "weights", scaled(0.95, 1))


@fault("delete", "flexmdm", names="objective.wrong objective.rate strings.insert strings.gap")
def equal_tokens_are_counted_once(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        found = m(*a, **k)
        return dataclasses.replace(found, missing=found.missing.clamp(max=1.0))

    patched(parts.kernel, "target", wrap)


@fault("delete", "indel", "flexmdm", names="objective.wrong objective.rate strings.insert strings.gap")
def gap_is_off_by_one(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        found = m(*a, **k)
        return dataclasses.replace(found, missing=found.missing.roll(1, -1))

    patched(parts.kernel, "target", wrap)


@fault("delete", names="objective.rate objective.wrong objective.training objective.tight")
def targets_wrong_at_high_noise(parts: StringParts) -> None:
    def wrap(m: Any, batch: Any, strings: Any, sigma: Tensor) -> Any:
        found = m(batch, strings, sigma)
        return dataclasses.replace(found, missing=found.missing * torch.where(sigma > 4, 0.9, 1.0)[:, None, None])

    patched(parts.kernel, "target", wrap)


@fault("delete", names="objective.bound objective.tight")
def clock_slope_10_percent_high(parts: StringParts) -> None:
    patched(parts.kernel, "clock", lambda m, u, end: (m(u, end)[0], 1.1 * m(u, end)[1]))


# -- objectives -------------------------------------------------------------------------------------------------------

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


# -- samplers ---------------------------------------------------------------------------------------------------------


def walking(parts: StringParts, change: Callable[[StringWalk[Any]], object]) -> None:
    """Change the walk of a sampler before it runs."""

    def wrap(m: Any, walk: StringWalk[Any], steps: int) -> None:
        change(walk)
        m(walk, steps)

    patched(parts.sampler, "walk", wrap)


SAMPLED = "sampler.law sampler.moments sampler.tokens sampler.rates"


@fault("delete", "thinning", "indel", "edit_flow", "flexmdm", "flexmdm_thinning", names=SAMPLED)
def temperature(parts: StringParts) -> None:
    """Tokens are drawn at temperature 0.9, with the same total rates."""

    def cooler(outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = dict(outputs)
        for name in ("log_insert", "log_x0", "log_substitute"):
            if name in found:
                x = found[name].clamp(min=-1e4)
                found[name] = (x / 0.9).log_softmax(-1) + x.logsumexp(-1, keepdim=True)
        return found

    walking(parts, lambda walk: patched(walk, "outputs", lambda m, sigma: cooler(m(sigma))))


@fault("delete", "flexmdm", "empty", names=SAMPLED)
def dependence_is_ignored(parts: StringParts) -> None:
    """The network sees whether a position holds a token, and not which."""

    def blind(walk: StringWalk[Any]) -> None:
        rates = walk._rates

        def seeing(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
            tokens = torch.where(strings.tokens < parts.kernel.data_tokens, 0, strings.tokens)
            return rates(dataclasses.replace(strings, tokens=tokens), sigma)

        walk._rates = seeing

    walking(parts, blind)


@fault("delete", "thinning", "edit_flow", names=SAMPLED)
def inserts_one_gap_later(parts: StringParts) -> None:
    def late(walk: StringWalk[Any]) -> None:
        def wrap(m: Any, outputs: Mapping[str, Tensor]) -> Tensor:
            weights = m(outputs)
            return torch.where(walk.strings.attend[..., None], weights.roll(1, 1), 0.0)

        patched(walk, "insertions", wrap)

    walking(parts, late)


@fault("delete", "indel", "edit_flow", "flexmdm", names=SAMPLED)
def half_of_each_step(parts: StringParts) -> None:
    patched(parts.kernel, "leap", lambda m, sigma, after: m(sigma, (sigma + after) / 2))


@fault("delete", "indel", "edit_flow", names=SAMPLED)
def inserts_5_percent_less(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "insertions", lambda m, outputs: 0.95 * m(outputs)))


@fault("indel", "edit_flow", names=SAMPLED)
def never_deletes(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "deletions", lambda m, outputs: 0 * m(outputs)))


@fault("edit_flow", names=SAMPLED)
def never_substitutes(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "substitutions", lambda m, outputs: 0 * m(outputs)))


@fault("indel", names="sampler.kept")
def fixed_tokens_are_deleted(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.fixed[:, 1:].zero_())


@fault("delete", "indel", "flexmdm", "thinning", names="sampler.kept")
def shut_gaps_are_open(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.shut.zero_() if walk.strings.tokens.shape[1] > 1 else None)


@fault("delete", "indel", "flexmdm", "thinning", names="sampler.kept")
def allowed_is_ignored(parts: StringParts) -> None:
    walking(parts, lambda walk: setattr(walk, "allowed", None))


@fault("delete", "flexmdm", names="sampler.contract")
def sampler_uses_the_global_generator(parts: StringParts) -> None:
    walking(parts, lambda walk: setattr(walk, "generator", torch.default_generator))


@fault("delete", "thinning", names="sampler.contract")
def sampler_has_its_own_seed(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.generator.manual_seed(0))


@fault("dice_tau", names="sampler.clean")
def strings_stay_short(parts: StringParts) -> None:
    """Nothing completes strings that have too few tokens."""
    patched(
        parts.sampler,
        "run",
        lambda m, rates, strings, settings, **k: m(
            rates, strings, dataclasses.replace(settings, one_length=False), **k
        ),
    )
