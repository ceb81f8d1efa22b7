"""Kernels with a dense rate matrix, for small vocabularies: ``rates`` (any matrix) and ``ordinal`` (ordered tokens).

They compute an n x n transition matrix for each row of a batch. The kernel ``neighbours`` uses a sparse graph instead,
for large vocabularies. Axes: b batch, l length, n states.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, inverse_cdf
from sedd_graph.errors import UserError

from ._fixed_rates import FixedRates
from ._frequencies import load_numbers

__all__ = ["Ordinal", "RateTable", "Rates"]

MAX_STATES = 512

TableRow = Annotated[tuple[Annotated[float, pydantic.Field(ge=0, lt=1e12)], ...], pydantic.Field(max_length=128)]


def _columns_of(table: Tensor, index: Tensor) -> Tensor:
    """Return the columns of ``table`` [b, n, n] at ``index`` [b, l], [b, l, n]."""
    return table.transpose(1, 2).gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


class RateTable(FixedRates):
    """Base class of kernels with an irreducible rate matrix Q, which subclasses define by :meth:`rates`.

    Q is scaled so that its slowest mode decays as exp(-sigma). If Q satisfies detailed balance, exp(sigma Q) is
    computed from an eigendecomposition that is made once, otherwise by ``torch.linalg.matrix_exp``; both in float64.

    Raises:
        UserError: There are more than ``MAX_STATES`` states, or the rates have no unique stationary distribution.
    """

    abstract: ClassVar[bool] = True
    tabular = True
    table: Tensor
    stationary: Tensor
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
        if not bool(rates.isfinite().all()):
            raise UserError("the rates between two states are not finite numbers; give rates of a common scale")
        values, vectors = torch.linalg.eig(rates)
        order = values.real.argsort(descending=True)
        gap, scale = -float(values.real[order[1]]), float(rates.abs().max())
        if gap < 1e-9 * max(scale, 1e-300):
            raise UserError(
                "the rates have no unique stationary distribution: some states are never reached from others; add rates "
                "between them"
            )
        rates = rates / gap
        stationary = vectors[:, order[0]].real
        stationary = (stationary / stationary.sum()).clamp(min=0)
        self.register_buffer("table", rates, persistent=False)
        self.register_buffer("stationary", stationary, persistent=False)
        # under detailed balance Q is similar to a symmetric matrix, whose eigendecomposition is well conditioned
        flow = rates * stationary
        self.reversible = bool(stationary.min() > 1e-12) and bool((flow - flow.T).abs().max() < 1e-9 * flow.abs().max())
        if self.reversible:
            root = stationary.sqrt()
            symmetric = rates * root / root[:, None]
            modes, basis = torch.linalg.eigh((symmetric + symmetric.T) / 2)
            self.register_buffer("modes", modes, persistent=False)
            self.register_buffer("left", basis * root[:, None], persistent=False)
            self.register_buffer("right", (basis / root[:, None]).T.contiguous(), persistent=False)

    @abstractmethod
    def rates(self) -> Tensor:
        """Return the off-diagonal transition rates, in any unit of time.

        Returns:
            Rates, float64 [n, n]; entry ``[z, y]`` is the rate from state y to state z. The diagonal is ignored.

        Raises:
            UserError: The rates cannot be read, or their number of states is not the model's.
        """

    def _power(self, sigma: Tensor) -> Tensor:
        """Return exp(sigma Q), float64 [b, n, n], for ``sigma`` [b] of either sign."""
        if torch.compiler.is_compiling() or sigma.device.type != "cpu":  # a GPU would be waited for
            return self._powers(sigma.double())
        # rows that are sampled together have one noise level: compute its table once
        levels, at = sigma.double().unique(return_inverse=True)
        return self._powers(levels)[at]

    def _powers(self, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None]
        if self.reversible:
            return (self.left * torch.exp(sigma * self.modes)) @ self.right
        # a single matrix takes another path in torch, which is off by up to 1e-11 where sigma is small; two do not
        return torch.linalg.matrix_exp(sigma.expand(max(2, len(sigma)), -1, -1) * self.table)[: len(sigma)]

    def _probabilities(self, sigma: Tensor) -> Tensor:
        return self._power(sigma).clamp(min=0)

    def _columns(self, x0: Tensor, sigma: Tensor) -> Tensor:
        return _columns_of(self._probabilities(sigma), x0)

    def _rows(self, x: Tensor, sigma: Tensor) -> Tensor:
        return _columns_of(self._probabilities(sigma).transpose(1, 2), x)

    def _product(self, weights: Tensor, sigma: Tensor) -> Tensor:
        return weights.double() @ self._power(sigma).transpose(1, 2)

    def _prior_law(self) -> Tensor:
        return self.stationary

    def _rates_into(self, x: Tensor, like: Tensor) -> Tensor:
        return self.table[x].to(like.dtype)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        moved = inverse_cdf(self._columns(x0, sigma).cumsum(-1), random.rand48(*x0.shape)[..., None])[..., 0]
        return torch.where(corrupt, moved, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        kept = self.stationary if allowed is None else self.stationary * allowed
        weights = kept if bool(kept.sum() > 0) else self.stationary
        return categorical(weights.expand(rows, length, -1), generator=generator)

    def rate_matrix(self, sigma: float) -> Tensor:
        return self.table

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        return self._probabilities(level.reshape(-1) - start).reshape(*level.shape, self.states, self.states)


class Rates(RateTable, kind="kernel"):
    """Kernel with any given rate matrix, from the blueprint (up to 128 states) or from a file (up to 512 states).

    It is SEDD's general rate matrix Q (arXiv 2310.16834, section 3.3).
    """

    example: ClassVar[Mapping[str, Any]] = {"table": [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [3, 0, 0.1, 0]]}

    class Config(ComponentConfig):
        table: Annotated[tuple[TableRow, ...], pydantic.Field(min_length=2, max_length=128)] | None = None
        """Rate matrix of 2 to 128 rows: row z, column y is the rate from state y to state z, at least 0, in any unit of
        time. The diagonal is ignored."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A ``.npy`` file of the rate matrix, below the working directory; up to 512 states."""

        @pydantic.model_validator(mode="after")
        def _one_source(self) -> "Rates.Config":
            if (self.table is None) == (self.file is None):
                raise ValueError("give exactly one of 'table' and 'file'")
            if self.table is not None and any(len(row) != len(self.table) for row in self.table):
                raise ValueError("table: every row must have as many entries as there are rows")
            return self

    config: Config

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        found = _square(Rates.Config.model_validate(config))
        if len(found) == states:
            return config
        if len(found) < states:
            found = torch.nn.functional.pad(found, (0, states - len(found), 0, states - len(found)))
        # the states with the largest rates between them, and a small rate between any two, which keeps the table irreducible
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


def _square(config: Rates.Config) -> Tensor:
    """Return the rates of ``config``, float64 [n, n], 0 on the diagonal; raises :class:`UserError` for a file without them."""
    if config.file is not None:
        found = torch.from_numpy(load_numbers(config.file, 2))
    else:
        found = torch.tensor(config.table, dtype=torch.float64)
    if found.shape[0] != found.shape[1]:
        raise UserError(f"{config.file} must hold a square array, not {list(found.shape)}")
    found = found - torch.diag(found.diagonal())
    if bool((found < 0).any()):
        raise UserError(f"{config.file} has negative rates off the diagonal")
    return found


class Ordinal(RateTable, kind="kernel"):
    """Kernel for ordered tokens, with rates proportional to exp(-4 (i - j)^2 / ((n - 1)^2 beta)) between ids i and j.

    Its rates are those of D3PM's discretised Gaussian (arXiv 2107.03006, appendix A.2.3) at one width beta; only total
    noise follows the schedule. In D3PM beta, the width, grows over the steps, so that the step matrices do not commute:
    no schedule makes this kernel D3PM's, which is the kernel ``steps``. The rates are symmetric, so the prior is uniform. The number of states n is at most 512.
    """

    class Config(ComponentConfig):
        beta: Annotated[float, pydantic.Field(ge=1e-4, le=100)] = 0.02
        """Squared width of the Gaussian: with n states, the rate between ids i and j is proportional to exp(-4 (i -
        j)^2 / ((n - 1)^2 beta)). From 1e-4 (mostly adjacent tokens) to 100 (almost uniform)."""

    config: Config

    def rates(self) -> Tensor:
        place = torch.arange(self.states, dtype=torch.float64)
        apart = (place[:, None] - place).square() * 4 / ((self.states - 1) ** 2 * self.config.beta)
        # relative to the rate between neighbouring numbers, which would underflow where there are few
        return torch.exp((apart[0, 1] - apart).clamp(max=0))
