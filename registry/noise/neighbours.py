"""Tokens that move to tokens near them among some embeddings (D3PM, arXiv 2107.03006, appendix A.2.4), at any vocabulary.

The rates are those of a sparse graph. Draws are walks on it, exact; chances are sums over numbers of moves (uniformization),
each a sparse product, of positive terms, so that the smallest chances are as precise as the greatest. What it costs is a
number of sparse products of [b l, n], and nothing of n x n is held but by the two methods for proofs, and where states are so
few that the sums of whole tables cost less. Axes: b batch, l length, n states, e edges, r rows.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Annotated, Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.component.counter_rng import hashed, murmur
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

from ._frequencies import numbers_in, own_file
from ._neighbour_graph import Exchange, exchange
from .rate_matrix import FixedRates

__all__ = ["Neighbours"]

LEAST = 1e-20
"""The chance of more moves than are summed up."""
SETTLED = 40.0
"""From this total noise on all is even: what is left of any mode is exp(-40)."""
_CHUNK = 2**24
_MAX_BYTES = 2**30
_FEW = 64
"""Up to so many states tables are summed, not products."""
_TABLES = 2**21
"""About how many numbers the powers of a table may be."""
_PIECE = 2**20


class Neighbours(FixedRates, kind="kernel"):
    """A token moves to its nearest neighbours, or those it is nearest to, among embeddings; noise ends up even.

    Rates are symmetric and balanced (Sinkhorn), so that each token is left about as often; the clock is set so that the
    slowest mode dies as exp(-sigma). A share ``even`` of moves may go anywhere, which joins a graph that falls apart.
    """

    class Config(ComponentConfig):
        neighbours: Annotated[int, pydantic.Field(ge=1, le=256)] = 10
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """Embeddings, one row for each token: a ``.npy`` or ``.safetensors`` file below the working directory."""
        tensor: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """Its name in a ``.safetensors`` file."""
        seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0
        """Without a file, embeddings are normal draws, as a model's first are: neighbours mean nothing, but all else holds."""
        width: Annotated[int, pydantic.Field(ge=1, le=8192)] = 64
        even: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0

        @pydantic.model_validator(mode="after")
        def _named(self) -> Neighbours.Config:
            if (self.tensor is not None) != (self.file is not None and self.file.endswith(".safetensors")):
                raise ValueError("'tensor' names the embeddings in a .safetensors file: give both or neither")
            return self

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        assert isinstance(config, Neighbours.Config)
        # half of the others: any two groups then have a neighbour in common
        few = min(config.neighbours, max(1, states // 2))
        return config.model_copy(update={"file": None, "tensor": None, "width": 2, "neighbours": few})

    # -- the graph: made when it is first asked for, since checking a blueprint does not need it ------------------------

    @property
    def graph(self) -> Exchange:
        """Raises :class:`UserError` for embeddings that cannot be read, and for a graph that does not mix."""
        stamp = None
        if self.config.file is not None:
            found = own_file(self.config.file, _MAX_BYTES).stat()
            stamp = found.st_mtime_ns, found.st_size
        return _graph_of(self.config, self.states, stamp)

    @property
    def gap(self) -> float:
        """The rate at which the slowest mode dies, when tokens are left at most once per unit of time."""
        return (1 - self.config.even) * self.graph.gap + self.config.even

    def _parts(self, like: Tensor) -> tuple[Tensor, ...]:
        """start, to, rate, leave and the sum of rates before each edge, on the device of ``like``."""
        if like.device not in self._placed:
            graph = self.graph
            parts = (
                graph.start,
                graph.to,
                graph.rate,
                graph.leave,
                torch.nn.functional.pad(graph.rate.cumsum(0), (1, 0)),
            )
            self._placed[like.device] = tuple(part.to(like.device) for part in parts)
        return self._placed[like.device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    # -- P and Q --------------------------------------------------------------------------------------------------------

    def _carry(self, weights: Tensor, sigma: Tensor) -> Tensor:
        start, to, rate, leave, _ = self._parts(weights)
        even = self.config.even
        if bool((sigma < 0).any()):
            weights = weights.double()  # an alternating sum
        sigma = sigma.double().clamp(max=SETTLED)
        level = sigma * (1 - even) / self.gap
        flat = weights.reshape(-1, self.states)
        rows = level[:, None].expand(weights.shape[:-1]).reshape(-1)
        moved = _spread(flat, rows, start, to, rate, leave).reshape(weights.shape)
        if even == 0:
            return moved
        left = (-sigma * even / self.gap)[:, None, None]
        anywhere = -torch.expm1(left).to(moved.dtype) * weights.mean(-1, keepdim=True)
        return torch.exp(left).to(moved.dtype) * moved + anywhere

    def _seen(self, x0: Tensor, sigma: Tensor) -> Tensor:
        one = torch.zeros(*x0.shape, self.states, dtype=sigma.dtype, device=x0.device)
        return self._carry(one.scatter_(-1, x0[..., None], 1.0), sigma)

    def _reach(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._seen(x, sigma)  # P is symmetric

    def _into(self, x: Tensor, like: Tensor) -> Tensor:
        start, to, rate, *_ = self._parts(like)
        even = self.config.even
        shape = (x.numel(), self.states)
        rates = _rows(x.reshape(-1), start, to, rate * ((1 - even) / self.gap), self.states).to(like.dtype)
        return (rates.reshape(shape) + even / self.gap / self.states).reshape(*x.shape, self.states)

    def rate_matrix(self, sigma: float) -> Tensor:
        every = torch.arange(self.states)[None]
        off = self._into(every, torch.zeros((), dtype=torch.float64))[0].fill_diagonal_(0.0)
        return off - torch.diag(off.sum(0))

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        every = torch.arange(self.states).expand(level.numel(), -1)
        return self._seen(every, level.reshape(-1) - start).reshape(*level.shape, self.states, self.states)

    # -- draws ----------------------------------------------------------------------------------------------------------

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        """A walk of each token for the time ``sigma``: it waits for a time of exponential law, then moves.

        Numbers come from one key for each row, since how many are needed differs from row to row.
        """
        start, to, _, leave, before = self._parts(x0)
        even, keys = self.config.even, random.keys(x0.shape[0]).to(x0.device)
        places = torch.arange(x0.shape[1], dtype=torch.int32, device=x0.device)
        key = hashed(hashed(keys)[:, None] + places * murmur(1)).expand_as(x0)[corrupt]
        x = x0[corrupt]
        left = (sigma.double()[:, None].expand_as(x0)[corrupt] / self.gap).clone()
        out, at = x.clone(), torch.arange(len(x), device=x0.device)
        count = 0
        while len(at):
            rates = (1 - even) * leave[x] + even
            left = left + torch.log1p(-_uniform(key, count)) / rates
            going = left > 0
            out[at[~going]] = x[~going]
            at, x, left, key, rates = at[going], x[going], left[going], key[going], rates[going]
            u = _uniform(key, count + 1) * rates
            edge = torch.searchsorted(
                before[1:], before[start[x]] + (u - even).clamp(min=0) / max(1 - even, 1e-9), right=True
            )
            near = to[torch.minimum(torch.maximum(edge, start[x]), start[x + 1] - 1)]
            x = torch.where(u < even, (u / max(even, 1e-9) * self.states).long().clamp(max=self.states - 1), near)
            count += 2
        return x0.masked_scatter(corrupt, out)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        u = torch.randint(2**62, (rows, length), generator=generator, device=generator.device)
        if allowed is None or not bool(allowed.any()):
            return u % self.states
        own = allowed.to(u.device).nonzero()[:, 0]
        return own[u % len(own)]

    def unmixed(self, sigma: float) -> float:
        # those that are left most seldom are the last to mix
        worst = self.graph.leave.topk(min(16, self.states), largest=False).indices[None]
        seen = self._seen(worst, torch.tensor([sigma], dtype=torch.float64))
        return float((seen - 1 / self.states).abs().sum(-1).max() / 2)


@functools.lru_cache(maxsize=4)
def _graph_of(config: Neighbours.Config, states: int, stamp: tuple[int, int] | None) -> Exchange:
    """The graph of one Config; ``stamp`` tells one state of its file from another."""
    points = _embeddings(config, states)
    if len(points) != states:
        raise UserError(f"{config.file} has {len(points):,} embeddings, but the model has {states:,} states")
    return exchange(points, config.neighbours, even=config.even)


def _embeddings(config: Neighbours.Config, states: int) -> Tensor:
    """float32 [n, d]. Raises :class:`UserError`."""
    if config.file is None:
        return torch.randn(states, config.width, generator=torch.Generator().manual_seed(config.seed))
    if config.tensor is None:
        return torch.from_numpy(numbers_in(config.file, 2, limit=_MAX_BYTES)).float()
    path = own_file(config.file, _MAX_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            if config.tensor not in file.keys():  # noqa: SIM118 - not a dict
                raise UserError(
                    f"{config.file} has no tensor {config.tensor!r}; it has {', '.join(sorted(file.keys())[:20])}"
                )
            found: Tensor = file.get_tensor(config.tensor)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{config.file} cannot be read as safetensors: {error}") from None
    if found.dim() != 2 or not found.is_floating_point() or not bool(found.isfinite().all()):
        raise UserError(
            f"{config.file}: {config.tensor} must be finite numbers of two axes, not {found.dtype} {list(found.shape)}"
        )
    return found.float()


def _uniform(key: Tensor, number: int) -> Tensor:
    """float64 in [0, 1) for each int32 key, another for each number."""
    high = hashed(key + murmur(2 * number + 1)).double() + 2**31
    low = hashed(key ^ murmur(2 * number + 2)).double() + 2**31
    return ((high + low * 2**-32) * 2**-32).clamp(max=1 - 2**-53)


def _table(start: Tensor, to: Tensor, rate: Tensor) -> Tensor:
    """Compressed rows written out, [n, n]."""
    n = len(start) - 1
    table = rate.new_zeros(n, n)
    table[torch.repeat_interleave(torch.arange(n, device=to.device), start.diff()), to] = rate
    return table


def _spread_few(x: Tensor, mean: Tensor, step: Tensor, most: float) -> Tensor:
    """The same sum, of Poisson(k; ``mean`` [r]) step^k with ``step`` [n, n], made once for each mean, the greatest ``most``."""
    n, device = len(step), step.device
    k = torch.arange(1, 60 + round(8 * most), dtype=torch.float64, device=device)
    tail = LEAST * (math.exp(-2 * most) if bool((mean < 0).any()) else 1)
    terms = 1 + int((torch.special.gammainc(k, torch.full_like(k, most)) > tail).sum())
    powers = torch.eye(n, dtype=step.dtype, device=device)[None]
    while len(powers) < terms:
        powers = torch.cat([powers, powers @ (powers[-1] @ step)])
    powers = powers[:terms].reshape(terms, n * n)
    k = torch.arange(terms, dtype=torch.float64, device=device)
    sign, factorials = 1 - 2 * (k % 2), torch.lgamma(k + 1)
    means, of = torch.unique(mean, return_inverse=True)
    tables = torch.cat(
        [
            (
                torch.exp(torch.xlogy(k, part.abs()[:, None]) - part[:, None] - factorials)
                * torch.where(part[:, None] < 0, sign, 1.0)
                @ powers
            ).to(x.dtype)
            for part in means.split(max(1, _PIECE // terms))
        ]
    ).view(-1, n, n)
    parts = zip(x.split(max(1, _PIECE // n**2)), of.split(max(1, _PIECE // n**2)), strict=True)
    return torch.cat([(row[:, None] @ tables[which])[:, 0] for row, which in parts])


@torch.library.custom_op("sedd_graph::neighbours_rows", mutates_args=())
def _rows(x: Tensor, start: Tensor, to: Tensor, rate: Tensor, states: int) -> Tensor:
    """The rates between ``x`` [r] and each state, [r, n]."""
    if states <= _FEW:
        return _table(start, to, rate)[x]
    count = start[x + 1] - start[x]
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), count)
    edge = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count - start[x])[row]
    out = torch.zeros(len(x), states, dtype=rate.dtype, device=x.device)
    out[row, to[edge]] = rate[edge]
    return out


@_rows.register_fake
def _(x: Tensor, start: Tensor, to: Tensor, rate: Tensor, states: int) -> Tensor:
    return rate.new_empty(len(x), states)


@torch.library.custom_op("sedd_graph::neighbours_spread", mutates_args=())
def _spread(x: Tensor, level: Tensor, start: Tensor, to: Tensor, rate: Tensor, leave: Tensor) -> Tensor:
    """exp(level G) times each row of ``x`` [r, n], G the rates less what leaves; ``level`` float64 [r], of either sign.

    With p the greatest rate of leaving and S = 1 + G / p: the sum over k of Poisson(k; level p) S^k x.
    """
    n, pace = x.shape[1], float(leave.max())
    if n <= _FEW and len(x) and (most := float(level.abs().max()) * pace) * n**2 < _TABLES:
        step = _table(start, to, rate / pace) + torch.diag((1 - leave / pace).clamp(min=0))
        return _spread_few(x, level * pace, step, most)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        table = torch.sparse_csr_tensor(start, to, (rate / pace).to(x.dtype), (n, n), check_invariants=False)
    stay = (1 - leave / pace).clamp(min=0).to(x.dtype)[:, None]
    out = torch.empty_like(x)
    size = max(1, _CHUNK // n)
    order = level.abs().argsort(descending=True)
    for first in range(0, len(x), size):
        rows = order[first : first + size]
        mean = level[rows] * pace
        tail = LEAST * torch.exp(-2 * (-mean).clamp(min=0))
        v = x[rows].T.contiguous()
        total = torch.zeros_like(v)
        k, active = 0, len(rows)
        while True:
            log = torch.xlogy(torch.full_like(mean, k), mean.abs()) - mean - math.lgamma(k + 1)
            weight = (log.exp() * torch.where(mean < 0, (-1.0) ** k, 1.0))[:active].to(x.dtype)
            total[:, :active] += weight * v
            k += 1
            more = torch.special.gammainc(torch.full_like(mean, k), mean.abs()) > tail
            count = int(more.sum())
            if count == 0:
                break
            if count < active:
                v, active = v[:, :count].contiguous(), count
            v = stay * v + table @ v
        out[rows] = total.T
    return out


@_spread.register_fake
def _(x: Tensor, level: Tensor, start: Tensor, to: Tensor, rate: Tensor, leave: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # symmetric: its own transpose
    return _spread(gradient.contiguous(), *ctx.saved_tensors), None, None, None, None, None


_spread.register_autograd(_back, setup_context=_keep)
