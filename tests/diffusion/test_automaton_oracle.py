"""Automata of random regular expressions beside those of interegular: the same language, exactly, and the same lengths."""

import random
import re
from typing import Any

import interegular
import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from interegular.fsm import anything_else

from sedd_graph.diffusion.conditions.automaton import Automaton, compile_pattern
from sedd_graph.diffusion.conditions.pattern import PatternError
from sedd_graph.diffusion.conditions.token_automaton import spell

Both = tuple[str, str]
"""One regular expression as this project writes it, and as interegular does, which knows neither \\u nor [] with ] first."""

EDGES = "\x00\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"
"""Characters at the edges of the lengths of UTF-8, and of the surrogates."""
CHARACTERS = st.sampled_from("aabbcz09_AZ \n\r\t-]^.*{}(|\\é日\U0001f600" + EDGES)
SHORT = st.sampled_from([(name, name) for name in (r"\d", r"\D", r"\w", r"\W", r"\s", r"\S")])

POSITIVE = SHORT.filter(lambda both: both[0].islower())


def escaped(character: str) -> str:
    """How interegular reads a character, in and outside of a class."""
    return character if character.isalnum() or ord(character) > 127 or ord(character) < 32 else "\\" + character


@st.composite
def characters(draw: st.DrawFn, inside: bool = False) -> Both:
    character = draw(CHARACTERS)
    code, forms = ord(character), [f"\\U{ord(character):08x}"]
    if code < 0x10000:
        forms.append(f"\\u{code:04X}")
    if code < 0x100:
        forms.append(f"\\x{code:02x}")
    if character in "\n\r\t":
        forms.append({"\n": r"\n", "\r": r"\r", "\t": r"\t"}[character])
    if character not in ("\\]^-" if inside else r"\.*+?{}()[]|^$"):
        forms.append(character)
    if not (character.isalnum() and character.isascii()):
        forms.append("\\" + character)
    return draw(st.sampled_from(forms)), escaped(character)


@st.composite
def spans(draw: st.DrawFn) -> Both:
    """A range in a class, of at most 40 characters (interegular lists them), often over an edge."""
    low = draw(st.sampled_from([ord(c) for c in "a0éZ" + EDGES[:-1] if c != "\ud7ff"]))
    low = max(0, low - draw(st.integers(0, 20)))
    high = low + draw(st.integers(0, 20))
    if low <= 0xDFFF and high >= 0xD800:
        high, low = 0xD7FF, min(low, 0xD7FF)
    ours = "-".join(draw(st.sampled_from([f"\\u{c:04x}", f"\\U{c:08x}"]) if c < 0x10000 else st.just(f"\\U{c:08x}")) for c in (low, high))  # fmt: skip
    return ours, f"{escaped(chr(low))}-{escaped(chr(high))}"


@st.composite
def classes(draw: st.DrawFn) -> Both:
    # interegular takes the union of two negated classes for their intersection: at most one of them
    items = draw(st.lists(characters(inside=True) | spans() | POSITIVE, max_size=4)) + draw(st.lists(SHORT, max_size=1))
    assume(items)
    negated = "^" * draw(st.booleans())
    first, last = draw(st.booleans()), draw(st.booleans())
    ours = negated + "]" * first + "".join(a for a, _ in items) + "-" * last
    return f"[{ours}]", f"[{negated}{chr(92) + ']' if first else ''}{''.join(b for _, b in items)}{chr(92) + '-' if last else ''}]"  # fmt: skip


@st.composite
def repeats(draw: st.DrawFn, inner: st.SearchStrategy[Both]) -> Both:
    ours, theirs = draw(inner)
    low, high = sorted(draw(st.tuples(st.integers(0, 3), st.integers(0, 3))))
    count = draw(st.sampled_from(["*", "+", "?", f"{{{low}}}", f"{{{low},}}", f"{{,{high}}}", f"{{{low},{high}}}"]))
    lazy = "?" * draw(st.booleans())
    return f"(?:{ours}){count}{lazy}", f"(?:{theirs}){count}{lazy}"


@st.composite
def groups(draw: st.DrawFn, inner: st.SearchStrategy[Both]) -> Both:
    parts, opened = draw(st.lists(inner, min_size=1, max_size=3)), draw(st.sampled_from(["(", "(?:"]))
    return opened + "|".join(a for a, _ in parts) + ")", opened + "|".join(b for _, b in parts) + ")"


@st.composite
def chains(draw: st.DrawFn, inner: st.SearchStrategy[Both]) -> Both:
    parts = draw(st.lists(inner, max_size=3))
    return "".join(a for a, _ in parts), "".join(b for _, b in parts)


PATTERNS: st.SearchStrategy[Both] = st.recursive(
    characters() | classes() | SHORT | st.just((".", ".")),
    lambda inner: repeats(inner) | groups(inner) | chains(inner),
    max_leaves=8,
)


def representatives(fsm: Any) -> list[str]:
    """Characters such that each other one is treated as one of them: those that interegular lists, and beside them."""
    codes = {ord(c) + by for c in (*fsm.alphabet, *EDGES) if c is not anything_else for by in (-1, 0, 1)}
    return [chr(c) for c in sorted(codes) if 0 <= c <= 0x10FFFF and not 0xD800 <= c <= 0xDFFF]


def step(automaton: Automaton, state: int, character: str) -> int:
    for byte in character.encode():
        state = int(automaton.after[state, byte])
    return state


def product(automaton: Automaton, fsm: Any, characters: list[str]) -> nx.DiGraph:
    """The graph of pairs (state here, state of interegular, None where it is dead) that texts lead to."""
    start = (0, fsm.initial)
    graph: nx.DiGraph = nx.DiGraph()
    todo = [start]
    graph.add_node(start)
    while todo:
        here, there = todo.pop()
        for character in characters:
            move = fsm.alphabet[character if character in fsm.alphabet else anything_else]
            after = (step(automaton, here, character), None if there is None else fsm.map.get(there, {}).get(move))
            if after not in graph:
                todo.append(after)
            graph.add_edge((here, there), after)
    return graph


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(PATTERNS, st.randoms(use_true_random=False))
@example((r"a[^\d\D]*b[^\s\S]", r"a[^\d\D]*b[^\s\S]"), random.Random(0))  # empty
@example((r"(a|[^\d\D]+)([^\w\W]*|b)", r"(a|[^\d\D]+)([^\w\W]*|b)"), random.Random(0))  # finite
@example((r"(?:[ab]{2,})?(?:){3}", r"(?:[ab]{2,})?(?:){3}"), random.Random(0))  # infinite
def test_languages_are_those_of_interegular(both: Both, source: random.Random) -> None:
    pattern, theirs = both
    letters = compare(pattern, interegular.parse_pattern(theirs).to_fsm())
    automaton = compile_pattern(pattern)
    for _ in range(5):  # by the way in which samplers use it, and by a third library
        text = "".join(source.choices(letters, k=source.randrange(7)))
        assert automaton.matches(text.encode()) is (re.fullmatch(theirs, text, re.ASCII) is not None), (pattern, text)


AHEAD = st.tuples(st.booleans(), st.booleans(), PATTERNS)
"""Negated, on the whole text, expression."""


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(AHEAD, min_size=1, max_size=2), PATTERNS)
def test_look_aheads_are_intersections(aheads: list[tuple[bool, bool, Both]], body: Both) -> None:
    pattern, fsm = "", interegular.parse_pattern(body[1]).to_fsm()
    for negated, whole, (ours, theirs) in aheads:
        pattern += f"(?{'!' if negated else '='}(?:{ours}){'$' if whole else ''})"
        other = interegular.parse_pattern(theirs if whole else rf"(?:{theirs})[\s\S]*").to_fsm()
        fsm = fsm - other if negated else fsm & other
    compare(f"{pattern}(?:{body[0]})", fsm)


def compare(pattern: str, fsm: Any) -> list[str]:
    """Assert that the automaton of a pattern accepts the language of interegular's, and knows its lengths.

    Returns:
        Representatives of all characters.
    """
    automaton, letters = compile_pattern(pattern), representatives(fsm)
    graph = product(automaton, fsm, letters)
    for here, there in graph:  # the two agree on every text: no pair accepts on one side only
        assert bool(automaton.accepts[here]) is (there in fsm.finals), pattern
    final = [pair for pair in graph if pair[1] in fsm.finals]
    if fsm.empty():
        assert not final
        with pytest.raises(PatternError, match="no text of this model's tokens matches"):
            spell(automaton, [bytes([value]) for value in range(256)])
        return letters
    # lengths in characters, were each token a character; finite languages end
    live = graph.subgraph(set().union(*(nx.ancestors(graph, pair) | {pair} for pair in final)))
    tokens = spell(automaton, [character.encode() for character in letters])
    most = len(live) + 2
    lengths = tokens.lengths(most, np.ones(len(letters), bool))
    assert lengths == [n for n in range(most + 1) if has_length(fsm, n)], pattern
    assert (lengths[-1] < len(live)) is nx.is_directed_acyclic_graph(live), pattern
    return letters


def has_length(fsm: Any, length: int) -> bool:
    """True if interegular's automaton accepts a text of this many characters."""
    states = {fsm.initial}
    for _ in range(length):
        states = {after for state in states for after in fsm.map.get(state, {}).values()}
    return bool(states & set(fsm.finals))
