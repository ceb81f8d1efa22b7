"""Planted faults of schedules and token kernels: each is caught, by the name of the check that is made for it.

Faults of few states are verified by the quick proof, those of many states by the full one; most are marked ``slow``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Mixture, Uniform, Unigram
from sedd_graph_registry.noise.masking import LearnedPower, Power
from sedd_graph_registry.noise.neighbours import Neighbours
from sedd_graph_registry.noise.rate_matrix import Ordinal
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.verify.noise import check_declared, check_kernel
from tests.verify.planted import Fault, after, before
from tests.verify.planted_kernels import (
    above,
    all_allowed,
    all_corrupt,
    allowed_in_place,
    antithetic,
    batch_mean,
    below,
    bound,
    clamped_scores,
    clean_below,
    first_fixed,
    first_of_row,
    first_row,
    five_percent,
    floored,
    from_global,
    half_detached,
    ignoring_start,
    in_pairs,
    in_place,
    last_not_noised,
    last_x0,
    last_xt,
    later_parameters,
    mean_noise,
    more_states_than,
    one_replacement,
    other_noise,
    own_generator,
    prior_of_seed,
    rates_at,
    rounded,
    rows_in_pairs,
    scaled,
    shift_last,
    stratified,
    swap_last,
    together,
    unnamed_parameter,
    with_state,
    within,
    without_last,
)
from tests.verify.test_tokens import part, processes

FEW: list[Fault] = [
    # the last token
    Fault("score entropy 5 % off at the last token", Uniform, after(Uniform, "score_entropy", scaled(1.05, last_x0)), ("kernel.score_entropy",)),
    Fault("nelbo 5 % off at the last token", Absorb, after(Absorb, "nelbo", scaled(1.05, last_x0)), ("kernel.nelbo",)),
    Fault("nelbo 5 % off at the last noisy token", Uniform, after(Uniform, "nelbo", scaled(1.05, last_xt)), ("kernel.nelbo",)),
    Fault("the last token is never drawn", Uniform, after(Uniform, "sample", without_last), ("kernel.sample",)),
    Fault("the last token is never noised", Absorb, after(Absorb, "sample", last_not_noised), ("kernel.sample",)),
    Fault("the prior lacks the last token", Unigram, after(Unigram, "prior", without_last), ("kernel.prior",)),
    Fault("the score of the last token is off", Power, after(Power, "log_score", shift_last(0.02)), ("kernel.log_score",)),
    Fault("the last two tokens are exchanged in a Tweedie step", Absorb, after(Absorb, "analytic", swap_last), ("kernel.analytic",)),
    Fault("the last two tokens are exchanged in an ancestral step", Uniform, after(Uniform, "posterior", swap_last), ("kernel.posterior",)),
    Fault("the reverse rate to the last token is off", Uniform, after(Uniform, "reverse_rate", shift_last(0.01)), ("kernel.reverse_rate",)),
    # high and low noise
    Fault("nelbo 2 % off at high noise", Uniform, after(Uniform, "nelbo", scaled(1.02, above(5.0))), ("kernel.nelbo",)),
    Fault("nelbo 2 % off at low noise", Power, after(Power, "nelbo", scaled(1.02, below(2e-3))), ("kernel.nelbo",)),
    Fault("score entropy 2 % off at low noise", Uniform, after(Uniform, "score_entropy", scaled(1.02, below(2e-3))), ("kernel.score_entropy",)),
    Fault("score entropy 2 % off at high noise", Absorb, after(Absorb, "score_entropy", scaled(1.02, above(6.0))), ("kernel.score_entropy",)),
    Fault("no noise at low noise", Absorb, after(Absorb, "sample", clean_below(0.05)), ("kernel.sample",)),
    Fault("draws at less noise at high noise", Uniform, before(Uniform, "sample", other_noise(0.5, above(3.0))), ("kernel.sample",)),
    Fault("draws of 5 % more noise", Absorb, before(Absorb, "sample", other_noise(1.05)), ("kernel.sample",)),
    Fault("ancestral step off at high noise", Unigram, before(Unigram, "posterior", lambda self, g, x, s, r: (g, x, s, torch.where(s > 5, 0.9 * r, r))), ("kernel.posterior",)),
    Fault("Tweedie step off at low noise", Uniform, after(Uniform, "analytic", scaled(0.99, lambda self, score, x, s, r: s < 5e-3)), ("kernel.analytic",)),
    Fault("scores off at low noise", Uniform, after(Uniform, "log_score", scaled(1.01, below(1e-3))), ("kernel.log_score",)),
    Fault("reverse rates off at high noise", Absorb, after(Absorb, "reverse_rate", scaled(1.05, above(5.0))), ("kernel.reverse_rate",)),
    Fault("Q off at high noise", Mixture, rates_at(Mixture, 1.02, lambda s: s > 5.0), ("kernel.transition",)),
    Fault("Q off at low noise", Power, rates_at(Power, 1.02, lambda s: s < 1e-3), ("kernel.transition",)),
    # one stretch of noise
    Fault("nelbo off in a stretch", Uniform, after(Uniform, "nelbo", scaled(1.05, within(0.5, 0.7))), ("kernel.nelbo",)),
    Fault("ancestral step off in a stretch", Absorb, after(Absorb, "posterior", scaled(1.05, lambda self, g, x, s, r: (s > 2.0) & (s < 2.5))), ("kernel.posterior",)),
    Fault("draws off in a stretch", Absorb, before(Absorb, "sample", other_noise(0.7, within(0.2, 0.5))), ("kernel.sample",)),
    # the prior
    Fault("the prior is 5 % token 0", Uniform, after(Uniform, "prior", five_percent), ("kernel.prior",)),
    Fault("the prior of masks is 5 % token 0", Absorb, after(Absorb, "prior", five_percent), ("kernel.prior",)),
    Fault("a row of the prior is one token", Uniform, after(Uniform, "prior", first_of_row), ("kernel.prior_independent",)),
    Fault("all rows of the prior are one", Unigram, after(Unigram, "prior", first_row), ("kernel.prior_independent",)),
    Fault("allowed is ignored", Uniform, all_allowed(Uniform), ("kernel.allowed",)),
    Fault("allowed is changed in place", Unigram, allowed_in_place(Unigram), ("kernel.allowed",)),
    Fault("the prior has its own seed", Uniform, prior_of_seed(Uniform), ("kernel.seed",)),
    # roles, independence, random numbers
    Fault("corrupt is ignored", Absorb, all_corrupt(Absorb), ("kernel.corrupt",)),
    Fault("corrupt is ignored by a kernel without mask", Ordinal, all_corrupt(Ordinal), ("kernel.corrupt",)),
    Fault("corrupt keeps the first position alone", Uniform, first_fixed(Uniform), ("kernel.corrupt",)),
    Fault("rows are masked all together", Absorb, {"sample": together}, ("kernel.independent",)),
    Fault("positions are masked in pairs", Absorb, {"sample": in_pairs}, ("kernel.independent",)),
    Fault("rows are masked in pairs", Absorb, {"sample": rows_in_pairs}, ("kernel.independent", "kernel.split")),
    Fault("the number of masks is not random", Absorb, {"sample": stratified}, ("kernel.independent",)),
    Fault("positions are antithetic", Absorb, {"sample": antithetic}, ("kernel.independent",)),
    Fault("one replacement for a row", Uniform, {"sample": one_replacement}, ("kernel.independent",)),
    Fault("ranks draw the same rows", Absorb, {"sample": ignoring_start}, ("kernel.split",)),
    Fault("draws have their own seed", Absorb, {"sample": own_generator}, ("kernel.seed",)),
    Fault("torch's global generator", Absorb, {"sample": from_global("torch")}, ("kernel.seed",)),
    Fault("numpy's global generator", Absorb, {"sample": from_global("numpy")}, ("kernel.seed",)),
    Fault("python's global generator", Absorb, {"sample": from_global("python")}, ("kernel.seed",)),
    Fault("state between draws", Absorb, {"sample": with_state}, ("kernel.seed",)),
    Fault("every row at the mean noise of the batch", Absorb, before(Absorb, "sample", mean_noise), ("kernel.sample", "kernel.split")),
    Fault("draws are int32", Uniform, after(Uniform, "sample", lambda self, found, *_: found.int()), ("kernel.corrupt",)),
    Fault("a loss changes its input", Uniform, in_place(Uniform, "score_entropy"), ("kernel.pure",)),
    Fault("a step changes its input", Absorb, in_place(Absorb, "posterior"), ("kernel.pure",)),
    Fault("a loss depends on the batch", Uniform, after(Uniform, "nelbo", batch_mean), ("kernel.pure",)),
    # what is declared
    Fault("clamp_safe without being so", Mixture, {"clamp_safe": True}, ("kernel.declares",)),
    Fault("masks_evenly without being so", Power, {"masks_evenly": True}, ("kernel.declares",)),
    Fault("a bound 5 % low", Uniform, bound(0.95), ("kernel.rate_bound",)),
    Fault("a parameter that is not declared", Uniform, unnamed_parameter(Uniform), ("kernel.declares",)),
    Fault("right at the first parameters alone", LearnedPower, later_parameters(LearnedPower), ("kernel.nelbo",)),
    # gradients, extremes, float32
    Fault("half the gradient of score entropy", Uniform, after(Uniform, "score_entropy", half_detached), ("kernel.score_entropy",)),
    Fault("half the gradient of nelbo", Absorb, after(Absorb, "nelbo", half_detached), ("kernel.nelbo",)),
    Fault("scores are clamped at e^5", Uniform, before(Uniform, "score_entropy", clamped_scores(5.0)), ("kernel.score_entropy",)),
    Fault("predictions are floored at e^-9", Absorb, before(Absorb, "nelbo", floored(-9.0)), ("kernel.nelbo",)),
    Fault("predictions are floored at e^-15", Uniform, before(Uniform, "log_score", floored(-9.0)), ("kernel.log_score",)),
    Fault("scores of a reverse rate are clamped", Uniform, before(Uniform, "reverse_rate", lambda self, s, *rest: (s.clamp(max=100.0), *rest)), ("kernel.reverse_rate",)),
    Fault("float32 losses are rounded to bfloat16", Uniform, after(Uniform, "nelbo", rounded), ("kernel.float32",)),
    Fault("float32 steps are rounded to bfloat16", Absorb, after(Absorb, "posterior", rounded), ("kernel.float32",)),
]  # fmt: skip
"""Faults that a kernel of few states shows."""

MANY: list[Fault] = [
    *(
        Fault(f"{name} right for three tokens alone", cls, after(cls, name, scaled(by, more_states_than(4))), (f"kernel.{name}",), states=28)
        for name, cls, by in (
            ("score_entropy", Uniform, 1.05),
            ("nelbo", Absorb, 1.05),
            ("posterior", Unigram, 1.05),
            ("analytic", Uniform, 1.05),
            ("log_score", Power, 1.05),
            ("reverse_rate", Ordinal, 1.05),
        )
    ),
    Fault("draws right for three tokens alone", Absorb, before(Absorb, "sample", other_noise(0.9, more_states_than(4))), ("kernel.sample",), states=28),
    Fault("a prior right for three tokens alone", Uniform, after(Uniform, "prior", lambda self, x, *_: five_percent(self, x) if self.states > 4 else x), ("kernel.prior",), states=28),
    *(
        Fault(f"{name} right for 64 states alone", cls, after(cls, name, scaled(by, more_states_than(64))), caught, states=257)
        for name, cls, by, caught in (
            ("score_entropy", Uniform, 1.05, ("declared.loss",)),
            ("nelbo", Absorb, 1.05, ("declared.loss",)),
            ("posterior", Unigram, 1.05, ("declared.steps",)),
            ("analytic", Uniform, 1.05, ("declared.steps",)),
            ("log_score", Uniform, 1.05, ("declared.sample", "declared.log_score", "declared.steps")),
            ("reverse_rate", Mixture, 1.05, ("declared.forward", "declared.loss")),
            ("score_entropy", Power, 1.05, ("declared.loss",)),
            ("reverse_rate", Absorb, 1.05, ("declared.forward", "declared.loss")),
        )
    ),
    Fault("draws right for 64 states alone", Absorb, before(Absorb, "sample", other_noise(0.9, more_states_than(64))), ("declared.sample",), states=257),
    Fault("draws at the wrong noise, many states", Unigram, before(Unigram, "sample", other_noise(0.93, more_states_than(64))), ("declared.sample",), states=257),
    Fault("a prior right for 64 states alone", Uniform, after(Uniform, "prior", lambda self, x, *_: five_percent(self, x) if self.states > 64 else x), ("declared.prior",), states=257),
    Fault("the last of many tokens is never noised", Absorb, after(Absorb, "sample", lambda self, x, x0, *_: last_not_noised(self, x, x0) if self.states > 64 else x), ("declared.sample",), states=257),
    Fault("many tokens: nelbo off at the last", Uniform, after(Uniform, "nelbo", lambda self, found, *a: scaled(1.05, last_x0)(self, found, *a) if self.states > 64 else found), ("declared.loss",), states=257),
    Fault("many tokens: corrupt is ignored", Uniform, {"sample": lambda self, x0, sigma, *, random, corrupt: Uniform.sample(self, x0, sigma, random=random, corrupt=corrupt | torch.tensor(self.states > 64))}, ("declared.corrupt",), states=257),
    Fault("many tokens: rows masked all together", Absorb, {"sample": lambda self, x0, sigma, **k: (together if self.states > 64 else Absorb.sample)(self, x0, sigma, **k)}, ("declared.independent",), states=257),
    Fault("many tokens: the global generator", Absorb, {"sample": lambda self, x0, sigma, **k: (from_global("torch") if self.states > 64 else Absorb.sample)(self, x0, sigma, **k)}, ("declared.seed",), states=257),
    Fault("many tokens: ranks draw the same rows", Absorb, {"sample": lambda self, x0, sigma, **k: (ignoring_start if self.states > 64 else Absorb.sample)(self, x0, sigma, **k)}, ("declared.split",), states=257),
    Fault("many tokens: allowed is ignored", Uniform, {"prior": lambda self, rows, length, *, generator, allowed: Uniform.prior(self, rows, length, generator=generator, allowed=None if self.states > 64 else allowed)}, ("declared.allowed",), states=257),
    Fault("nelbo off in a narrow stretch", Uniform, after(Uniform, "nelbo", scaled(1.05, within(1.0, 1.06))), ("kernel.nelbo",)),
    Fault("score entropy off in a narrow stretch", Absorb, after(Absorb, "score_entropy", scaled(1.05, within(0.01, 0.0106))), ("kernel.score_entropy",)),
    Fault("ancestral step off in a narrow stretch", Absorb, after(Absorb, "posterior", scaled(1.05, lambda self, g, x, s, r: (s > 2.0) & (s < 2.12))), ("kernel.posterior",)),
    Fault("rates of the graph off", Neighbours, after(Neighbours, "reverse_rate", scaled(1.01, lambda *_: True)), ("kernel.reverse_rate",), {"neighbours": 2}),
    Fault("draws of the graph at other noise", Neighbours, before(Neighbours, "sample", other_noise(0.93)), ("kernel.sample",), {"neighbours": 2}),
]  # fmt: skip
"""Faults of larger vocabularies, and in narrow stretches of noise: the full proof finds them."""

QUICK = {
    "score entropy 5 % off at the last token",
    "the last token is never noised",
    "the prior lacks the last token",
    "the last two tokens are exchanged in a Tweedie step",
    "nelbo 2 % off at high noise",
    "draws of 5 % more noise",
    "scores off at low noise",
    "Q off at low noise",
    "ancestral step off in a stretch",
    "the prior is 5 % token 0",
    "a row of the prior is one token",
    "allowed is ignored",
    "corrupt is ignored",
    "rows are masked all together",
    "the number of masks is not random",
    "ranks draw the same rows",
    "torch's global generator",
    "state between draws",
    "a loss changes its input",
    "clamp_safe without being so",
    "half the gradient of nelbo",
    "scores are clamped at e^5",
    "predictions are floored at e^-9",
    "float32 steps are rounded to bfloat16",
}
"""Names of the faults that are planted in every run of the tests; the others take longer together."""


def failing(checks: list[Check]) -> set[str]:
    return {c.name for c in checks if c.holds is False}


@pytest.mark.parametrize(
    "fault", [f if f.name in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FEW], ids=lambda f: f.name
)
def test_a_fault_of_few_states_is_caught_by_name(fault: Fault) -> None:
    found = failing(check_kernel(fault.of(), end=9.0, proof="quick"))
    assert found & set(fault.caught), found


def prove(fault: Fault) -> list[Check]:
    """Verify a kernel with a fault in a process whose other components are sound, at its declared number of states."""
    sound = processes(kernel=part("uniform" if fault.base.mask is None else "absorb"))

    def make(states: int | None) -> TokenParts:
        return sound(None if states is None else 4)._replace(kernel=fault.of(states))

    return check_declared(make(3 if fault.base.mask is None else 4), make, "full")


def test_an_error_of_a_kernel_is_a_finding() -> None:
    def posterior(self: Any, *arguments: Tensor) -> Tensor:
        raise KeyError("weights")

    (found,) = (c for c in prove(Fault("raises", Uniform, {"posterior": posterior}, ())) if c.holds is False)
    assert found.name == "kernel.runs"
    assert "KeyError: 'weights'" in found.value


@pytest.mark.slow
@pytest.mark.parametrize("fault", MANY, ids=lambda f: f.name)
def test_a_fault_of_many_states_or_a_narrow_stretch_is_caught_by_name(fault: Fault) -> None:
    found = failing(prove(fault))
    assert found & set(fault.caught), found
