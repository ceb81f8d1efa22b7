"""Kernel under which tokens move to their nearest neighbours in embedding space, for any vocabulary size.

It is the nearest-neighbour transition of D3PM (arXiv 2107.03006, appendix A.2.4) in continuous time. The rates are
those of a sparse graph (:mod:`._neighbour_graph`). Noisy tokens are drawn by exact random walks on the graph;
transition probabilities come from uniformization (:mod:`._uniformization`), a sequence of sparse products with a matrix
[b l, n]. Only ``rate_matrix`` and ``transition_matrix``, which serve numerical verification, allocate n x n tables.
Axes: b batch, l length, n states, e edges, r rows.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Protocol

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.component.counter_rng import hashed, murmur
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

from ._fixed_rates import FixedRates
from ._frequencies import load_numbers, local_file
from ._neighbour_graph import Exchange, exchange
from ._uniformization import expm, rows_of

__all__ = ["EmbeddingSource", "Neighbours", "embeddings"]

SETTLED = 40.0
"""Total noise above which the transition matrix is treated as constant: all modes that decay are below exp(-40)."""
_MAX_BYTES = 2**30


class EmbeddingSource(Protocol):
    """Config keys that say where embeddings come from, as those of :class:`Neighbours`."""

    @property
    def file(self) -> str | None: ...

    @property
    def tensor(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def width(self) -> int: ...


class Neighbours(FixedRates, kind="kernel"):
    """Nearest-neighbour kernel: replaces a token by a token close to it in embedding space; the prior is uniform.

    Two tokens are connected if one is among the nearest neighbours of the other. The rates are symmetric and are
    balanced by Sinkhorn iteration, so that every token has about the same total rate of leaving. Sigma is scaled so
    that the slowest mode of the process decays as exp(-sigma).
    """

    class Config(ComponentConfig):
        neighbours: Annotated[int, pydantic.Field(ge=1, le=256)] = 10
        """Number of nearest neighbours of each token, from 1 to 256."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """Embeddings, one row per token: a ``.npy`` or ``.safetensors`` file below the working directory, up to 1 GiB.
        null: normal draws with ``seed``, as in an untrained model; neighbours are then arbitrary."""
        tensor: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """Name of the embedding tensor in a ``.safetensors`` file."""
        seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0
        """Seed of the random embeddings that are used without a file."""
        width: Annotated[int, pydantic.Field(ge=1, le=8192)] = 64
        """Dimension of the random embeddings that are used without a file, from 1 to 8,192."""
        even: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
        """Share of transitions that go to a uniformly drawn token, in [0, 1]. Above 0, a disconnected graph is accepted
        too."""

        @pydantic.model_validator(mode="after")
        def _named(self) -> Neighbours.Config:
            if (self.tensor is not None) != (self.file is not None and self.file.endswith(".safetensors")):
                raise ValueError("'tensor' names the embeddings in a .safetensors file: give both or neither")
            return self

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        # half of the other states: any two sets of neighbours then overlap
        few = min(Neighbours.Config.model_validate(config).neighbours, max(1, states // 2))
        return config.model_copy(update={"file": None, "tensor": None, "width": 2, "neighbours": few})

    # the graph is built on first use: checking a blueprint does not need it

    @property
    def graph(self) -> Exchange:
        """Sparse graph of nearest neighbours and its transition rates, built at the first use and cached.

        Raises:
            UserError: The embeddings cannot be read, or the process on the graph has no unique stationary distribution
                or approaches it too slowly.
        """
        stamp = None
        if self.config.file is not None:
            found = local_file(self.config.file, _MAX_BYTES).stat()
            stamp = found.st_mtime_ns, found.st_size
        return _graph_of(self.config, self.states, stamp)

    @property
    def gap(self) -> float:
        """Spectral gap of the rates before sigma is scaled: the decay rate of the slowest mode of the process.

        It includes the uniform transitions of Config ``even``. The unit of time is that of the unscaled rates, under
        which a token changes at most once per unit of time on average.
        """
        return (1 - self.config.even) * self.graph.gap + self.config.even

    def _parts(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return start, to, rate and leave of the graph and the cumulative rate before each edge, on the device of ``like``."""
        if like.device not in self._placed:
            graph = self.graph
            before = torch.nn.functional.pad(graph.rate.cumsum(0), (1, 0))
            parts = (graph.start, graph.to, graph.rate, graph.leave, before)
            self._placed[like.device] = tuple(part.to(like.device) for part in parts)
        return self._placed[like.device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    def _product(self, weights: Tensor, sigma: Tensor) -> Tensor:
        start, to, rate, leave, _ = self._parts(weights)
        even = self.config.even
        if bool((sigma < 0).any()):
            weights = weights.double()  # the sum alternates in sign
        sigma = sigma.double().clamp(max=SETTLED)
        level = sigma * (1 - even) / self.gap
        flat = weights.reshape(-1, self.states)
        rows = level[:, None].expand(weights.shape[:-1]).reshape(-1)
        moved = expm(flat, rows, start, to, rate, leave).reshape(weights.shape)
        if even == 0:
            return moved
        left = (-sigma * even / self.gap)[:, None, None]
        anywhere = -torch.expm1(left).to(moved.dtype) * weights.mean(-1, keepdim=True)
        return torch.exp(left).to(moved.dtype) * moved + anywhere

    def _columns(self, x0: Tensor, sigma: Tensor) -> Tensor:
        one = torch.zeros(*x0.shape, self.states, dtype=sigma.dtype, device=x0.device)
        return self._product(one.scatter_(-1, x0[..., None], 1.0), sigma)

    def _rows(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._columns(x, sigma)  # P is symmetric

    def _rates_into(self, x: Tensor, like: Tensor) -> Tensor:
        start, to, rate, *_ = self._parts(like)
        even = self.config.even
        shape = (x.numel(), self.states)
        rates = rows_of(x.reshape(-1), start, to, rate * ((1 - even) / self.gap), self.states).to(like.dtype)
        return (rates.reshape(shape) + even / self.gap / self.states).reshape(*x.shape, self.states)

    def rate_matrix(self, sigma: float) -> Tensor:
        every = torch.arange(self.states)[None]
        off = self._rates_into(every, torch.zeros((), dtype=torch.float64))[0].fill_diagonal_(0.0)
        return off - torch.diag(off.sum(0))

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        every = torch.arange(self.states).expand(level.numel(), -1)
        return self._columns(every, level.reshape(-1) - start).reshape(*level.shape, self.states, self.states)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        # a random walk of each token for the time sigma: exponential waiting times, and a move after each. Uniform numbers are
        # hashes of one key per row, since how many a row needs depends on its walk
        start, to, _, leave, before = self._parts(x0)
        even, keys = self.config.even, random.keys(x0.shape[0]).to(x0.device)
        places = torch.arange(x0.shape[1], device=x0.device)
        key = hashed((hashed(keys)[:, None] + places * murmur(1)).int()).expand_as(x0)[corrupt]
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
        # the tokens that are left least often are the last to mix
        worst = self.graph.leave.topk(min(16, self.states), largest=False).indices[None]
        seen = self._columns(worst, torch.tensor([sigma], dtype=torch.float64))
        return float((seen - 1 / self.states).abs().sum(-1).max() / 2)


@functools.lru_cache(maxsize=4)
def _graph_of(config: Neighbours.Config, states: int, stamp: tuple[int, int] | None) -> Exchange:
    """Return the graph of ``config``; ``stamp``, the file's time and size, invalidates the cache when the file changes."""
    points = embeddings(config, states)
    if len(points) != states:
        raise UserError(f"{config.file} has {len(points):,} embeddings, but the model has {states:,} states")
    return exchange(points, config.neighbours, even=config.even)


def embeddings(config: EmbeddingSource, states: int) -> Tensor:
    """Return the embeddings, float32 [n, d]; raises :class:`UserError` where they cannot be read."""
    if config.file is None:
        return torch.randn(states, config.width, generator=torch.Generator().manual_seed(config.seed))
    if config.tensor is None:
        return torch.from_numpy(load_numbers(config.file, 2, limit=_MAX_BYTES)).float()
    path = local_file(config.file, _MAX_BYTES)
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
    """Return the ``number``-th uniform number of each int32 ``key``, float64 in [0, 1)."""
    high = hashed((key.long() + murmur(2 * number + 1)).int()).double() + 2**31
    low = hashed(key ^ murmur(2 * number + 2)).double() + 2**31
    return ((high + low * 2**-32) * 2**-32).clamp(max=1 - 2**-53)
