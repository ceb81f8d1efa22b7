"""The paired test of two runs, against scipy."""

import numpy as np
import pytest
from scipy import stats

from sedd_graph.evaluation.paired import RowBounds, difference, row_bounds


def bounds(seed: int, shift: float = 0.0, data: str = "text") -> RowBounds:
    generator = np.random.default_rng(seed)
    hard = np.random.default_rng(0).normal(100, 20, 400)  # rows differ more than models
    return RowBounds(hard + shift + generator.normal(0, 2, 400), np.full(400, 32), {"corpus": data})


def test_rows_of_equal_length_give_the_paired_t_test() -> None:
    one, other = bounds(1), bounds(2, shift=0.4)
    found, true = difference(one, other), stats.ttest_rel(one.nats / 32, other.nats / 32)
    assert found is not None
    assert found.nats_per_token == pytest.approx((one.nats - other.nats).mean() / 32)
    assert found.nats_per_token / found.standard_error == pytest.approx(true.statistic)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(true.statistic)))
    assert found.p_value < 0.05 < stats.ttest_ind(one.nats, other.nats).pvalue  # unpaired, the difference is lost


def test_the_error_covers_the_truth_where_rows_differ_in_length() -> None:
    inside = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        tokens = generator.integers(10, 60, 200)
        noise = (tokens * 0.05 + generator.normal(0, 1, 200) * np.sqrt(tokens)).astype(np.float64)
        found = difference(RowBounds(noise, tokens, {}), RowBounds(np.zeros(200), tokens, {}))
        assert found is not None
        inside += abs(found.nats_per_token - 0.05) < 1.96 * found.standard_error
    assert 0.91 < inside / 300 < 0.985


def test_other_rows_are_not_compared() -> None:
    assert difference(bounds(1), bounds(2, data="other")) is None
    assert difference(bounds(1), RowBounds(bounds(2).nats, np.full(400, 33), {"corpus": "text"})) is None


def test_equal_bounds_are_no_difference() -> None:
    found = difference(bounds(1), bounds(1))
    assert found is not None
    assert (found.nats_per_token, found.p_value) == (0.0, 1.0)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"row_nats": [1.0, "x"], "row_tokens": [1, 1], "protocol": {"data": {}}},
        {"row_nats": [1.0, 2.0], "row_tokens": [1], "protocol": {"data": {}}},
        {"row_nats": [1.0, None], "row_tokens": [1, 1], "protocol": {"data": {}}},
        {"row_nats": [1.0, 2.0], "row_tokens": [1, 1], "protocol": {"data": 3}},
    ],
)
def test_damaged_content_counts_as_none(content: dict[str, object]) -> None:
    assert row_bounds(content) is None
