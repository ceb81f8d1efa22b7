"""Estimates, entropy and repetition, by closed forms; MAUVE, by the law of disjoint histograms."""

import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from sedd_graph_registry.data.corpora import Text
from sedd_graph_registry.data.tokenizers import Characters, CharactersFactory, HuggingFace

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.errors import MissingExtraError
from sedd_graph.evaluation.estimate import mean, ratio
from sedd_graph.evaluation.mauve import mauve
from sedd_graph.evaluation.quality import diversity, documents, training_vocabulary
from sedd_graph.evaluation.text import distinct, repetition, unigram_entropy
from sedd_graph.evaluation.words import Vocabulary, words_of


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


def test_known_words() -> None:
    assert words_of("Don't, the2nd naïve_THE\n", cut=False) == ["don", "t", "the", "nd", "naïve", "the"]
    assert words_of("ut the mat. An", cut=True) == ["the", "mat"]
    assert words_of("(ut) the mat", cut=True) == ["ut", "the"]  # what touches no end is whole
    known = Vocabulary(frozenset({"the", "mat", "on"}), cut=True)
    # 2 of 2 words, 1 of 3, none: the ratio of totals, and its error by the delta method
    texts = [" the MAT ", " on a cat.", "matmat"]
    value = 3 / 5
    error = np.std([2 - 2 * value, 1 - 3 * value, 0], ddof=1) * math.sqrt(3) / 5
    assert known.share(texts) == pytest.approx((value, error))
    assert math.isnan(known.share(["the", "12"]).value)


@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_the_vocabulary_is_that_of_the_training_text(
    tmp_path: Path, rows: Literal["stream", "documents"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 4 rows, whose ends are in no word that is counted; in documents every word is whole."""
    monkeypatch.setattr("sedd_graph.evaluation.quality.BLOCK", 32)
    text = " ".join(f"{'ab'[n % 2] * (1 + n % 5)}{'xyz'[n % 3]}" for n in range(200))
    for number, part in enumerate([*text.split(" "), "held", "out", *["held"] * 20]):
        (tmp_path / f"{number:03d}.txt").write_text(part + " ")
    corpus = Text(Text.Config(files=["*.txt"]))
    config = DataConfig(corpus=corpus, tokenizer=CharactersFactory(CharactersFactory.Config()), length=8, rows=rows, holdout=0.1)  # fmt: skip
    data = open_data(config, root=tmp_path)
    found = training_vocabulary(data)
    assert found == Vocabulary(frozenset(text.split(" ")), cut=rows == "stream")
    held = data.heldout.take(np.arange(2), 0).tokens
    share = found.share([data.tokenizer.decode(row) for row in held])
    assert diversity(held, data.tokenizer, found)["known_words"] == pytest.approx(share.value, nan_ok=True)


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
