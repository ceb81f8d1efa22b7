"""Look-aheads at the start of a regular expression, against Python's ``re`` and by hand."""

import random
import re

import pytest
from sedd_graph_registry.data.tokenizers import Bytes

from sedd_graph.diffusion.conditions.automaton import compile_pattern
from sedd_graph.diffusion.conditions.pattern import PatternError
from sedd_graph.diffusion.conditions.token_automaton import spell
from tests.diffusion.test_automaton import written


def test_look_aheads_hold_where_those_of_re_hold() -> None:
    """``re`` writes ``\\Z`` for the end that is ``$`` here, since its ``$`` also stands before a last line break."""
    source, seen = random.Random(1), [0, 0]
    for _ in range(100):
        ours = theirs = ""
        for _ in range(source.randrange(1, 4)):
            sign, part, exact = source.choice("=!"), written(source, 2), source.random() < 0.5
            ours += f"(?{sign}(?:{part}){'$' if exact else ''})"
            theirs += f"(?{sign}(?:{part}){chr(92) + 'Z' if exact else ''})"
        body = f"(?:{written(source, 2)})" + source.choice(["", "*"])
        automaton, known = compile_pattern(ours + body), re.compile(theirs + body, re.ASCII)
        for _ in range(60):
            text = "".join(source.choice("abAé日\U0001f600.\n1 -]") for _ in range(source.randrange(5)))
            expected = known.fullmatch(text) is not None
            assert automaton.matches(text.encode()) is expected, (ours + body, text)
            seen[expected] += 1
    assert min(seen) > 150


def test_pairs_and_brackets_hold_together() -> None:
    """Each of three digits an even number of times, and brackets that close: one expression would be far longer."""
    pairs = "".join(f"(?=([^{d}]*{d}[^{d}]*{d})*[^{d}]*$)" for d in "123")
    automaton = compile_pattern(pairs + r"([a-c123]|\([a-c123]+\))+")
    for text, good in [
        ("a1bb1", True),
        ("a1b(c1)", True),
        ("a1b(c2)a2c1", True),
        ("a1b", False),
        ("a1(b2)1", False),
        ("a1(b1", False),
        ("3a3(b)", True),
    ]:
        assert automaton.matches(text.encode()) is good, text


def test_what_holds_of_no_text_is_reported_for_the_tokens() -> None:
    with pytest.raises(PatternError, match="no text of this model's tokens matches it"):
        spell(compile_pattern("(?=a)(?!a).*"), Bytes().pieces())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?=a|b$)c", "alternatives before '$' stand in a group"),
        ("(?=a$|b)c", "no anchors but '$' at the end of a look-ahead"),
        ("(?=a)b|c", "behind a look-ahead, alternatives stand in a group"),
        ("(?=a", "a look-ahead '(?' is never closed"),
        ("(?=a)*b", "a look-ahead cannot be repeated"),
        ("a(?=b)", "(?= and (?! at the start of the expression"),
        ("((?=a)b)", "(?= and (?! at the start of the expression"),
        ("(?<=a)b", "no other look-around"),
        ("(?=a$)$", "no anchors"),
        ("(?=a)" * 17 + "b", "more than 16 look-aheads"),
        ("(?=(a{101})*$)(?=(a{103})*$)a*", "has more than 10,000 states"),
    ],
)
def test_what_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(PatternError, match=re.escape(said)):
        compile_pattern(pattern)
