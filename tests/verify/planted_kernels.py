"""Changes of methods of token kernels, each a fault: the library of ``test_planted_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.verify.planted import after, at, globally_seeded

__all__ = [
    "above",
    "all_allowed",
    "all_corrupt",
    "allowed_in_place",
    "antithetic",
    "batch_mean",
    "below",
    "bound",
    "clamped_scores",
    "clean_below",
    "first_fixed",
    "first_of_row",
    "first_row",
    "five_percent",
    "floored",
    "from_global",
    "half_detached",
    "ignoring_start",
    "in_pairs",
    "in_place",
    "last_not_noised",
    "last_x0",
    "last_xt",
    "later_parameters",
    "mean_noise",
    "more_states_than",
    "one_replacement",
    "other_noise",
    "own_generator",
    "prior_of_seed",
    "rates_at",
    "rounded",
    "rows_in_pairs",
    "scaled",
    "shift_last",
    "stratified",
    "swap_last",
    "together",
    "unnamed_parameter",
    "with_state",
    "within",
    "without_last",
]


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
