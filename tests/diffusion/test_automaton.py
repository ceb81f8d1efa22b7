"""Regular expressions against Python's ``re``, and patterns made to take for ever."""

import random
import re
import time

import numpy as np
import pytest
from sedd_graph_registry.data.tokenizers import Bpe, Bytes, Characters

from sedd_graph.diffusion.conditions.automaton import compile_pattern, utf8_ranges
from sedd_graph.diffusion.conditions.pattern import PatternError, complement
from sedd_graph.diffusion.conditions.token_automaton import spell
from sedd_graph.errors import UserError
from tests.conftest import ROOT


def written(random_: random.Random, depth: int) -> str:
    """A pattern over a few characters of one, two, three and four bytes."""
    kind = random_.randrange(8 if depth else 3)
    if kind < 2:
        return random_.choice(["a", "b", "é", "日", "\\U0001f600", "\\.", "\\n", "\\x41"])
    if kind == 2:
        return random_.choice([".", "\\d", "\\W", "[ab]", "[^a]", "[^é-日]", "[a-é]", "[]b-]", "[\\s\\-1]"])
    if kind < 5:
        return "".join(written(random_, depth - 1) for _ in range(random_.randrange(4)))
    if kind == 5:
        return "(" + "|".join(written(random_, depth - 1) for _ in range(random_.randrange(1, 4))) + ")"
    return (
        "(?:"
        + written(random_, depth - 1)
        + ")"
        + random_.choice(["*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{0,3}"])
    )


def test_patterns_match_what_re_matches() -> None:
    source, seen = random.Random(0), [0, 0]
    for _ in range(400):
        pattern = written(source, 3)
        automaton, known = compile_pattern(pattern), re.compile(pattern, re.ASCII)
        for _ in range(40):
            text = "".join(source.choice("abAé日\U0001f600.\n1 -]") for _ in range(source.randrange(6)))
            expected = known.fullmatch(text) is not None
            assert automaton.matches(text.encode()) is expected, (pattern, text)
            seen[expected] += 1
    assert min(seen) > 1000


def test_utf8_is_spelled_to_the_edge() -> None:
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    inside = [0x55, 0x300, 0x1234, 0xFEDC, 0x12345]
    for low in edges + inside:
        for high in edges + inside:
            if low <= high and not (low <= 0xD7FF < high):
                spelled = list(utf8_ranges(low, high))
                for code in {*edges, *inside, low, high, max(0, low - 1), min(0x10FFFF, high + 1)} - {0xD800, 0xDFFF}:
                    text = chr(code).encode()
                    found = sum(len(s) == len(text) and all(a <= b <= c for (a, c), b in zip(s, text, strict=True)) for s in spelled)  # fmt: skip
                    assert found == (low <= code <= high)
    assert complement(((0, 0x10FFFF),)) == ()
    assert not compile_pattern(".").matches(b"\xed\xa0\x80")  # a surrogate
    assert not compile_pattern(".*").matches(b"\xff")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a|b)*a(a|b){40}", "has more than 10,000 states"),
        ("(((a{1000}){1000}){1000}){1000}", "more than 50,000 parts"),
        ("((){1000}){1000}", "more than 50,000 parts"),
        ("(.{1,30}){1,30}", "takes too long to make"),
        ("(" * 70 + "a" + ")" * 70, "groups lie more than 64 deep"),
        ("a" * 5000, "longer than 4,096 characters"),
        ("a{1001}", "at character 3 of 'a{1001}': repeats go up to 1,000"),
        ("a{2", "a count is written {3}, {3,} or {3,5}"),
        ("a{3,2}", "counts down"),
        ("a**", "needs a group"),
        ("a*+", "possessive"),
        ("*a", "nothing that '*' could repeat"),
        ("^a", "no anchors"),
        ("a$", "no anchors"),
        ("a(?=b)", "no other look-around"),
        ("(?P<x>a)", "no names"),
        (r"(a)\1", r"\1 is not known"),
        (r"\bword", r"\b is not known"),
        ("a\\", r"\ is not known"),
        (r"\xg0", r"\x needs 2 hexadecimal digits"),
        (r"\ud800", r"\ud800 is no character"),
        ("[a", "a '[' is never closed"),
        ("[b-a]", "a range goes from"),
        (r"[\d-z]", "a range goes from"),
        ("(a", "a '(' is never closed"),
        ("a)", "closes nothing"),
    ],
)
def test_what_is_refused_and_that_it_is_at_once(pattern: str, said: str) -> None:
    began = time.perf_counter()
    with pytest.raises(PatternError, match=re.escape(said)):
        compile_pattern(pattern)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(?:a?){200}a{200}", "(x+x+)+y", "(.*a){40}"])
def test_what_backtracks_for_ever_elsewhere_does_not_here(pattern: str) -> None:
    automaton = compile_pattern(pattern)
    assert not automaton.matches(b"x" * 100_000)
    assert len(automaton.after) < 2000


def test_tokens_of_every_tokenizer_walk_as_their_text_does() -> None:
    text = "the cat sat on the mat; the dog sat on the log. " * 50 + "naïve café 日本 \U0001f600"
    bpe = Bpe(Bpe.Config(size=320)).make([text], root=ROOT)
    assert bpe.end is not None
    for tokenizer in (Characters.train([text], 40), Bytes(), bpe):
        pieces = tokenizer.pieces()
        assert len(pieces) == tokenizer.size
        for ids in (tokenizer.encode("the café sat. 日本"), np.arange(tokenizer.size)):
            whole = [i for i in ids.tolist() if pieces[i] is not None]
            assert b"".join(pieces[i] or b"" for i in whole).decode("utf-8", "replace") == tokenizer.decode(whole)
        automaton = spell(compile_pattern(r"(the|[a-z]+ )[^x]*(\.|日本)"), pieces)
        state = 0
        for i in tokenizer.encode("the café sat. 日本"):
            state = int(automaton.after[state, automaton.kind[i]])
        assert bool(automaton.accepts[state])
    assert bpe.pieces()[bpe.end] == b"<|endoftext|>"


def test_tokens_without_a_text_of_their_own_are_refused() -> None:
    import tokenizers
    from sedd_graph_registry.data.tokenizers import HuggingFace
    from tokenizers import decoders, models

    inner = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##known": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="decodes by 'WordPiece'"):
        HuggingFace(inner).pieces()


def test_lengths_and_what_can_never_match() -> None:
    pieces = [b"a", b"b", b"ab", None]
    automaton = spell(compile_pattern("(ab){2,3}"), pieces)
    assert automaton.lengths(10, np.ones(4, bool)) == [2, 3, 4, 5, 6]
    assert automaton.lengths(10, np.array([True, True, False, True])) == [4, 6]
    with pytest.raises(PatternError, match="no text of this model's tokens"):
        spell(compile_pattern("x"), pieces)
    with pytest.raises(PatternError, match="too many for 1,000,000 tokens"):
        spell(compile_pattern("[a-c]{100}"), [b"a"] * 1_000_000)
