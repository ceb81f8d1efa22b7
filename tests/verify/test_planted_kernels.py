"""Planted faults of schedules and token kernels: each is caught, by the name of the check that is made for it.

Faults of few states are verified by the quick proof, those of many states by the full one; most are marked ``slow``.
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.verify.planted import Fault, after, at, before, globally_seeded
from tests.verify.test_tokens import part, processes

LOSSES = {"score_entropy", "nelbo"}
LOSS = ("kernel.score_entropy", "kernel.nelbo", "declared.loss")


def scaled(by: float, where: Callable[..., Tensor | bool]) -> Callable[..., Tensor]:
    """Multiply the result where ``where(kernel, *arguments)`` holds."""

    def change(self: Any, found: Tensor, *arguments: Any) -> Tensor:
        chosen = torch.as_tensor(where(self, *arguments))
        return at(chosen, by * found, found)

    return change


def levels(arguments: tuple[Any, ...]) -> Tensor:
    """Return the first argument that is total noise: the first floating-point tensor of one axis."""
    found: Tensor = next(v for v in arguments if isinstance(v, Tensor) and v.dim() == 1 and v.is_floating_point())
    return found


def above(limit: float) -> Callable[..., Tensor]:
    return lambda self, *arguments: levels(arguments) > limit


def below(limit: float) -> Callable[..., Tensor]:
    return lambda self, *arguments: levels(arguments) < limit


def within(low: float, high: float) -> Callable[..., Tensor]:
    return lambda self, *arguments: (levels(arguments) > low) & (levels(arguments) < high)


def more_states_than(count: int) -> Callable[..., bool]:
    return lambda self, *arguments: bool(self.states > count)


def last_x0(self: Any, head: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    return x0 == self.data_tokens - 1


def last_xt(self: Any, head: Tensor, xt: Tensor, *rest: Any) -> Tensor:
    return xt == self.data_tokens - 1


def shift_last(by: float) -> Callable[..., Tensor]:
    """Add to the entry of the last data token."""

    def change(self: Any, found: Tensor, *arguments: Any) -> Tensor:
        out = found.clone()
        out[..., self.data_tokens - 1] += by
        return out

    return change


def without_last(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    return torch.where(found == self.data_tokens - 1, 0, found)


def other_noise(by: float, where: Callable[..., Tensor | bool] = lambda *_: True) -> Callable[..., tuple[Any, ...]]:
    """Draw at another noise level."""
    return lambda self, x0, sigma: (x0, torch.where(torch.as_tensor(where(self, x0, sigma)), by * sigma, sigma))


def five_percent(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    """Of the prior, 5 % are token 0: every twentieth position."""
    out = found.clone()
    out[:, ::20] = 0
    return out


def first_of_row(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    return found[:, :1].expand_as(found).contiguous()


def first_row(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    return found[:1].expand_as(found).contiguous()


def together(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """A row is masked as a whole or not at all."""
    hit = random.rand(len(x0), 1) < -torch.expm1(-sigma)[:, None]
    return torch.where(hit & corrupt, self.mask, x0)


def in_pairs(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """Positions are masked in pairs."""
    u = random.rand(len(x0), (x0.shape[1] + 1) // 2).repeat_interleave(2, 1)[:, : x0.shape[1]]
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def rows_in_pairs(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """Two rows share their uniform numbers."""
    u = random.rand(*x0.shape)
    u = u[: (len(u) + 1) // 2].repeat_interleave(2, 0)[: len(x0)]
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def stratified(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """The number of masks of a row is not random."""
    length = x0.shape[1]
    order = random.rand(*x0.shape).argsort(-1).argsort(-1)
    u = (order + random.rand(len(x0), 1)) / length
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def antithetic(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """The second half of a row has the opposite uniform numbers."""
    half = (x0.shape[1] + 1) // 2
    u = random.rand(len(x0), half)
    u = torch.cat([u, 1 - u], dim=1)[:, : x0.shape[1]]
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def one_replacement(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """All replaced tokens of a row become one token."""
    hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
    token = (random.rand(len(x0), 1) * self.states).long().clamp(max=self.states - 1)
    return torch.where(hit & corrupt, token, x0)


def ignoring_start(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """Every rank draws the first rows of the batch."""
    u = torch.rand(x0.shape, generator=random.generator)
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def own_generator(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """Draws come from a generator with a fixed seed."""
    u = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0))
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def from_global(source: str) -> Callable[..., Tensor]:
    """Every draw is shifted by one number from a global generator."""
    draw = globally_seeded(source)

    def sample(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
        u = (random.rand(*x0.shape) + draw()) % 1
        return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)

    return sample


def with_state(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
    """Each call shifts the draws of the next."""
    self.calls = getattr(self, "calls", 0) + 1
    u = (random.rand(*x0.shape) + 0.37 * self.calls) % 1
    return torch.where((u < -torch.expm1(-sigma)[:, None]) & corrupt, self.mask, x0)


def mean_noise(self: Any, x0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Every row is noised at the mean level of the batch."""
    return x0, sigma.mean().expand_as(sigma)


def all_corrupt(cls: Any) -> dict[str, Any]:
    def sample(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
        found: Tensor = cls.sample(self, x0, sigma, random=random, corrupt=torch.ones_like(corrupt))
        return found

    return {"sample": sample}


def first_fixed(cls: Any) -> dict[str, Any]:
    """Only the first fixed position of a row is kept."""

    def sample(self: Any, x0: Tensor, sigma: Tensor, *, random: Any, corrupt: Tensor) -> Tensor:
        more = corrupt | ((~corrupt).cumsum(-1) > 1)
        found: Tensor = cls.sample(self, x0, sigma, random=random, corrupt=more)
        return found

    return {"sample": sample}


def all_allowed(cls: Any) -> dict[str, Any]:
    def prior(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        found: Tensor = cls.prior(self, rows, length, generator=generator, allowed=None)
        return found

    return {"prior": prior}


def allowed_in_place(cls: Any) -> dict[str, Any]:
    def prior(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        found: Tensor = cls.prior(self, rows, length, generator=generator, allowed=allowed)
        if allowed is not None:
            allowed[:] = True
        return found

    return {"prior": prior}


def prior_of_seed(cls: Any) -> dict[str, Any]:
    def prior(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        own = torch.Generator().manual_seed(5)
        found: Tensor = cls.prior(self, rows, length, generator=own, allowed=allowed)
        return found

    return {"prior": prior}


def in_place(cls: Any, name: str) -> dict[str, Any]:
    """The input is changed in place."""

    def change(self: Any, found: Tensor, head: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            if not head.requires_grad:
                head.mul_(1.5)
        return found

    return after(cls, name, change)


def clamped_scores(limit: float) -> Callable[..., tuple[Any, ...]]:
    return lambda self, head, *rest: (head.clamp(-limit, limit), *rest)


def floored(limit: float) -> Callable[..., tuple[Any, ...]]:
    return lambda self, log_x0, *rest: (torch.where(log_x0 > -1e5, log_x0.clamp(min=limit), log_x0), *rest)


def half_detached(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    """The value is right, and the gradient half."""
    return (found + found.detach()) / 2


def rounded(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    """In float32 the loss is rounded to bfloat16."""
    return found.bfloat16().float() if found.dtype == torch.float32 else found


def batch_mean(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    """A thousandth of the loss of a position comes from the others of the batch."""
    return found + 1e-3 * (found.mean() - found)


def bound(by: float) -> dict[str, Any]:
    def rate_bound(self: Any) -> float:
        known: float = super(type(self), self).rate_bound
        return by * known

    return {"rate_bound": property(rate_bound)}


def rates_at(cls: Any, by: float, where: Callable[[float], bool]) -> dict[str, Any]:
    def rate_matrix(self: Any, sigma: float) -> Tensor:
        found: Tensor = cls.rate_matrix(self, sigma)
        return by * found if where(sigma) else found

    return {"rate_matrix": rate_matrix}


def swap_last(self: Any, found: Tensor, *arguments: Any) -> Tensor:
    """The last two data tokens are exchanged."""
    out, m = found.clone(), self.data_tokens
    out[..., m - 2], out[..., m - 1] = found[..., m - 1], found[..., m - 2]
    return out


def last_not_noised(self: Any, found: Tensor, x0: Tensor, *rest: Any) -> Tensor:
    return torch.where(x0 == self.data_tokens - 1, x0, found)


def clean_below(limit: float) -> Callable[..., Tensor]:
    return lambda self, found, x0, sigma, *rest: at(sigma < limit, x0, found)


def later_parameters(cls: Any) -> dict[str, Any]:
    """Right with the first values of the parameters alone."""

    def nelbo(self: Any, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = float(self.raw.detach().double().sum())
        drift = float(self.raw.detach().double().sum()) - self.first
        found: Tensor = cls.nelbo(self, log_x0, xt, x0, sigma)
        return found * (1 + 0.1 * drift)

    return {"nelbo": nelbo}


def unnamed_parameter(cls: Any) -> dict[str, Any]:
    def init(self: Any, config: Any, context: Any) -> None:
        cls.__init__(self, config, context)
        self.extra = torch.nn.Parameter(torch.zeros(1))

    return {"__init__": init}


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
    assert found.name == "kernel.raises"
    assert "KeyError: 'weights'" in found.value


@pytest.mark.slow
@pytest.mark.parametrize("fault", MANY, ids=lambda f: f.name)
def test_a_fault_of_many_states_or_a_narrow_stretch_is_caught_by_name(fault: Fault) -> None:
    found = failing(prove(fault))
    assert found & set(fault.caught), found
