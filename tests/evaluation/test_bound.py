"""The bound by noise level: its levels sum up to it, and are what a network that knows nothing must give."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sedd_graph
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import LEVELS, Evaluation, evaluate, numbers
from sedd_graph.runs.check import check

LETTERS = 20
SMALLER = (("tokens: 128", f"tokens: {LETTERS}"), ("size: 128", f"size: {LETTERS}"))
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "masked_count": (),
    "nelbo": (("{op: masked_count}", "{op: nelbo}"),),
    "score_entropy": (("{op: masked_count}", "{op: score_entropy}"),),
    "uniform": (
        ("{op: masked_count}", "{op: nelbo}"),
        ("{op: absorb,", "{op: uniform,"),
        ("+1", ""),
        ("out: float b l v}\nprocess", "out: float b l v, with: {mask: none}}\nprocess"),
    ),
}


@pytest.fixture
def made(small: Callable[..., Path]) -> Callable[[str], tuple[Engine, Dataset]]:
    def make(kind: str) -> tuple[Engine, Dataset]:
        path = small(*SMALLER, *KINDS[kind])
        report = check(path)
        assert isinstance(report.data, DataConfig)
        return sedd_graph.build(path, device="cpu", compile="off"), open_data(report.data, root=path.parent)

    return make


def bounded(engine: Engine, data: Dataset, *, batches: int, draws: int) -> Evaluation:
    found = evaluate(engine, data, rows=64, batches=batches, draws=draws, seed=3)
    assert isinstance(found, Evaluation)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_levels_sum_up_to_the_bound(made: Callable[[str], tuple[Engine, Dataset]], kind: str) -> None:
    engine, data = made(kind)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    found = bounded(engine, data, batches=2, draws=2)
    assert found.over == ("masked" if kind in ("masked_count", "nelbo") else "time")
    assert len(found.levels) == LEVELS
    tokens = sum(level.tokens for level in found.levels)
    assert tokens == found.draws * found.tokens
    assert sum(level.draws for level in found.levels) == found.draws * found.sequences
    whole = sum(level.nats_per_token * level.tokens for level in found.levels) / tokens
    assert whole + found.reconstruction == pytest.approx(found.nats_per_token, rel=1e-9)
    assert found.reconstruction > 0 if kind == "uniform" else found.reconstruction >= 0
    assert [(level.low, level.high) for level in found.levels] == [(i / 10, (i + 1) / 10) for i in range(10)]
    assert numbers(found).keys() == {f.name for f in dataclasses.fields(found)} - {
        "over",
        "levels",
        "likelihood",
        "caveat",
        "measures",
        "row_nats",
        "row_tokens",
    }
    assert sum(found.row_nats) / sum(found.row_tokens) == pytest.approx(found.nats_per_token, rel=1e-9)
    assert found.measures == {}  # a family's own measures are numbers too
    more = dataclasses.replace(found, measures={"rounding_accuracy": 0.75})
    assert numbers(more) == {**numbers(found), "rounding_accuracy": 0.75}
    assert more.curve() == {**found.curve(), "rounding_accuracy": 0.75}
    assert "rounding accuracy 75.0000%" in str(more)


@pytest.mark.parametrize("kind", ["masked_count", "nelbo"])
def test_an_even_guess_costs_log_v_at_every_share_of_masks(made: Callable[[str], tuple[Engine, Dataset]], kind: str) -> None:  # fmt: skip
    engine, data = made(kind)  # the head starts at nothing
    found = bounded(engine, data, batches=2, draws=1)
    for level in found.levels:
        assert level.nats_per_token == pytest.approx(math.log(LETTERS), rel=1e-5)
        assert level.standard_error < 1e-5
        assert (level.noised_low, level.noised_high) == (level.low, level.high)


def test_an_even_guess_under_uniform_noise(made: Callable[[str], tuple[Engine, Dataset]]) -> None:
    """Against the integrand by enumeration: GIDD's formula (arXiv 2503.04482) with x0 even, so that qhat = 1/N."""
    engine, data = made("uniform")
    found = bounded(engine, data, batches=8, draws=2)
    schedule, n = engine.process.schedule, LETTERS

    def integrand(t: np.ndarray) -> np.ndarray:
        times = torch.from_numpy(t).double()
        alpha = np.exp(-schedule.sigma(times).numpy())
        rate = schedule.dsigma(times).numpy() / n  # -alpha' / (N alpha)
        q = {True: alpha + (1 - alpha) / n, False: (1 - alpha) / n}  # at x0, and at each of the others
        many = {True: 1, False: n - 1}
        kl = sum(many[k] * q[k] * np.log(q[k] * n) for k in q)
        return sum(many[k] * rate * (kl + q[k] * n - 1 - np.log(q[k] * n)) for k in q)

    for level in found.levels:
        low = max(level.low, 1e-4)  # the objective's t_min
        expected = integrand(np.linspace(low, level.high, 20_001)[1:-1]).mean()
        assert level.standard_error < 0.2 * expected
        assert abs(level.nats_per_token - expected) < 4.5 * level.standard_error + 1e-9
        assert level.noised_high == pytest.approx(1 - math.exp(-schedule.sigma(torch.tensor([level.high])).item()), abs=2e-3)  # fmt: skip
    # below t_min: a token stays with probability 1 - hit, and is then taken for clean with this probability; on one row in eight
    hit = (1 - math.exp(-schedule.sigma(torch.tensor([1e-4])).item())) * (1 - 1 / n)
    expected = -(1 - hit) * math.log(1 - hit) - hit * math.log(hit / (n - 1))
    assert 0 < found.reconstruction < 6 * expected
