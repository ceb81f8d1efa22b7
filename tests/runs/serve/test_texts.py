"""Text of tokens: drafts of incomplete characters, the end of a text, and what of an unfinished one will stay."""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from sedd_graph.runs.serve.metrics import Histogram
from sedd_graph.runs.serve.texts import Texts, safe_length


class Codec:
    """A run of whose tokens each is a byte; 256 is the end of the text, 257 the mask, and 258 padding."""

    class Tokenizer:
        end = 256

    def text_tokenizer(self) -> Any:
        return self.Tokenizer()

    def decode(self, rows: Any) -> list[str]:
        return [bytes(t for t in row.tolist() if t < 256).decode("utf-8", "replace") for row in rows]


@pytest.fixture
def texts() -> Texts:
    pieces: dict[int, bytes | None] = {n: bytes([n]) for n in range(256)}
    run: Any = Codec()
    return Texts(run, {**pieces, 257: None})


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_characters_of_several_tokens_are_with_their_last(texts: Texts) -> None:
    row = np.array([*ids("aé"), 257, *ids("€")[:2], 257, *ids("€"), 258, 258])
    assert texts.draft(row) == ["a", "", "é", None, "", "\N{REPLACEMENT CHARACTER}", None, "", "", "€"]
    assert texts.draft(np.array([258, 258])) == []
    for _ in range(200):  # whatever is visible reads as its bytes do
        rng = random.Random(_)
        row = np.array([rng.choice([*ids("aé€"), 257]) for _ in range(12)])
        found = texts.draft(row)
        assert [t is None for t in found] == (row == 257).tolist()
        runs = ["".join(map(str, g)) for hidden, g in itertools.groupby(found, lambda t: t is None) if not hidden]
        expected = [
            bytes(g).decode("utf-8", "replace")
            for hidden, g in itertools.groupby(row.tolist(), lambda t: t == 257)
            if not hidden
        ]
        assert runs == expected


def test_where_a_text_ends(texts: Texts) -> None:
    tokens = np.array([*ids("The cat"), 256, *ids("more")])
    given = np.arange(len(tokens)) < 4
    found = texts.written(tokens, given, ())
    assert (found.text, found.count, found.finish, found.whole) == ("cat", 3, "stop", "The cat")
    found = texts.written(tokens, given, ["at"])
    assert (found.text, found.finish) == ("c", "stop")
    found = texts.written(tokens[:7], given[:7], ["x"])
    assert (found.text, found.count, found.finish) == ("cat", 3, "length")
    given[-1] = True  # text after the hole: nothing is cut off
    found = texts.written(tokens, given, ())
    assert (found.text, found.count, found.finish) == ("catmor", 7, "length")
    assert found.parts == ("catmor",)
    none = texts.written(tokens[:4], given[:4], ())
    assert (none.text, none.parts, none.count) == ("", (), 0)


def test_a_stream_never_takes_back_what_it_sent(texts: Texts) -> None:
    rng = random.Random(0)
    for _ in range(500):
        data = ids("".join(rng.choice("abé€") for _ in range(8)))
        stops = ["ab", "aab", "€"][: rng.randint(0, 3)]
        sent = ""
        for size in range(1, len(data) + 1):
            given = np.zeros(size, np.bool_)
            found = texts.written(np.array(data[:size]), given, stops)
            last = size == len(data) or found.finish == "stop"
            end = len(found.text) if last else safe_length(found.text, stops)
            assert found.text.startswith(sent)
            sent = found.text[: max(end, len(sent))]
            if last:
                break
        assert sent == texts.written(np.array(data), np.zeros(len(data), np.bool_), stops).text


def test_histograms_count_as_prometheus_does() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 3):
        histogram.add(value)
    assert list(histogram.lines("h")) == [
        'h_bucket{le="1"} 2',
        'h_bucket{le="2.5"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 6.500000",
        "h_count 4",
    ]
