"""Likelihood of single sequences, or of a continuation given its context: the bound of each, with its standard error.

The noise of a sequence follows from a seed and from its tokens, so that its result depends neither on the other sequences
nor on how many are evaluated at a time (up to the rounding of the network). Axes: b batch, l length.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sedd_graph.component.progress import track
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.process import Process
from sedd_graph.errors import UserError

__all__ = ["Bound", "Scored", "score", "windows"]


class Scored(NamedTuple):
    """Tokens whose likelihood is evaluated.

    Attributes:
        context: Tokens before them, which are never noised.
        tokens: The tokens, at least one.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]


class Bound(NamedTuple):
    """Estimate of an upper bound on -log p.

    Attributes:
        nats: The estimate.
        standard_error: Its standard error by the noise, from two independent halves of the draws: a rough number for one
            sequence, which is accurate for the mean over many. 0 if the estimate is exact; NaN if there is one draw.
        tokens: Number of tokens.
    """

    nats: float
    standard_error: float
    tokens: int

    @classmethod
    def total(cls, parts: Sequence[Bound]) -> Bound:
        """Return the sum of independent estimates."""
        error = math.sqrt(sum(part.standard_error**2 for part in parts))
        return cls(sum(part.nats for part in parts), error, sum(part.tokens for part in parts))


def windows(context: Sequence[int], tokens: Sequence[int], most: int) -> list[Scored]:
    """Divide a text into rows of at most ``most`` tokens, in which each of its tokens is evaluated once.

    The context is cut on the left. If the tokens alone do not fit, they are cut into rows; the first has up to half a row
    of context, and the last the tokens before it as context.

    Args:
        context: Tokens before the text.
        tokens: The text.
        most: Largest number of tokens of a row.
    """
    before = tuple(context)
    kept = most - len(tokens) if len(tokens) <= most else most // 2
    before = before[max(0, len(before) - kept) :]
    found, start, text = list[Scored](), len(before), (*before, *tokens)
    stop = min(len(text), most)
    while start < len(text):
        first = start if found and stop < len(text) else max(0, stop - most)
        found.append(Scored(text[first:start], text[start:stop]))
        start, stop = stop, min(len(text), stop + most)
    return found


def score(engine: Engine, rows: Sequence[Scored], *, draws: int, seed: int, at_once: int) -> list[Bound]:
    """Estimate the bound of each of some sequences, given its context.

    Args:
        engine: Network and process of token rows, strings or vectors.
        rows: The sequences. Each must fit into a row of the network.
        draws: Number of evaluations of the network for each.
        seed: Seed of the noise.
        at_once: Largest number of rows that the network evaluates at a time.

    Returns:
        The bounds, in the order of ``rows``.

    Raises:
        UserError: The process is not one of text.
    """
    if not engine.process.text:
        raise UserError("likelihoods of texts need a process of text; this model is of points")
    found = [Bound(0.0, 0.0, 0)] * len(rows)
    ordered = sorted(range(len(rows)), key=lambda i: _length(rows[i]))
    batches = [
        group[start : start + at_once]
        for group in (list(group) for _, group in itertools.groupby(ordered, key=lambda i: _length(rows[i])))
        for start in range(0, len(group), at_once)
    ]
    with torch.no_grad(), engine.network.evaluating():
        for numbers in track(batches, "likelihoods", unit="batch"):
            own = [rows[i] for i in numbers]
            batch = engine.process.batch(_batch(own, engine.process), engine.device)
            seeds = [_seed(seed, row) for row in own]
            halves = engine.process.row_bounds(engine.network, batch, seeds=seeds, draws=draws, at_once=at_once)
            for i, (first, second) in zip(numbers, halves.tolist(), strict=True):
                mean = first if math.isnan(second) else (first + second) / 2
                found[i] = Bound(mean, abs(first - second) / 2, len(rows[i].tokens))
    return found


def _length(row: Scored) -> int:
    return len(row.context) + len(row.tokens)


def _seed(seed: int, row: Scored) -> int:
    """Return the seed of a row, in [0, 2^62), which follows from its tokens."""
    content = f"{seed} {row.context} {row.tokens}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 2


def _batch(rows: Sequence[Scored], process: Process) -> Any:
    """Return rows of one length as a batch, padded on the right to a length that the process accepts."""
    length, multiple = _length(rows[0]), process.row_multiple
    width = -(-length // multiple) * multiple
    tokens = np.zeros((len(rows), width), np.int64)
    corrupt = np.zeros((len(rows), width), np.bool_)
    for number, row in enumerate(rows):
        tokens[number, :length] = [*row.context, *row.tokens]
        corrupt[number, len(row.context) : length] = True
    attend = np.arange(width) < np.full((len(rows), 1), length)
    return process.batch_type(*(torch.from_numpy(array) for array in (tokens, attend, corrupt, corrupt.copy())))
