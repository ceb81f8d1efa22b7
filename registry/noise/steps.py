"""Kernel in discrete time from a sequence of step matrices: the op ``steps`` (D3PM, arXiv 2107.03006).

Axes: T steps, n states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.tokens.step_kernel import MOST_BYTES, StepKernel, step_tables
from sedd_graph.errors import UserError

from ._betas import MOST_STEPS, StepCount, linear_betas
from ._frequencies import load_numbers, local_file
from ._step_matrices import balanced, check_columns, exchange_rates, gaussian_steps, rate_steps, share_steps
from .neighbours import embeddings

__all__ = ["Steps"]

_EMBEDDINGS = {"neighbours", "file", "tensor", "seed", "width"}
_BETAS = {"beta_first", "beta_last", "end", "betas"}
_READS = {
    "gaussian": _BETAS | {"scale"},
    "nearest": _BETAS | _EMBEDDINGS,
    "nearest_rate": _BETAS | _EMBEDDINGS | {"rounded"},
    "table": {"table", "file", "mask"},
}
"""Config keys that each form reads, beside ``form`` and ``steps``."""
_LARGEST = {"gaussian": 100.0, "nearest": 1.0, "nearest_rate": 1e4}
_MIXED = 2e-3
"""Total variation distance from the prior that the widths of a toy are enlarged to reach."""

Beta = Annotated[float, pydantic.Field(gt=0, le=1e4)]
Entry = Annotated[float, pydantic.Field(ge=0, le=1)]
Row = Annotated[tuple[Entry, ...], pydantic.Field(max_length=64)]
Matrix = Annotated[tuple[Row, ...], pydantic.Field(min_length=2, max_length=64)]


class Steps(StepKernel, kind="kernel"):
    """Kernel in discrete time, given as a sequence of T step matrices, which need not commute (D3PM, arXiv 2107.03006).

    Transition probabilities are products of the matrices, in float64. All T matrices and their cumulative products are
    in memory, T x n x n numbers each, at most 2 GiB together for n states. The prior is the mean over clean tokens of
    the distribution after the last step; it is uniform, except for a ``table`` that is not doubly stochastic.

    A blueprint with this kernel has no schedule: the time is the number of the step. Use it with the objective ``d3pm``,
    whose ``steps`` must be T, and the sampler ``ancestral`` with at most T steps.
    """

    # widths under which a few states exchange tokens, too
    example: ClassVar[Mapping[str, Any]] = {"steps": 1000, "beta_first": 0.02, "beta_last": 1.0}

    class Config(ComponentConfig):
        form: Literal["gaussian", "nearest", "nearest_rate", "table"] = "gaussian"
        """Form of the matrices. ``gaussian``: tokens move to near ids, with the squared width beta (appendix A.2.3).
        ``nearest``: with probability beta tokens move to one of the nearest embeddings, by a doubly stochastic matrix
        (Sinkhorn; A.2.4). ``nearest_rate``: the same by rates during a time beta. ``table``: given matrices."""
        steps: StepCount | None = None
        """Number of steps T, up to 10,000. null: as many as ``betas`` or ``table`` has, otherwise 1,000."""
        beta_first: Beta = 1e-4
        """Beta of the first step, above 0; the betas between the first and the last are linear."""
        beta_last: Beta = 0.02
        """Beta of the last step, above 0: up to 100 for ``gaussian``, and 1 for ``nearest``."""
        end: bool = True
        """True: the last step has ``beta_last``, as in D3PM's code for images. False: the step after the last would
        have it, as in D3PM's code for text."""
        betas: Annotated[tuple[Beta, ...], pydantic.Field(min_length=1, max_length=MOST_STEPS)] | None = None
        """The betas of all steps, in place of ``beta_first`` and ``beta_last``."""
        scale: Literal["images", "text"] = "images"
        """Distance of the first from the last id for ``gaussian``, in units of which beta is the squared width: 2 in
        D3PM's code for images, 2 n / (n - 1) for n states in its code for text."""
        neighbours: Annotated[int, pydantic.Field(ge=1, le=256)] = 10
        """Number of nearest neighbours of each token, from 1 to 256: by the distance of embeddings for ``nearest``, by
        their cosine for ``nearest_rate``, as in D3PM's code."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A file below the working directory, up to 2 GiB. Embeddings, one row per token (``.npy`` or
        ``.safetensors``); null: normal draws with ``seed``. For ``table``: the matrices, a ``.npy`` file of shape [T, n,
        n]."""
        tensor: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """Name of the embedding tensor in a ``.safetensors`` file."""
        seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0
        """Seed of the random embeddings that are used without a file."""
        width: Annotated[int, pydantic.Field(ge=1, le=8192)] = 64
        """Dimension of the random embeddings that are used without a file, from 1 to 8,192."""
        rounded: bool = False
        """True: sums of betas are rounded to multiples of the first one, as in D3PM's code for text."""
        table: Annotated[tuple[Matrix, ...], pydantic.Field(min_length=1, max_length=MOST_STEPS)] | None = None
        """The matrices for ``table``, each with 2 to 64 rows: row z, column y is the probability of state z after the
        step given y before it, so that every column sums to 1."""
        mask: bool = False
        """True: the last state of a ``table`` is the mask, which no clean text has."""

        @pydantic.model_validator(mode="after")
        def _of_one_form(self) -> Steps.Config:
            fields = type(self).model_fields
            unread = [k for k in fields if k not in _READS[self.form] and getattr(self, k) != fields[k].default]
            if unread := [k for k in unread if k not in ("form", "steps")]:
                raise ValueError(f"form {self.form!r} does not read {', '.join(unread)}: leave it out")
            if self.form == "table":
                return self._checked_table()
            if self.betas is not None and self.steps not in (None, len(self.betas)):
                raise ValueError(f"{len(self.betas)} betas are given for {self.steps} steps: leave 'steps' out")
            largest, most = max(self.betas or (self.beta_first, self.beta_last)), _LARGEST[self.form]
            if largest > most:
                raise ValueError(f"a beta of {largest:g} is more than the {most:g} that form {self.form!r} takes")
            if self.form != "gaussian" and (self.tensor is not None) != (
                self.file is not None and self.file.endswith(".safetensors")
            ):
                raise ValueError("'tensor' names the embeddings in a .safetensors file: give both or neither")
            return self

        def _checked_table(self) -> Steps.Config:
            if (self.table is None) == (self.file is None):
                raise ValueError("form 'table' needs exactly one of 'table' and 'file'")
            if self.table is None:
                if self.steps is None:
                    raise ValueError("give 'steps', the number of matrices in the file")
                return self
            if self.steps not in (None, len(self.table)):
                raise ValueError(f"{len(self.table)} matrices are given for {self.steps} steps: leave 'steps' out")
            n = len(self.table[0])
            if any(len(matrix) != n or any(len(row) != n for row in matrix) for matrix in self.table):
                raise ValueError(
                    f"table: every matrix must have {n} rows of {n} entries, as many as the first has rows"
                )
            return self

        @property
        def count(self) -> int:
            """Number of steps T."""
            given = self.betas if self.betas is not None else self.table
            return self.steps or (1000 if given is None else len(given))

    config: Config

    @classmethod
    def own_schedule(cls, config: ComponentConfig) -> Mapping[str, Any]:
        return {"op": "steps_taken", "steps": Steps.Config.model_validate(config).count}

    @property
    def steps(self) -> int:
        return self.config.count

    @property
    def mask(self) -> int | None:
        return self.states - 1 if self.config.mask else None

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        config = Steps.Config.model_validate(config)
        if config.form == "table":
            return config.model_copy(update={"file": None, "table": _cut(config, states), "steps": None})
        if config.form == "gaussian":
            return config.model_copy(update={"betas": _wider(config, states), "steps": None})
        # Sinkhorn's iteration need not converge on the graph of a few states, unless all are neighbours
        few = states - 1 if config.form == "nearest" else min(config.neighbours, max(2, states // 2))
        return config.model_copy(update={"file": None, "tensor": None, "width": 2, "neighbours": few})

    def step_matrices(self) -> Tensor:
        return _matrices(self.config, self.states)

    def make_tables(self) -> Tensor:
        stamp = None
        if self.config.file is not None:
            found = local_file(self.config.file, MOST_BYTES).stat()
            stamp = found.st_mtime_ns, found.st_size
        return _tables(self.config, self.states, stamp)


@functools.lru_cache(maxsize=4)
def _tables(config: Steps.Config, states: int, stamp: tuple[int, int] | None) -> Tensor:
    """Return the tables of ``config``; ``stamp``, the file's time and size, invalidates the cache when the file changes."""
    return step_tables(_matrices(config, states))


def _betas(config: Steps.Config) -> Tensor:
    """Return the betas of ``config``, float64 [T]."""
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=torch.float64)
    return linear_betas(config.beta_first, config.beta_last, config.count, end=config.end)


def _matrices(config: Steps.Config, states: int) -> Tensor:
    """Return the step matrices of ``config``, float64 [T, n, n]; raises :class:`UserError` if they cannot be read."""
    if config.form == "table":
        found = check_columns(_given(config), config.file or "table")
        if found.shape[1] != states:
            raise UserError(f"steps: the matrices are those of {found.shape[1]} states, but the model has {states}")
        return found
    betas = _betas(config)
    if config.form == "gaussian":
        return gaussian_steps(betas * (1.0 if config.scale == "images" else ((states - 1) / states) ** 2), states)
    points = embeddings(config, states)
    if len(points) != states:
        raise UserError(f"{config.file} has {len(points):,} embeddings, but the model has {states:,} states")
    if config.form == "nearest":
        return share_steps(betas, balanced(points, config.neighbours))
    if config.rounded:
        sums = (betas.cumsum(0) / betas[0]).round() * betas[0]
        betas = sums.diff(prepend=sums.new_zeros(1))
    return rate_steps(betas, exchange_rates(points, config.neighbours))


def _given(config: Steps.Config) -> Tensor:
    """Return the matrices of a table, float64 [T, n, n]; raises :class:`UserError` for a file of another shape."""
    if config.table is not None:
        return torch.tensor(config.table, dtype=torch.float64)
    found = torch.from_numpy(load_numbers(config.file or "", 3, limit=MOST_BYTES))
    if len(found) != config.count or found.shape[1] != found.shape[2]:
        raise UserError(f"{config.file} must hold {config.count} square matrices, not {list(found.shape)}")
    return found


def _unmixed(steps: Tensor) -> float:
    """Return the total variation distance from uniform after symmetric steps [T, n, n], maximised over states."""
    last = step_tables(steps)[len(steps)]
    return float((last - 1 / len(last)).abs().sum(0).max() / 2)


def _wider(config: Steps.Config, states: int) -> tuple[float, ...]:
    """Return the betas of a Gaussian between few states, enlarged until noise reaches the prior if it can.

    Widths that span many of many states would not reach the next one of a few.
    """
    betas = _betas(config)
    for _ in range(10):
        if _unmixed(gaussian_steps(betas, states)) < _MIXED:
            break
        betas = (2 * betas).clamp(max=_LARGEST["gaussian"])
    return tuple(betas.tolist())


def _cut(config: Steps.Config, states: int) -> tuple[Matrix, ...]:
    """Return a table between few states: the first ones and the last, or all with others added.

    What leaves the chosen states goes to all of them evenly; a small share of even moves, so that noise is the prior.
    """
    found = check_columns(_given(config), config.file or "table")
    n = found.shape[1]
    out = torch.zeros(len(found), states, states, dtype=torch.float64)
    few = min(n, states)
    kept = torch.tensor([*range(few - 1), n - 1])
    to = torch.tensor([*range(few - 1), states - 1])
    out[:, to[:, None], to] = found[:, kept[:, None], kept]
    even = torch.full((states,), 1 / states, dtype=torch.float64)
    if config.mask:
        even = torch.nn.functional.one_hot(torch.tensor(states - 1), states).double()
    out = out + even[:, None] * (1 - out.sum(1, keepdim=True))
    share = min(1.0, 7.0 / len(found)) if states != n else 0.0
    mixed = (1 - share) * out + share * even[:, None]
    return tuple(tuple(tuple(row) for row in matrix) for matrix in mixed.tolist())
