"""How likely held-out rows are: the bound of a noise process, whole and by noise level; the exact likelihood of a flow.

Axes: b batch, l length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.progress import track
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.process import Process
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.evaluation.estimate import ratio

__all__ = ["Evaluation", "Level", "Likelihood", "Result", "evaluate", "numbers", "to_batch"]

LEVELS = 10
"""Bins of the bound by noise level."""


@dataclasses.dataclass(frozen=True)
class Level:
    """The bound's integrand where the time (or the share of masked tokens) of a draw is in (``low``, ``high``].

    ``nats_per_token`` is its mean over the ``draws`` that fell there, in which ``tokens`` counted; the mean over all levels,
    weighted by ``tokens``, is the bound. ``noised_low`` and ``noised_high`` are 1 - exp(-sigma) at both ends: the share of
    tokens that the noise has hit, whatever the schedule.
    """

    low: float
    high: float
    noised_low: float
    noised_high: float
    nats_per_token: float
    standard_error: float
    draws: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A held-out bound. Standard errors are over sequences."""

    nats_per_token: float
    standard_error: float
    bits_per_character: float
    bits_standard_error: float
    perplexity: float
    sequences: int
    tokens: int
    draws: int
    over: str
    """What was drawn: ``time``, or ``masked``, how many tokens are masked (a sum over which has no error of its own)."""
    levels: tuple[Level, ...]
    caveat: str | None = None
    """Why it is not to be compared with bounds of other models; None where it may be."""

    @property
    def count(self) -> int:
        """Rows that it is over."""
        return self.sequences

    def curve(self) -> dict[str, float]:
        """What is followed on the way."""
        return {
            "loss": self.nats_per_token,
            "standard_error": self.standard_error,
            "bits_per_character": self.bits_per_character,
            "bits_standard_error": self.bits_standard_error,
        }

    def __str__(self) -> str:
        return (
            f"{'loose ' if self.caveat else ''}bound {self.nats_per_token:.4f} +- {self.standard_error:.4f} nats per token, "
            f"{self.bits_per_character:.4f} +- {self.bits_standard_error:.4f} bits per character, "
            f"perplexity {self.perplexity:.2f} ({self.sequences} sequences, {self.draws} draw(s))"
        )


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A held-out -log p, exact. Standard errors are over rows."""

    nats_per_dimension: float
    standard_error: float
    bits_per_dimension: float
    bits_standard_error: float
    rows: int
    dimensions: int

    @property
    def count(self) -> int:
        """Rows that it is over."""
        return self.rows

    def curve(self) -> dict[str, float]:
        """What is followed on the way."""
        return {
            "loss": self.nats_per_dimension,
            "standard_error": self.standard_error,
            "bits_per_dimension": self.bits_per_dimension,
            "bits_standard_error": self.bits_standard_error,
        }

    def __str__(self) -> str:
        return (
            f"-log p {self.nats_per_dimension:.4f} +- {self.standard_error:.4f} nats per dimension, "
            f"{self.bits_per_dimension:.4f} +- {self.bits_standard_error:.4f} bits per dimension "
            f"({self.rows} rows of {self.dimensions}, exact)"
        )


Result = Evaluation | Likelihood


def numbers(found: Result) -> dict[str, float]:
    """Return the plain numbers of a result, for one line of a record."""
    return {k: v for k, v in dataclasses.asdict(found).items() if isinstance(v, int | float)}


def to_batch(rows: Any, process: Process, device: torch.device) -> Any:
    """Put the numpy arrays of ``rows`` on the device, as a batch of the process."""
    arrays = (torch.from_numpy(getattr(rows, f.name)) for f in dataclasses.fields(rows))
    return process.batch_type(*(array.to(device, non_blocking=True) for array in arrays))


@dataclasses.dataclass
class _Draws:
    """Noise draws gathered over batches: the rows' numbers, times and nats, all [draws]."""

    over: str = "time"
    row: list[Tensor] = dataclasses.field(default_factory=list)
    t: list[Tensor] = dataclasses.field(default_factory=list)
    nats: list[Tensor] = dataclasses.field(default_factory=list)
    first: int = 0

    def add(self, over: str, t: Tensor | None, nats: Tensor) -> None:
        self.over = over
        if t is not None:
            self.row.append(self.first + torch.arange(len(nats)))
            self.t.append(t.double().cpu())
            self.nats.append(nats.double().cpu())

    def levels(self, counted: Tensor, process: Process) -> tuple[Level, ...]:
        """Even bins of t; ``counted`` [rows] holds how many tokens of each row count."""
        if not self.row:
            return ()
        row, t, nats = (torch.cat(part).numpy() for part in (self.row, self.t, self.nats))
        edges = np.arange(LEVELS + 1) / LEVELS
        noised = process.noised(self.over, torch.from_numpy(edges)).numpy()
        places = np.ceil(t * LEVELS - 1e-6).clip(1, LEVELS).astype(np.int64) - 1
        tokens = counted.numpy()[row]
        found = []
        for place in range(LEVELS):
            here = places == place
            if not here.any():
                continue
            # by sequence: several draws of one are not independent
            _, index = np.unique(row[here], return_inverse=True)
            value, error = ratio(np.bincount(index, nats[here]), np.bincount(index, tokens[here]))
            found.append(
                Level(
                    low=float(edges[place]),
                    high=float(edges[place + 1]),
                    noised_low=float(noised[place]),
                    noised_high=float(noised[place + 1]),
                    nats_per_token=value,
                    standard_error=error,
                    draws=int(here.sum()),
                    tokens=int(tokens[here].sum()),
                )
            )
        return tuple(found)


def evaluate(
    engine: Engine, data: Dataset | PointData, *, rows: int, batches: int | None, draws: int, seed: int
) -> Result:
    """Bound -log p of held-out rows (all, or ``batches`` spread evenly), per token and per character; of a flow, evaluate it
    per dimension."""
    nats, counts, drawn = [], [], _Draws()
    parts: Iterator[Any] = data.held_out(rows, batches=batches)
    total = math.ceil(data.heldout.count / rows)
    total = total if batches is None else min(batches, total)
    for number, part in enumerate(track(parts, "evaluating", total=total, unit="batch")):
        batch = to_batch(part, engine.process, engine.device)
        nats.append(engine.bound_rows(batch, seed=mix_seed(seed, number), draws=draws, on_draw=drawn.add))
        counts.append(batch.counted.double().cpu())
        drawn.first += len(counts[-1])
    value, count = torch.cat(nats), torch.cat(counts)
    mean, error = ratio(value.numpy(), count.numpy())
    bits = 1 / (math.log(2) * data.units.ratio)
    if data.units.bits == "dimension":
        return Likelihood(mean, error, mean * bits, error * bits, rows=len(value), dimensions=int(count[0]))
    return Evaluation(
        mean,
        error,
        bits_per_character=mean * bits,
        bits_standard_error=error * bits,
        perplexity=math.exp(min(mean, 700.0)),
        sequences=len(value),
        tokens=int(count.sum()),
        draws=draws,
        over=drawn.over,
        levels=drawn.levels(count, engine.process),
        caveat=engine.process.caveat,
    )
