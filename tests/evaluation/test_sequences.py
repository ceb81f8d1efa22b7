"""Likelihoods of single sequences: against enumeration of all masks, without bias, and whatever the batch."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import sedd_graph
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.mask_sets import mask_sets
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import UserError
from sedd_graph.evaluation.sequences import Bound, Scored, score, windows

TINY = [
    "params.dim=16",
    "params.depth=1",
    "params.heads=2",
    "params.cond=8",
    "params.tokens=5",
    "data.tokenizer.size=5",
]


def shaken(made: Engine, size: float) -> Engine:
    """An untrained network with random weights, so that its predictions depend on the context."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return made


def engine(name: str, *changes: str) -> Engine:
    return shaken(sedd_graph.build(name, [*TINY, *changes], device="cpu", compile="off"), 0.3)


@pytest.fixture(scope="module")
def masked() -> Engine:
    return engine("mdlm-tiny", "objective={op: masked_count}", "data.length=16")


def enumerated(made: Engine, row: Scored) -> float:
    """The bound of a masked model by all sets of masks, from its logits alone."""
    n, total = len(row.tokens), 0.0
    clean = torch.tensor([[*row.context, *row.tokens]])
    for size in range(1, n + 1):
        for subset in itertools.combinations(range(len(row.context), clean.shape[1]), size):
            noisy = clean.clone()
            noisy[0, list(subset)] = 5
            sigma = -torch.log1p(-torch.tensor([min(size / n, 1 - 1e-3)]))
            feeds: dict[str, Any] = {"tokens": noisy, "sigma": sigma}
            with torch.no_grad(), made.network.evaluating():
                found: Mapping[str, torch.Tensor] = made.model.run(feeds, None)[0]
            nats = -found["log_x0"].log_softmax(-1)[0, list(subset)].gather(-1, clean[0, list(subset), None]).sum()
            total += float(nats) / size / math.comb(n, size)
    return total


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_sets_have_no_bias_and_are_exact_where_they_can_be(count: int) -> None:
    """The weighted mean of any function of the masks, against its mean over all masks of n positions."""
    free = np.array([False, True, True, True, True, False])
    table = np.random.default_rng(0).normal(size=2**6)

    def function(mask: np.ndarray) -> float:
        return float(table[int(mask @ (1 << np.arange(6)))])

    expected = 0.0
    for size in range(1, 5):
        for subset in itertools.combinations(range(1, 5), size):
            mask = np.zeros(6, bool)
            mask[list(subset)] = True
            expected += function(mask) / (4 * math.comb(4, size))
    found = []
    for seed in range(4000):
        sets = mask_sets(free, count, block=6, generator=np.random.default_rng(seed))
        assert not (sets.masks & ~free).any()
        found.append(np.mean([function(m) * f[0] for m, f in zip(sets.masks, sets.factors, strict=True)]))
    assert abs(np.mean(found) - expected) < 4.5 * np.std(found) / math.sqrt(len(found))
    if count == 7:
        three = mask_sets(free & (np.arange(6) < 4), 7, block=6, generator=np.random.default_rng(0))
        assert sorted(three.masks.sum(1)) == [1, 1, 1, 2, 2, 2, 3]
        assert np.allclose(three.factors[:, 0] * 3 * np.array([math.comb(3, k) for k in three.masks.sum(1)]), 7)


def test_short_sequences_are_exact(masked: Engine) -> None:
    rows = [Scored((1, 2, 3), (4,)), Scored((), (0, 3)), Scored((2,), (1, 4, 0)), Scored((), (2,))]
    for row, bound in zip(rows, score(masked, rows, draws=8, seed=0, at_once=4), strict=True):
        assert bound.standard_error == 0
        assert bound.nats == pytest.approx(enumerated(masked, row), rel=1e-5)


def test_estimates_are_unbiased_and_their_errors_true(masked: Engine) -> None:
    row = Scored((3, 1), (4, 0, 2, 2, 1, 3))
    found = [score(masked, [row], draws=8, seed=seed, at_once=8)[0] for seed in range(200)]
    values = np.array([bound.nats for bound in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - enumerated(masked, row)) < 4 * spread / math.sqrt(len(values))
    stated = math.sqrt(np.mean([bound.standard_error**2 for bound in found]))
    assert 0.8 < stated / spread < 1.25
    assert math.isnan(score(masked, [row], draws=1, seed=0, at_once=1)[0].standard_error)


def test_neither_the_other_sequences_nor_the_batch_size_matter(masked: Engine) -> None:
    generator = np.random.default_rng(0)
    rows = [Scored(tuple(generator.integers(5, size=int(generator.integers(4))).tolist()), tuple(generator.integers(5, size=int(generator.integers(1, 9))).tolist())) for _ in range(20)]  # fmt: skip
    together = score(masked, rows, draws=6, seed=1, at_once=16)
    for at_once, chosen in ((1, range(0, 20, 7)), (5, range(19, -1, -1))):
        again = score(masked, [rows[i] for i in chosen], draws=6, seed=1, at_once=at_once)
        for i, bound in zip(chosen, again, strict=True):
            assert bound.nats == pytest.approx(together[i].nats, rel=1e-5)
    assert [b.nats for b in score(masked, rows, draws=6, seed=2, at_once=16)] != [b.nats for b in together]


@pytest.mark.parametrize("name", ["sedd-tiny", "sedd-uniform-tiny", "bd3lm-tiny", "editflow-tiny"])
def test_other_processes_have_their_own_bounds(name: str) -> None:
    """Of 4 x 32 draws and of 512, within errors."""
    made = sedd_graph.build(name, device="cpu", compile="off")
    row = Scored(() if name == "editflow-tiny" else (5, 9, 7), (1, 2, 3, 4, 5, 6, 7))
    few = [score(made, [row], draws=32, seed=seed, at_once=64)[0] for seed in range(4)]
    many = score(made, [row], draws=512, seed=9, at_once=128)[0]
    assert few[0].tokens == 7
    error = math.hypot(many.standard_error, np.std([b.nats for b in few], ddof=1))
    assert abs(np.mean([b.nats for b in few]) - many.nats) < 4 * error + 1e-3
    assert 0.5 * 7 < many.nats < 7 * (40 if name == "editflow-tiny" else 12)


def test_blocks_are_exact_too_and_the_end_of_the_last_one_is_not_counted() -> None:
    """Three tokens in blocks of two, against all masks of each block, from logits alone."""
    made = shaken(
        sedd_graph.build("bd3lm-tiny", ["objective.block=2", "data.length=8"], device="cpu", compile="off"), 0.1
    )
    mask = made.process.kernel.mask
    clean = torch.tensor([[7, 3, 9, 0]])

    def cost(masked: list[int], counted: list[int]) -> float:
        """Cross-entropy of some masks; the position after the text is always masked."""
        noisy = clean.clone()
        noisy[0, [*masked, 3]] = mask
        with torch.no_grad(), made.network.evaluating():
            feeds = {k: v for k, v in block_inputs(noisy, clean, block=2).items() if k in made.model.input_names}
            found = made.model.run(feeds, None)[0]["log_x0"].log_softmax(-1)[0]
        return -sum(float(found[i, clean[0, i]]) for i in counted)

    first = (cost([0, 1], [0, 1]) / 2) + (cost([0], [0]) + cost([1], [1])) / 2
    whole, given = Scored((), (7, 3, 9)), Scored((7,), (3, 9))
    bounds = score(made, [whole, given], draws=6, seed=0, at_once=8)
    assert bounds[0].nats == pytest.approx(first + cost([2], [2]), rel=1e-5)
    assert bounds[1].nats == pytest.approx(cost([1], [1]) + cost([2], [2]), rel=1e-5)
    assert bounds[0].standard_error < 1e-6


@pytest.mark.parametrize("name", ["mdlm-tiny", "bd3lm-tiny", "sedd-tiny"])
def test_the_mean_over_rows_is_the_bound_that_evaluation_reports(name: str) -> None:
    made = shaken(sedd_graph.build(name, device="cpu", compile="off"), 0.1)
    count, length = 8, 32
    rows = torch.randint(made.process.kernel.data_tokens, (count, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), made.network.evaluating():
        repeated = made.process.batch(rows.repeat(32, 1), made.device)
        old = made.process.bound_rows(made.network, repeated, [range(len(repeated))], seeds=range(4)).numpy()
    bounds = score(made, [Scored((), tuple(row)) for row in rows.tolist()], draws=32, seed=1, at_once=64)
    error = math.hypot(old.std() / math.sqrt(len(old)), Bound.total(bounds).standard_error / count)
    assert abs(Bound.total(bounds).nats / count - old.mean()) < 4 * error


def test_a_context_that_a_process_cannot_hold_is_refused() -> None:
    made = sedd_graph.build("editflow-tiny", device="cpu", compile="off")
    with pytest.raises(UserError, match="spares no tokens"):
        score(made, [Scored((1,), (2,))], draws=2, seed=0, at_once=2)
    flow = sedd_graph.build("flow-tiny", device="cpu", compile="off")
    with pytest.raises(UserError, match="this model is of points"):
        score(flow, [Scored((), (2,))], draws=2, seed=0, at_once=2)


def test_windows_count_each_token_once() -> None:
    shapes = {
        (0, 5): [(0, 5)],
        (9, 5): [(3, 5)],
        (1, 20): [(1, 7), (0, 8), (3, 5)],
        (12, 20): [(4, 4), (0, 8), (0, 8)],
    }
    for (before, length), expected in shapes.items():
        context, text = range(before), range(100, 100 + length)
        found = windows(context, text, 8)
        assert [(len(row.context), len(row.tokens)) for row in found] == expected
        assert [token for row in found for token in row.tokens] == list(text)
        whole = (*context, *text)
        for row in found:
            at = whole.index(row.tokens[0])
            assert whole[at - len(row.context) : at] == row.context
