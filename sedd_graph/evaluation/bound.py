"""Evaluation of a model on held-out rows.

Diffusion models get an upper bound on -log p (negative ELBO), in total and by noise level. Flows get the exact -log p.

Axes: b batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.progress import track
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.noise_draws import NoiseDraws
from sedd_graph.engine.process import Process
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.evaluation.estimate import ratio
from sedd_graph.evaluation.sharing import ALONE, RowNumbers, Share, Workers, shares

__all__ = ["LEVELS", "Evaluation", "HeldOutLikelihood", "Level", "Result", "evaluate", "numbers", "to_batch"]

CPU = torch.device("cpu")
_MEASURE = "measure "
"""Prefix of the names of a family's own measures among the numbers of a row."""
LEVELS = 10
"""Number of bins in which the bound is reported by noise level."""


@dataclasses.dataclass(frozen=True)
class Level:
    """Mean loss of the noise draws in one bin of noise levels.

    The mean of ``nats_per_token`` over all bins, weighted by ``tokens``, plus :attr:`Evaluation.reconstruction`, is the
    upper bound on -log p.

    Attributes:
        low: Lower end of the bin (exclusive), a value in [0, 1] of the random variable :attr:`Evaluation.over`: a time,
            or a fraction of noised tokens.
        high: Upper end of the bin (inclusive), of the same variable.
        noised_low: Fraction of tokens that noise has changed at ``low``, which makes bins of different noise schedules
            comparable. At a time t it is 1 - exp(-sigma(t)), sigma being the total noise.
        noised_high: Fraction of tokens that noise has changed at ``high``.
        nats_per_token: Mean loss of the draws in the bin, nats per token.
        standard_error: Standard error of ``nats_per_token``; draws of one sequence are not treated as independent.
        draws: Number of noise draws in the bin.
        tokens: Number of tokens in these draws. A token counts once for each draw.
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
    """Upper bound on -log p of held-out text, with standard errors over sequences.

    Attributes:
        nats_per_token: The bound in nats per token.
        standard_error: Standard error of ``nats_per_token``.
        bits_per_character: The bound in bits per character.
        bits_standard_error: Standard error of ``bits_per_character``.
        perplexity: exp(``nats_per_token``), an upper bound on the perplexity per token.
        sequences: Number of evaluated rows.
        tokens: Number of evaluated tokens.
        draws: Number of noise draws per row.
        over: Random variable that sets the noise level of a draw: ``time``; ``masked``, the fraction of tokens that are
            masked; or, for strings, ``deleted`` or ``noised``, the probability that noise has changed a token.
        levels: Mean loss in each of :data:`LEVELS` bins of the noise level, without bins that have no draw; empty where
            a row has several noise levels at once (block diffusion).
        reconstruction: Reconstruction term of the bound, -log p(x_0 | x_t) in nats per token, x_t being drawn at the
            lowest noise that the objective's loss counts. Included in ``nats_per_token``, but in none of the
            ``levels``. 0 if the loss counts all noise.
        caveat: Reason why the bound cannot be compared with the bounds of other models; None if it can.
        measures: Further measures of the family by name, means over tokens, such as ``rounding_accuracy``
            (:meth:`sedd_graph.engine.process.Process.measures`).
        likelihood: The likelihood that was computed (:attr:`sedd_graph.engine.process.Process.likelihoods`): ``bound``, an
            upper bound; or ``ode``, an estimate of the bound of a probability-flow ODE.
        row_nats: The bound of each row, nats. The noise of a row is that of every evaluation with the same seed and rows.
        row_tokens: Number of evaluated tokens of each row.
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
    reconstruction: float = 0.0
    caveat: str | None = None
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    likelihood: str = "bound"
    row_nats: tuple[float, ...] = ()
    row_tokens: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of evaluated rows."""
        return self.sequences

    def curve(self) -> dict[str, float]:
        """Return the metrics that training logs after each evaluation, by name."""
        return {
            "loss": self.nats_per_token,
            "standard_error": self.standard_error,
            "bits_per_character": self.bits_per_character,
            "bits_standard_error": self.bits_standard_error,
            **self.measures,
        }

    def __str__(self) -> str:
        what = (
            ("loose bound" if self.caveat else "bound") if self.likelihood == "bound" else f"{self.likelihood} estimate"
        )
        further = "".join(f", {name.replace('_', ' ')} {value:.4%}" for name, value in self.measures.items())
        return (
            f"{what} {self.nats_per_token:.4f} +- {self.standard_error:.4f} nats per token, "
            f"{self.bits_per_character:.4f} +- {self.bits_standard_error:.4f} bits per character, "
            f"perplexity {self.perplexity:.2f}{further} ({self.sequences} sequences, {self.draws} draw(s))"
        )


@dataclasses.dataclass(frozen=True)
class HeldOutLikelihood:
    """Exact -log p of held-out rows of real numbers under a flow, with standard errors over rows.

    Attributes:
        nats_per_dimension: -log p in nats, divided by the number of dimensions.
        standard_error: Standard error of ``nats_per_dimension``.
        bits_per_dimension: -log2 p in bits, divided by the number of dimensions.
        bits_standard_error: Standard error of ``bits_per_dimension``.
        rows: Number of evaluated rows.
        dimensions: Number of real numbers in each row.
        row_nats: -log p of each row, nats.
        row_tokens: Number of real numbers of each row.
    """

    nats_per_dimension: float
    standard_error: float
    bits_per_dimension: float
    bits_standard_error: float
    rows: int
    dimensions: int
    row_nats: tuple[float, ...] = ()
    row_tokens: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of evaluated rows."""
        return self.rows

    def curve(self) -> dict[str, float]:
        """Return the metrics that training logs after each evaluation, by name."""
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
"""Result of an evaluation on held-out rows: an upper bound on -log p for text, the exact -log p for real numbers."""


def numbers(found: Result) -> dict[str, float]:
    """Return the numbers of an evaluation by name, thus all fields but ``over``, ``levels`` and ``caveat``."""
    measures = found.measures if isinstance(found, Evaluation) else {}
    return {k: v for k, v in dataclasses.asdict(found).items() if isinstance(v, int | float)} | dict(measures)


def to_batch(rows: Any, process: Process, device: torch.device) -> Any:
    """Convert rows of a data set to a batch of a process.

    Args:
        rows: Dataclass of NumPy arrays or tensors [b, ...], in the order of the fields of ``process.batch_type``.
        process: The process, which determines the class of the batch.
        device: Device that the arrays are copied to, without blocking.

    Returns:
        An instance of ``process.batch_type``.
    """
    arrays = (getattr(rows, f.name) for f in dataclasses.fields(rows))
    return process.batch_type.of_arrays(*arrays).to(device)


def _levels(drawn: NoiseDraws, counted: Tensor, process: Process) -> tuple[Level, ...]:
    """Return the mean loss in bins of equal width in t; none if a row has several noise levels.

    Args:
        drawn: The draws.
        counted: Number of tokens per row, [rows].
        process: The process, which relates t to the fraction of noised tokens.
    """
    arrays = drawn.arrays()
    if arrays is None or arrays[1].ndim > 1:
        return ()
    row, t, nats = arrays
    edges = np.arange(LEVELS + 1) / LEVELS
    noised = process.noised(drawn.over, torch.from_numpy(edges)).numpy()
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


def _reconstruction(drawn: NoiseDraws, nats: Tensor, draws: int) -> float:
    """Return the sum over rows of what the bound ``nats`` [rows] counts beyond the mean loss of the draws of each row."""
    arrays = drawn.arrays()
    if arrays is None:
        return 0.0
    total = float(nats.sum())
    below = total - float(arrays[2].sum()) / draws
    return below if abs(below) > 1e-12 * abs(total) else 0.0  # rounding


def evaluate(
    engine: Engine,
    data: Dataset | PointData,
    *,
    rows: int,
    batches: int | None,
    draws: int,
    seed: int,
    at_once: int | None = None,
    workers: Workers = ALONE,
) -> Result:
    """Evaluate a model on held-out rows, in the precision :attr:`Network.dtype`.

    The noise of a row depends on the seed and on the row's place in the evaluation, neither on ``at_once`` nor on the
    number of processes; the result is the same up to the rounding of the network.

    Args:
        engine: Engine that holds the network and its process.
        data: Data set whose held-out rows are evaluated.
        rows: Number of rows per batch, whose noise levels are drawn together (stratified).
        batches: Number of batches, spread evenly over the held-out rows; None evaluates all rows.
        draws: Number of noise draws per row. For a flow, number of estimates of the log-determinant where it is not
            exact.
        seed: Seed of the random numbers. Each batch gets a seed of its own, derived from this one.
        at_once: Largest number of rows that the network evaluates at a time; None: ``rows``. It bounds the memory.
        workers: The processes that share the evaluation. All of them must call this function with equal arguments.

    Returns:
        For a flow, the exact -log p per dimension (:class:`HeldOutLikelihood`); for other models, an upper bound on
        -log p per token and per character (:class:`Evaluation`). The same in all processes.
    """
    process, network, chosen = engine.process, engine.network, data.held_out_batches(rows, batches=batches)
    found, over = RowNumbers(chosen), "time"
    mine = shares(chosen, min(at_once or rows, rows), workers, padded=network.compiled_everywhere)
    with torch.no_grad(), network.evaluating():
        for share in track(mine, "evaluating", unit="batch"):
            own, own_seed = chosen[share.number], mix_seed(seed, share.number)
            batch = to_batch(data.heldout.take(np.arange(own.start, own.stop), 0), process, CPU)
            batch = process.batch(batch, CPU).to(engine.device)  # checked where nothing is waited for
            values, over = _evaluate_share(engine, batch, share, seed=own_seed, draws=draws)
            found.add(share, values)
    numbers = found.gather(workers, engine.device)
    value, count = numbers["nats"], numbers["counted"]
    mean, error = ratio(value.numpy(), count.numpy())
    bits = 1 / (math.log(2) * data.units.ratio)
    rows_found = {"row_nats": tuple(value.tolist()), "row_tokens": tuple(count.long().tolist())}
    if process.exact:
        size = int(count[0])
        return HeldOutLikelihood(mean, error, mean * bits, error * bits, rows=len(value), dimensions=size, **rows_found)
    record = _draws(found, numbers, draws, over)
    error = record.standard_error(value.numpy(), count.numpy())
    return Evaluation(
        mean,
        error,
        bits_per_character=mean * bits,
        bits_standard_error=error * bits,
        perplexity=math.exp(min(mean, 700.0)),
        sequences=len(value),
        tokens=int(count.sum()),
        draws=draws,
        over=over,
        levels=_levels(record, count, process),
        reconstruction=_reconstruction(record, value, draws) / float(count.sum()),
        caveat=process.caveat,
        likelihood=process.likelihood,
        **rows_found,
        measures={
            name.removeprefix(_MEASURE): float(total.sum()) / float(count.sum())
            for name, total in numbers.items()
            if name.startswith(_MEASURE)
        },
    )


def _evaluate_share(
    engine: Engine, batch: Any, share: Share, *, seed: int, draws: int
) -> tuple[dict[str, Tensor], str]:
    """Return the numbers of the rows of a share by name, [m] or [m, k], and the name of the variable of noise levels."""
    process, network, drawn = engine.process, engine.network, list[tuple[str, Tensor | None, Tensor]]()

    def on_draw(over: str, t: Tensor | None, nats: Tensor) -> None:
        drawn.append((over, t, nats))

    seeds = [mix_seed(seed, number) for number in range(draws)]
    nats = process.bound_rows(network, batch, share.parts, seeds=seeds, on_draw=on_draw)
    values = {"nats": nats, "counted": torch.cat([batch.part(part).counted for part in share.parts])}
    for number, (_, t, each) in enumerate(drawn):
        values |= {f"nats {number}": each} | ({} if t is None else {f"t {number}": t})
    measured = [process.measures(network, batch, part, seed=mix_seed(seed, 0)) for part in share.parts]
    values |= {_MEASURE + name: torch.cat([each[name] for each in measured]) for name in measured[0]}
    return values, drawn[-1][0] if drawn else "time"


def _draws(found: RowNumbers, numbers: Mapping[str, Tensor], draws: int, over: str) -> NoiseDraws:
    """Return the record of all noise draws, batch by batch."""
    record = NoiseDraws()
    for rows in found.parts():
        for number in range(draws):
            if f"t {number}" in numbers:
                record.add(over, numbers[f"t {number}"][rows], numbers[f"nats {number}"][rows])
        record.first = rows.stop
    record.over = over
    return record
