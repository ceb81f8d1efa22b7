"""Estimates, entropy and repetition, by closed forms; MAUVE, by the law of disjoint histograms."""

import math
import sys

import numpy as np
import pytest
from sedd_graph_registry.data.tokenizers import Characters, HuggingFace

from sedd_graph.errors import MissingExtraError
from sedd_graph.evaluation.estimate import mean, ratio
from sedd_graph.evaluation.mauve import mauve
from sedd_graph.evaluation.quality import diversity, documents
from sedd_graph.evaluation.text import distinct, repetition, unigram_entropy


def test_means_and_ratios() -> None:
    assert mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert ratio([2.0, 4.0, 12.0], [1, 2, 6]) == pytest.approx((2.0, 0.0))  # each at the same rate: no doubt of it
    assert ratio([5.0], [2]).value == 2.5
    assert math.isnan(ratio([5.0], [2]).standard_error)
    assert all(math.isnan(x) for x in (*ratio([], []), *ratio([0.0], [0]), *mean([])))


def test_the_error_of_a_ratio_is_how_much_it_varies() -> None:
    random = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(2000):
        counts = random.integers(1, 40, 150)
        value, error = ratio(random.gamma(2.0, 1.5, 150) * np.sqrt(counts) + counts, counts)
        found.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.05)


def test_entropy() -> None:
    rows = [np.array(row) for row in ([7] * 9, [1, 2, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1])]
    each = [0.0, math.log(2), math.log(5), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    for row, nats in zip(rows, each, strict=True):
        assert unigram_entropy([row]).value == pytest.approx(nats)
    found = unigram_entropy([*rows, np.array([], dtype=np.int64)])
    assert found == pytest.approx((np.mean(each), np.std(each, ddof=1) / 2))


def test_repetition() -> None:
    text = "a b  a\nb a"  # ab ba ab ba; aba bab aba; abab baba
    assert [repetition([text], n).value for n in (2, 3, 4)] == pytest.approx([1 / 2, 1 / 3, 0])
    assert repetition(["x y z x y"], 2).value == 1 / 4  # the last pair counts too
    assert repetition([text, "a b c", "a"], 2) == pytest.approx((1 / 4, 1 / 4))  # the last has no pair
    assert math.isnan(repetition(["a b", ""], 3).value)


def test_distinct() -> None:
    assert distinct(["a b a b a", "b a c"], 1) == 3 / 8
    assert distinct(["a b a b a", "b a c"], 2) == 3 / 8  # ab, ba, ac; over words, not pairs
    assert math.isnan(distinct(["", " "], 1))


def test_padding_and_separators_are_no_text() -> None:
    letters = Characters("ab c", 8)
    a, b, space = letters.encode("ab ").tolist()
    pad = letters.pad
    rows = np.array([[a, b, a, b, pad, pad], [a, space, a, space, b, pad]])
    assert documents(rows, letters) == [["abab"], ["a a b"]]
    found = diversity(rows, letters)
    assert found["entropy"] == pytest.approx((math.log(2) - (0.4 * math.log(0.4) * 2 + 0.2 * math.log(0.2))) / 2)
    assert found["distinct_1"] == 3 / 4
    assert found["rep_2"] == 0
    assert found["characters_per_row"] == 4.5


def test_rows_are_cut_at_separators() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    inner.decoder = tokenizers.decoders.Fuse()
    ours = HuggingFace(inner)
    assert ours.end == 2
    rows = np.array([[0, 1, 2, 1, 1], [2, 0, 0, 2, 2], [0, 1, 0, 1, 0]])
    assert documents(rows, ours) == [["ab", "bb"], ["aa"], ["ababa"]]
    third = diversity(rows[:1], ours)
    assert third["entropy"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert third["distinct_1"] == 1  # two documents are two words


def test_mauve_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    points = np.zeros((4, 2), np.float32)
    with pytest.raises(MissingExtraError, match=r"MAUVE needs the package 'mauve-text': pip install 'sedd_graph\[mauve\]'"):  # fmt: skip
        mauve(points, points)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # faiss, of its own bindings
def test_mauve_of_the_same_and_of_what_has_nothing_in_common() -> None:
    pytest.importorskip("mauve", reason="the extra 'mauve' is not installed")
    random = np.random.default_rng(0)
    here, there = (random.normal(size=(800, 4)).astype(np.float32) * 0.1 + place for place in (1, -1))
    same, apart = mauve(here, here), mauve(here, there)
    assert same["mauve"] == pytest.approx(1, abs=1e-6)
    assert same["mauve_clusters"] == 80
    # no cluster in common: the curve (w^5, (1 - w)^5), and under it 5 B(6, 5) = 1 / 252
    assert apart["mauve"] == pytest.approx(1 / 252, rel=0.1)
    assert 0.2 < mauve(here, np.concatenate([here[:400], there[:400]]))["mauve"] < 0.95
