"""Evaluation on held-out rows: an upper bound on -log p, also by noise level, or -log p itself where it is exact.

Axes: b batch.
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

__all__ = ["LEVELS", "Evaluation", "HeldOutLikelihood", "Level", "Result", "evaluate", "numbers", "to_batch"]

LEVELS = 10
"""Number of bins of the bound by noise level."""


@dataclasses.dataclass(frozen=True)
class Level:
    """The part of a bound from one bin of noise levels: times, or shares of masked tokens, in (``low``, ``high``].

    The mean of ``nats_per_token`` over all levels, weighted by ``tokens``, is the bound.

    Attributes:
        low: Lower end of the bin.
        high: Upper end of the bin.
        noised_low: Share of tokens that noise has changed at ``low``: 1 - exp(-sigma), which compares across schedules.
        noised_high: The same at ``high``.
        nats_per_token: Mean of the integrand of the bound over the draws in the bin.
        standard_error: Standard error of that mean, over sequences.
        draws: Number of noise draws in the bin.
        tokens: Number of tokens that these draws count.
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
    """An upper bound on -log p of held-out text. Standard errors are over sequences.

    Attributes:
        nats_per_token: The bound.
        standard_error: Its standard error.
        bits_per_character: The bound in bits per character.
        bits_standard_error: Its standard error.
        perplexity: exp(``nats_per_token``).
        sequences: Number of rows.
        tokens: Number of tokens.
        draws: Noise draws per row.
        over: The quantity that is drawn: ``time``, or ``masked``, the number of masked tokens.
        levels: The bound by noise level.
        caveat: The reason why it is not comparable with bounds of other models; None where it is.
    """

    nats_per_token: float
    standard_error: float
    bits_per_character: float
    bits_standard_error: float
    perplexity: float
    sequences: int
    tokens: int
    draws: int
    over: str
    levels: tuple[Level, ...]
    caveat: str | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.sequences

    def curve(self) -> dict[str, float]:
        """Return the numbers that training logs as a curve, by name."""
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
class HeldOutLikelihood:
    """-log p of held-out rows of real numbers, exact. Standard errors are over rows.

    Attributes:
        nats_per_dimension: -log p per number of a row.
        standard_error: Its standard error.
        bits_per_dimension: The same in bits.
        bits_standard_error: Its standard error.
        rows: Number of rows.
        dimensions: Numbers per row.
    """

    nats_per_dimension: float
    standard_error: float
    bits_per_dimension: float
    bits_standard_error: float
    rows: int
    dimensions: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows

    def curve(self) -> dict[str, float]:
        """Return the numbers that training logs as a curve, by name."""
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


Result = Evaluation | HeldOutLikelihood
"""A held-out evaluation."""


def numbers(found: Result) -> dict[str, float]:
    """Return the fields of ``found`` that are single numbers, by name."""
    return {k: v for k, v in dataclasses.asdict(found).items() if isinstance(v, int | float)}


def to_batch(rows: Any, process: Process, device: torch.device) -> Any:
    """Return ``rows``, a dataclass of numpy arrays [b, ...], as a batch of the process on ``device``."""
    arrays = (torch.from_numpy(getattr(rows, f.name)) for f in dataclasses.fields(rows))
    return process.batch_type(*(array.to(device, non_blocking=True) for array in arrays))


@dataclasses.dataclass
class _Draws:
    """Noise draws collected over batches: indices of rows, times, and nats, each [draws]."""

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
        """Return the bound in bins of equal width in t. ``counted`` [rows] is the number of tokens of each row."""
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
            # summed by sequence, since several draws of one are not independent
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
    """Evaluate -log p of held-out rows: an upper bound per token and character, or exact values per dimension.

    Args:
        engine: The engine.
        data: The data, whose held-out rows are taken.
        rows: Rows per batch.
        batches: Number of batches, spread evenly over the held-out rows; None takes all.
        draws: Noise draws per row.
        seed: Seed of the noise.
    """
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
    if engine.process.exact:
        return HeldOutLikelihood(mean, error, mean * bits, error * bits, rows=len(value), dimensions=int(count[0]))
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
