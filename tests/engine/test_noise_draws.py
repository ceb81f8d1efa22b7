"""The standard error of a bound: its spread over independent repetitions, with stratified and with independent levels."""

import math

import numpy as np
import pytest
import torch

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.engine.noise_draws import NoiseDraws
from sedd_graph.evaluation.estimate import ratio

BATCHES, ROWS, REPETITIONS = 12, 32, 250


def evaluation(
    seed: int, *, stratified: bool, draws: int, levels: int, batches: int = BATCHES
) -> tuple[float, float, float]:
    """The estimate of one evaluation, its standard error, and the one that takes draws for independent.

    The loss of a token is a function of the level, from 0.2 at little noise to 7, times what a row adds, and noise.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 41, batches * ROWS)
    hard = np.exp(0.3 * rng.standard_normal(batches * ROWS))
    drawn, nats = NoiseDraws(), np.zeros(batches * ROWS)
    generator = torch.Generator().manual_seed(seed)
    for batch in range(batches):
        rows = np.arange(ROWS) + batch * ROWS
        drawn.first = rows[0]
        for _ in range(draws):
            random = Randomness(generator)
            size = ROWS * levels
            even = random.low_discrepancy(size) if stratified else random.rand(size)
            t = even.reshape(ROWS, levels).double().numpy()
            shape = 7 / (1 + 30 * np.exp(-8 * t))
            loss = (counts / levels)[rows, None] * (shape * hard[rows, None] + 0.8 * rng.standard_normal(t.shape))
            nats[rows] += loss.sum(1) / draws
            drawn.add("time", torch.from_numpy(t if levels > 1 else t[:, 0]), torch.from_numpy(loss.sum(1)))
    value, plain = ratio(nats, counts)
    return value, drawn.standard_error(nats, counts), plain


@pytest.mark.parametrize(
    ("stratified", "draws", "levels"), [(True, 1, 1), (True, 3, 1), (True, 1, 4), (False, 1, 1), (False, 3, 1)]
)
def test_the_standard_error_is_the_spread_over_repetitions(stratified: bool, draws: int, levels: int) -> None:
    found = np.array([evaluation(s, stratified=stratified, draws=draws, levels=levels) for s in range(REPETITIONS)])
    spread = found[:, 0].std(ddof=1)
    assert 0.85 < np.sqrt((found[:, 1] ** 2).mean()) / spread < 1.15
    covered = (abs(found[:, 0] - found[:, 0].mean()) < 1.96 * found[:, 1]).mean()
    assert 0.9 < covered < 0.99
    if stratified and draws == levels == 1:
        assert found[:, 2].mean() > 1.6 * spread  # draws taken for independent: what was reported


def test_few_draws_are_taken_for_independent() -> None:
    drawn = NoiseDraws()
    nats, counts = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3)
    assert drawn.standard_error(nats, counts) == pytest.approx(ratio(nats, counts).standard_error)
    drawn.add("time", torch.tensor([0.1, 0.4, 0.8]), nats)
    assert drawn.standard_error(nats, counts) == pytest.approx(ratio(nats, counts).standard_error)
    assert math.isnan(drawn.standard_error(nats[:1], counts[:1]))


@pytest.mark.parametrize("batches", [2, 9])
def test_few_batches_are_taken_for_independent(batches: int) -> None:
    """A variance between two batches is often far too small."""
    found = np.array([evaluation(s, stratified=True, draws=1, levels=1, batches=batches) for s in range(100)])
    assert np.allclose(found[:, 1], found[:, 2])
    assert (abs(found[:, 0] - found[:, 0].mean()) < 3 * found[:, 1]).mean() > 0.97
