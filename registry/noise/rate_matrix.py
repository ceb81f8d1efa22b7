"""Kernels given by their rates, P = exp(sigma Q): what all have in common, and those of small vocabularies.

The clock is set so that the slowest mode dies as exp(-sigma), as with uniform, whatever units the rates were given in: any
schedule then ends in noise. A rate table takes n x n numbers for each row; neighbours (their own module) take none. Axes: b
batch, l length, n states.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.tokens.process import Kernel
from sedd_graph.errors import UserError

from ._frequencies import numbers_in

__all__ = ["FixedRates", "Ordinal", "RateTable", "Rates"]

MAX_STATES = 512


def _columns(table: Tensor, index: Tensor) -> Tensor:
    """``table`` [b, n, n] at columns ``index`` [b, l]: [b, l, n]."""
    return table.transpose(1, 2).gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


class FixedRates(Kernel):
    """One rate matrix at all noise: every formula from four products with P = exp(sigma Q) and Q."""

    abstract: ClassVar[bool] = True

    @property
    def mask(self) -> None:
        return None

    @abstractmethod
    def _seen(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """The law of what ``x0`` [b, l] is seen as: columns of P, [b, l, n], never below 0."""

    @abstractmethod
    def _reach(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The chance to have come to ``x`` [b, l] from each state: rows of P, [b, l, n], never below 0."""

    @abstractmethod
    def _carry(self, weights: Tensor, sigma: Tensor) -> Tensor:
        """P times ``weights`` [b, l, n]; ``sigma`` [b] may be negative."""

    @abstractmethod
    def _into(self, x: Tensor, like: Tensor) -> Tensor:
        """Rates Q[x, y] from each state into ``x`` [b, l], of the type of ``like``, [b, l, n]; what stands at x does not count."""

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return self._entropy(log_score, xt, x0, sigma).to(log_score.dtype)

    def _entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        seen = self._seen(x0, sigma)
        ratio = seen / seen.gather(-1, xt[..., None]).clamp(min=torch.finfo(seen.dtype).tiny)
        into = self._into(xt, seen).scatter(-1, xt[..., None], 0.0)
        log_score = log_score.to(seen.dtype).scatter(-1, xt[..., None], 0.0)
        # s - r log s + r log r - r = r (exp(d) - 1 - d) with d = log s - log r: near the truth its terms would all but cancel
        apart = log_score - torch.log(ratio.clamp(min=torch.finfo(seen.dtype).tiny))
        near = apart.abs() < 1
        close = ratio * (torch.expm1(torch.where(near, apart, 0.0)) - torch.where(near, apart, 0.0))
        far = log_score.exp() - ratio * (apart + 1)
        return (into * torch.where(near, close, far)).sum(-1)

    def _mixed(self, x0_probs: Tensor, sigma: Tensor) -> Tensor:
        """The law of the next observation under a prediction of the clean token, [b, l, n], never quite 0."""
        mixed = self._carry(x0_probs, sigma)
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        return self._told(log_x0, xt, sigma).to(log_x0.dtype)

    def _told(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        mixed = self._mixed(log_x0.exp(), sigma).log()
        return mixed - mixed.gather(-1, xt[..., None])

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return self._entropy(self._told(log_x0, xt, sigma), xt, x0, sigma).to(log_x0.dtype)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return (self._into(x, score) * score).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = sigma - sigma_next
        return (self._carry(score, -step) * self._reach(x, step)).to(score.dtype)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        weights = self._reach(x, sigma - sigma_next) * self._mixed(x0_probs, sigma_next)
        return (weights / weights.sum(-1, keepdim=True)).to(x0_probs.dtype)


class RateTable(FixedRates):
    """Any irreducible rate matrix. All that depends on it is made once, in float64."""

    abstract: ClassVar[bool] = True
    table: Tensor
    law: Tensor
    modes: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.states > MAX_STATES:
            raise UserError(
                f"{type(self).__name__.lower()} holds tables of states x states for each row: {self.states:,} states are more "
                f"than the {MAX_STATES} it takes; use uniform, unigram or mixture"
            )
        rates = self.rates()
        rates = rates - torch.diag(rates.diagonal())
        rates = rates - torch.diag(rates.sum(0))
        values, vectors = torch.linalg.eig(rates)
        order = values.real.argsort(descending=True)
        gap, scale = -float(values.real[order[1]]), float(rates.abs().max())
        if gap < 1e-9 * max(scale, 1e-300):
            raise UserError(
                "the rates do not lead from every state to one law: some states are never reached from others, so there is no "
                "one prior; connect them"
            )
        rates = rates / gap
        law = vectors[:, order[0]].real
        law = (law / law.sum()).clamp(min=0)
        self.register_buffer("table", rates, persistent=False)
        self.register_buffer("law", law, persistent=False)
        # detailed balance: similar to a symmetric matrix, whose eigenvectors are sound
        flow = rates * law
        self.reversible = bool(law.min() > 1e-12) and bool((flow - flow.T).abs().max() < 1e-9 * flow.abs().max())
        if self.reversible:
            root = law.sqrt()
            symmetric = rates * root / root[:, None]
            modes, basis = torch.linalg.eigh((symmetric + symmetric.T) / 2)
            self.register_buffer("modes", modes, persistent=False)
            self.register_buffer("left", basis * root[:, None], persistent=False)
            self.register_buffer("right", (basis / root[:, None]).T.contiguous(), persistent=False)

    @abstractmethod
    def rates(self) -> Tensor:
        """Rates off the diagonal, float64 [n, n], ``[z, y]`` from y to z, in any unit of time. Raises :class:`UserError`."""

    def _power(self, sigma: Tensor) -> Tensor:
        """exp(sigma Q), float64 [b, n, n]; of negative sigma, too."""
        if not torch.compiler.is_compiling():
            # rows that are sampled together share their level: one table for all of them
            levels, at = sigma.double().unique(return_inverse=True)
            return self._powers(levels)[at]
        return self._powers(sigma.double())

    def _powers(self, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None]
        if self.reversible:
            return (self.left * torch.exp(sigma * self.modes)) @ self.right
        return torch.linalg.matrix_exp(sigma * self.table)

    def _chances(self, sigma: Tensor) -> Tensor:
        return self._power(sigma).clamp(min=0)

    def _seen(self, x0: Tensor, sigma: Tensor) -> Tensor:
        return _columns(self._chances(sigma), x0)

    def _reach(self, x: Tensor, sigma: Tensor) -> Tensor:
        return _columns(self._chances(sigma).transpose(1, 2), x)

    def _carry(self, weights: Tensor, sigma: Tensor) -> Tensor:
        return weights.double() @ self._power(sigma).transpose(1, 2)

    def _into(self, x: Tensor, like: Tensor) -> Tensor:
        return self.table[x].to(like.dtype)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        cdf = _columns(self._chances(sigma), x0).cumsum(-1)
        u = (random.rand(*x0.shape).double() + random.rand(*x0.shape).double() * 2**-24)[..., None]
        moved = torch.searchsorted(cdf, u * cdf[..., -1:] * (1 - 2**-53), right=True)[..., 0]
        return torch.where(corrupt, moved, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        weights = self.law if allowed is None or not bool((self.law * allowed).sum() > 0) else self.law * allowed
        return categorical(weights.expand(rows, length, -1), generator=generator)

    def rate_matrix(self, sigma: float) -> Tensor:
        return self.table

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        return self._chances(level.reshape(-1) - start).reshape(*level.shape, self.states, self.states)


class Rates(RateTable, kind="kernel"):
    """Any rate matrix over up to 512 states, written out or from a file (SEDD's general Q, arXiv 2310.16834, section 3.3)."""

    example: ClassVar[Mapping[str, Any]] = {"table": [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [3, 0, 0.1, 0]]}

    class Config(ComponentConfig):
        table: (
            Annotated[
                tuple[
                    Annotated[
                        tuple[Annotated[float, pydantic.Field(ge=0, lt=1e12)], ...], pydantic.Field(max_length=128)
                    ],
                    ...,
                ],
                pydantic.Field(min_length=2, max_length=128),
            ]
            | None
        ) = None
        """Row z, column y: the rate from y to z, in any unit; what stands on the diagonal does not count."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A ``.npy`` file of it instead, below the working directory."""

        @pydantic.model_validator(mode="after")
        def _one_source(self) -> "Rates.Config":
            if (self.table is None) == (self.file is None):
                raise ValueError("give exactly one of 'table' and 'file'")
            if self.table is not None and any(len(row) != len(self.table) for row in self.table):
                raise ValueError("table: every row must have as many entries as there are rows")
            return self

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        assert isinstance(config, Rates.Config)
        found = _square(config)
        if len(found) == states:
            return config
        if len(found) < states:
            found = torch.nn.functional.pad(found, (0, states - len(found), 0, states - len(found)))
        # the states that exchange most, and a little from each to each, so that what is left still hangs together
        between = found + found.T
        chosen = [int(between.sum(0).argmax())]
        while len(chosen) < states:
            pull = between[chosen].sum(0)
            pull[chosen] = -1.0
            chosen.append(int(pull.argmax()))
        cut = found[chosen][:, chosen]
        cut = cut + 0.05 * float(cut.max()) * (1 - torch.eye(states, dtype=torch.float64))
        return config.model_copy(update={"file": None, "table": tuple(tuple(row) for row in cut.tolist())})

    def rates(self) -> Tensor:
        found = _square(self.config)
        if len(found) != self.states:
            raise UserError(f"the rates are those of {len(found)} states, but the model has {self.states}")
        return found


def _square(config: "Rates.Config") -> Tensor:
    """The rates as float64 [n, n], 0 on the diagonal. Raises :class:`UserError`."""
    if config.table is not None:
        found = torch.tensor(config.table, dtype=torch.float64)
    else:
        assert config.file is not None
        found = torch.from_numpy(numbers_in(config.file, 2))
    if found.shape[0] != found.shape[1]:
        raise UserError(f"{config.file} must hold a square array, not {list(found.shape)}")
    found = found - torch.diag(found.diagonal())
    if bool((found < 0).any()):
        raise UserError(f"{config.file} has negative rates off the diagonal")
    return found


class Ordinal(RateTable, kind="kernel"):
    """Tokens that are numbers move to near ones more often: rates exp(-4 (i - j)^2 / ((n - 1)^2 beta)) (D3PM's discretised Gaussian).

    In continuous time, arXiv 2107.03006, appendix A.2.3. Doubly stochastic, so that noise ends up even. The published
    matrices widen with time and have no closed product; here the width is fixed and the clock runs.
    """

    class Config(ComponentConfig):
        beta: Annotated[float, pydantic.Field(ge=1e-4, le=100)] = 0.02

    def rates(self) -> Tensor:
        place = torch.arange(self.states, dtype=torch.float64)
        apart = (place[:, None] - place).square() * 4 / ((self.states - 1) ** 2 * self.config.beta)
        # relative to the nearest neighbour's, which would underflow where few tokens are far apart
        return torch.exp(apart[0, 1] - apart)
