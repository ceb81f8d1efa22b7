"""Films: what is decoded again by other code is the trajectory; small, bounded, and whole under odd tokens."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedd_graph_registry.data.tokenizers import Bytes

from sedd_graph.report.edit_script import MOST, gaps
from sedd_graph.report.film import BYTES, FRAMES, POSITIONS, ROWS, UNKNOWN, Symbols, Track, film_data
from tests.report.films import frames_of

MASK, START = 257, 258


def unmasked(steps: int, length: int, *, states: int = 256, seed: int = 0) -> tuple[Any, Any]:
    """A trajectory under an absorbing kernel, with confidences."""
    random = np.random.default_rng(seed)
    when, tokens = random.integers(1, steps, length), random.integers(0, states, length)
    now = np.arange(steps)[:, None] >= when
    sure = np.where(now, random.integers(0, 255, length), UNKNOWN).astype(np.uint8)
    return np.where(now, tokens, MASK), sure


def shown(film: Any, row: int = 0) -> list[list[tuple[Any, int]]]:
    """Words and confidences; a mask is its symbol."""
    words = film["words"]
    return [[("mask" if s == film["mask"] else words[s], c) for s, c in frame] for frame in frames_of(film, row)]


def word(token: int) -> Any:
    return "mask" if token == MASK else chr(token) if token < 128 else [token]


def test_a_film_is_decoded_to_the_trajectory() -> None:
    tracks = [Track(str(seed), *unmasked(40, 33, seed=seed)) for seed in range(3)]
    film = film_data(tracks, Symbols(Bytes(), mask=MASK))
    assert film["steps"] == list(range(40))
    assert [row["name"] for row in film["rows"]] == ["0", "1", "2"]
    for number, track in enumerate(tracks):
        assert track.confidence is not None
        expected = [
            [(word(t), c) for t, c in zip(tokens, sure, strict=True)]
            for tokens, sure in zip(track.tokens.tolist(), track.confidence.tolist(), strict=True)
        ]
        assert shown(film, number) == expected
    without = film_data([Track("", tracks[0].tokens)], Symbols(Bytes(), mask=MASK))
    assert not without["confident"]
    assert [[w for w, _ in f] for f in shown(without)] == [[w for w, _ in f] for f in shown(film)]


def test_rows_whose_length_changes_are_decoded_to_their_strings() -> None:
    random = np.random.default_rng(0)
    rows, sure = [[97, 98]], [[UNKNOWN, UNKNOWN]]
    for _ in range(80):
        row, own = list(rows[-1]), list(sure[-1])
        for _ in range(random.integers(0, 6)):
            at = int(random.integers(0, len(row) + 1))
            match int(random.integers(0, 4)):
                case 0 if row:
                    at = min(at, len(row) - 1)
                    del row[at], own[at]
                case 1 if row:
                    row[at % len(row)] = int(random.choice([97, 98, MASK]))
                    own[at % len(own)] = int(random.integers(0, 256))
                case _:
                    row.insert(at, int(random.choice([97, 98, MASK])))
                    own.insert(at, int(random.integers(0, 256)))
        rows.append(row)
        sure.append(own)
    width = max(map(len, rows))
    tokens = np.array([row + [START] * (width - len(row)) for row in rows])
    confidence = np.array([own + [UNKNOWN] * (width - len(own)) for own in sure], dtype=np.uint8)
    film = film_data([Track("", tokens, confidence)], Symbols(Bytes(), mask=MASK, start=START))
    assert shown(film) == [[(word(t), c) for t, c in zip(r, s, strict=True)] for r, s in zip(rows, sure, strict=True)]


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_an_edit_script_is_the_shortest(one: list[int], other: list[int]) -> None:
    """As many tokens are kept as the longest common subsequence has, which dynamic programming finds."""
    found = gaps(np.array(one, np.int64), np.array(other, np.int64))
    x = y = kept = 0
    for start, stop, new_start, new_stop in found:
        assert one[x:start] == other[y:new_start]
        kept, x, y = kept + start - x, stop, new_stop
    assert one[x:] == other[y:]
    table = np.zeros((len(one) + 1, len(other) + 1), np.int64)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert kept + len(one) - x == table[-1, -1]


def test_of_rows_that_differ_everywhere_the_middle_is_replaced() -> None:
    one, other = np.arange(2 * MOST), np.arange(2 * MOST)[::-1] + 10_000
    assert gaps(np.array([7, *one, 8]), np.array([7, *other, 8])) == [(1, 1 + 2 * MOST, 1, 1 + 2 * MOST)]


@pytest.mark.parametrize("kind", ["masked", "uniform", "everything"])
def test_a_film_of_256_steps_and_1024_tokens_is_small(kind: str) -> None:
    random = np.random.default_rng(0)
    if kind == "masked":
        tokens, sure = unmasked(257, 1024)
    else:
        share = 0.02 if kind == "uniform" else 1.0
        tokens = random.integers(0, 256, (257, 1024))
        for i in range(1, 257):
            tokens[i] = np.where(random.random(1024) < share, tokens[i], tokens[i - 1])
        sure = random.integers(0, 255, tokens.shape).astype(np.uint8)
        for i in range(1, 257):
            sure[i] = np.where(tokens[i] != tokens[i - 1], sure[i], sure[i - 1])
    film = film_data([Track("", tokens, sure)], Symbols(Bytes(), mask=MASK))
    size = len(json.dumps(film))
    assert size < {"masked": 25_000, "uniform": 60_000, "everything": BYTES}[kind] * 1.05
    frames = frames_of(film)
    assert len(frames) == len(film["steps"])
    assert len(frames) == 257 if kind != "everything" else len(frames) >= 64
    assert [c for _, c in frames[-1]] == sure[-1].tolist()


def test_bounds() -> None:
    many = [Track(str(i), np.full((3, 4), 97)) for i in range(ROWS + 5)]
    assert len(film_data(many, Symbols(Bytes()))["rows"]) == ROWS
    long = film_data([Track("", np.full((5 * FRAMES, 2), 97))], Symbols(Bytes()))
    assert len(long["steps"]) == FRAMES
    assert long["steps"][0] == 0
    assert long["steps"][-1] == 5 * FRAMES - 1
    wide = film_data([Track("", np.full((2, POSITIONS + 9), 97))], Symbols(Bytes()))
    assert {len(frame) for frame in frames_of(wide)} == {POSITIONS}


def test_tokens_that_are_no_text_are_told_apart() -> None:
    tokens = np.array([[0xC3, 0xA9, 256, 257, 97, 5_000_000, -7]])
    film = film_data([Track("", tokens)], Symbols(Bytes(), mask=MASK, pad=256))
    assert [w for w, _ in shown(film)[0]] == [[0xC3], [0xA9], "", "mask", "a", None, None]
