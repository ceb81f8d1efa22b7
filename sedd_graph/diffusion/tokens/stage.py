"""Network outputs in two stages: the network up to its position-wise end, and the outputs at positions that are read.

With a vocabulary of 50,257 tokens the outputs at all positions of a batch take more memory than the rest of the network.
A sampler reads few of them at a time. Axes: b batch, r rows of it, l length, g groups of positions of one row, m positions
of a group, n states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.walk_settings import Denoise

__all__ = ["Outputs", "Rows", "Stage", "StagedDenoise", "begin", "one_by_one", "whole_rows"]


class Rows(NamedTuple):
    """Some rows of a batch, whose number the host knows.

    Attributes:
        mask: The rows, bool [b].
        number: Their number.
    """

    mask: Tensor
    number: int


def whole_rows(valid: Tensor) -> Groups:
    """Return all positions of a batch as one group for each row; ``valid`` is bool [b, l]."""
    rows, length = valid.shape
    row = torch.arange(rows, device=valid.device)
    return Groups(row, row, torch.arange(length, device=valid.device).expand(rows, length), valid)


def one_by_one(where: Tensor, count: int) -> Groups:
    """Return the ``count`` positions ``where``, bool [b, l], row by row, as groups of one position."""
    found = torch.nonzero_static(where, size=count)
    return Groups(found[:, 0], found[:, 0], found[:, 1:], torch.ones_like(found[:, 1:], dtype=torch.bool))


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the outputs of the network for some rows are computed from.

    Attributes:
        values: The tensors.
        by_row: For each of them, whether its first axis is that of rows.
        finish: Function from these tensors and groups of positions to outputs by name, [g, m, n].
    """

    values: tuple[Tensor, ...]
    by_row: tuple[bool, ...]
    finish: Callable[[Sequence[Tensor], Groups], Mapping[str, Tensor]]

    def at(self, groups: Groups) -> Mapping[str, Tensor]:
        """Return the outputs at positions, by name, [g, m, n]."""
        return self.finish(self.values, groups)

    def spread(self, index: Tensor, rows: int, others: Stage | None) -> Stage:
        """Return the stage of ``rows`` rows: those of this one at ``index``, int64 [r], and ``others`` elsewhere (None: 0)."""
        placed = []
        for i, (value, by_row) in enumerate(zip(self.values, self.by_row, strict=True)):
            if by_row:
                old = value.new_zeros(rows, *value.shape[1:]) if others is None else others.values[i]
                value = old.index_copy(0, index, value)
            placed.append(value)
        return dataclasses.replace(self, values=tuple(placed))

    def under(self, context: Callable[[], contextlib.AbstractContextManager[None]]) -> Stage:
        """Return the stage whose outputs are computed within a context, such as autocast."""
        finish = self.finish

        def within(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
            with context():
                return finish(values, groups)

        return dataclasses.replace(self, finish=within)

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], at: Tensor | None = None, length: int = 0) -> Stage:
        """Return a stage that holds outputs which have been computed already.

        Args:
            outputs: Outputs by name, [r, l, n]; [r, k, n] at k positions.
            at: These positions, different within a row, int64 [r, k]; None: all.
            length: Number of positions of a row, l; for ``at``.
        """
        names, values = tuple(outputs), tuple(outputs.values())
        if at is None:

            def finish(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
                return {k: v[groups.row[:, None], groups.place] for k, v in zip(names, values, strict=True)}

            return cls(values, (True,) * len(values), finish)
        order = torch.arange(at.shape[1], device=at.device).expand_as(at)
        slot = at.new_zeros(len(at), length).scatter(1, at, order)

        def few(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
            row = groups.row[:, None]
            at_slot = values[-1][row, groups.place]
            return {k: v[row, at_slot] for k, v in zip(names, values, strict=False)}

        return cls((*values, slot), (True,) * (len(values) + 1), few)


class StagedDenoise:
    """A :class:`~sedd_graph.diffusion.tokens.walk_settings.Denoise` that evaluates the network in two stages.

    Args:
        begin: ``begin(x, t, rows)`` evaluates the first stage; arguments as of ``Denoise``.
        random: Whether it draws random numbers, so that the moment of its evaluation matters.
    """

    def __init__(self, begin: Callable[[Tensor, Tensor, Tensor], Stage], *, random: bool = False) -> None:
        self.begin, self.random = begin, random

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        groups = whole_rows(torch.ones_like(x, dtype=torch.bool))
        if at is not None:
            groups = Groups(groups.row, groups.unit, at, torch.ones_like(at, dtype=torch.bool))
        return self.begin(x, t, rows).at(groups)


def begin(denoise: Denoise, x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Stage:
    """Evaluate the first stage of a network, or all of it where it has no stages; arguments as of ``Denoise``."""
    if isinstance(denoise, StagedDenoise):
        return denoise.begin(x, t, rows)
    return Stage.of(denoise(x, t, rows)) if at is None else Stage.of(denoise(x, t, rows, at), at, x.shape[1])


class Outputs:
    """Outputs of the network for the rows of one moment, evaluated where they are read.

    Args:
        x: The rows, int64 [b, l].
        evaluate: Evaluates the first stage for some rows (None: for all).
        check: Verifies the outputs that are read.
        need: Rows whose outputs are required, bool [b]; None: all.
        places: Whether networks without stages are evaluated at the positions that are drawn alone.

    Attributes:
        x: As above.
        need: As above.
        places: As above.
    """

    def __init__(
        self,
        x: Tensor,
        evaluate: Callable[[Rows | None, Tensor | None], Stage],
        check: OutputCheck,
        *,
        need: Tensor | None = None,
        places: bool = False,
    ) -> None:
        self.x, self.need, self.places = x, need, places
        self._evaluate, self._check = evaluate, check
        self._stage: Stage | None = None

    @property
    def ready(self) -> bool:
        """Whether the first stage has been evaluated."""
        return self._stage is not None

    def ensure(self, rows: Rows | None = None, at: Tensor | None = None) -> Stage:
        """Evaluate the first stage, unless it has been.

        Args:
            rows: The rows; None: all.
            at: Positions that will be read of these rows, int64 [r, k], for networks without stages; None: all.
        """
        if self._stage is None:
            self._stage = self._evaluate(rows, at)
        return self._stage

    def at(self, groups: Groups) -> Mapping[str, Tensor]:
        """Return the outputs at positions, by name, [g, m, n]."""
        found = self.ensure().at(groups)
        self._check.add(found, groups.valid)
        return found

    def everywhere(self, where: Tensor) -> Mapping[str, Tensor]:
        """Return the outputs at all positions, by name, [b, l, n]; those at ``where``, bool [b, l], are verified."""
        return self.at(whole_rows(where))
