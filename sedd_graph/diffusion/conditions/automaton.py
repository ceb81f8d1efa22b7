"""Compilation of regular expressions to deterministic finite automata over UTF-8 bytes, in bounded time and size.

Samplers need the automaton's states and transitions to find which texts can still match. A pattern from a blueprint
must not run without bound. The whole text must match, not a substring. Does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from sedd_graph.diffusion.conditions.intersection import Automaton, intersection
from sedd_graph.diffusion.conditions.pattern import Ahead, Chain, Choice, Node, PatternError, Repeat, parse

__all__ = ["Automaton", "compile_pattern", "utf8_ranges"]

MAX_PARTS = 50_000
"""Largest number of states of the nondeterministic automaton."""
MAX_STATES = 10_000
"""Largest number of states of the deterministic automaton."""
MAX_WORK = 4_000_000
"""Largest number of transitions examined by the subset construction, which takes a few seconds."""


def utf8_ranges(low: int, high: int) -> Iterable[tuple[tuple[int, int], ...]]:
    """Yield sequences of byte ranges that together match exactly the UTF-8 encodings of a range of code points.

    Args:
        low: First code point.
        high: Last code point, inclusive.

    Yields:
        One (first, last) byte range, inclusive, for each byte of an encoding.
    """
    for top in (0x7F, 0x7FF, 0xFFFF):
        if low <= top < high:
            yield from utf8_ranges(low, top)
            yield from utf8_ranges(top + 1, high)
            return
    size = len(chr(low).encode("utf-8", "surrogatepass"))
    for i in range(1, size):
        span = (1 << 6 * i) - 1  # the last i bytes must cover all values unless the bytes before them are constant
        if low & ~span != high & ~span:
            if low & span:
                yield from utf8_ranges(low, low | span)
                yield from utf8_ranges((low | span) + 1, high)
                return
            if high & span != span:
                yield from utf8_ranges(low, (high & ~span) - 1)
                yield from utf8_ranges(high & ~span, high)
                return
    first, last = (chr(c).encode("utf-8", "surrogatepass") for c in (low, high))
    yield tuple(zip(first, last, strict=True))


class _Nfa:
    """A nondeterministic automaton, built by Thompson's construction.

    ``free[state]`` lists the states reached without input; ``moves[state]`` lists (first byte, last byte, next state).
    """

    def __init__(self) -> None:
        self.free: list[list[int]] = []
        self.moves: list[list[tuple[int, int, int]]] = []

    def new(self) -> int:
        """Add a state and return it."""
        if len(self.free) >= MAX_PARTS:
            raise PatternError(f"its repeats need more than {MAX_PARTS:,} parts; take smaller counts")
        self.free.append([])
        self.moves.append([])
        return len(self.free) - 1

    def branch(self, start: int) -> int:
        """Add a state that is reached from ``start`` without input, and return it."""
        state = self.new()
        self.free[start].append(state)
        return state

    def add(self, node: Node, start: int) -> int:
        """Add the states that match ``node``, from ``start`` on; return the state at the end of the match."""
        if isinstance(node, Chain):
            for part in node.parts:
                start = self.add(part, start)
            return start
        end = self.new()
        if isinstance(node, Choice):
            for part in node.parts:
                self.free[self.add(part, self.branch(start))].append(end)
        elif isinstance(node, Repeat):
            for i in range(node.low if node.high is None else node.high):
                if i >= node.low:
                    self.free[start].append(end)
                start = self.add(node.part, self.branch(start))
            if node.high is None:
                start = self.branch(start)
                self.free[self.add(node.part, start)].append(start)
            self.free[start].append(end)
        else:
            for low, high in node.ranges:
                for *leads, last in utf8_ranges(low, high):
                    here = start
                    for first_byte, last_byte in leads:
                        after = self.new()
                        self.moves[here].append((first_byte, last_byte, after))
                        here = after
                    self.moves[here].append((*last, end))
        return end


@functools.lru_cache(maxsize=16)
def compile_pattern(pattern: str) -> Automaton:
    """Return the deterministic automaton of a regular expression, in bounded time. Results are cached.

    Args:
        pattern: The regular expression.

    Raises:
        PatternError: The pattern is malformed or has unsupported syntax, or its automaton is too large.
    """
    found, work = parse(pattern), _Work()
    body = _of_node(found.body, work)
    if not found.aheads:
        return body
    return intersection([body, *(_of_ahead(ahead, work) for ahead in found.aheads)], most=MAX_STATES, spend=work.spend)


class _Work:
    """Counter of transitions that the compilation of one pattern examines, with a limit."""

    def __init__(self) -> None:
        self.done = 0

    def spend(self, count: int) -> None:
        """Count ``count`` transitions; raises :class:`PatternError` beyond :data:`MAX_WORK`."""
        self.done += count
        if self.done > MAX_WORK:
            raise PatternError("its automaton takes too long to make; take a simpler one")


def _of_node(node: Node, work: _Work) -> Automaton:
    """Return the deterministic automaton of a syntax tree."""
    nfa = _Nfa()
    start = nfa.new()
    return _deterministic(nfa, start, nfa.add(node, start), work)


def _of_ahead(ahead: Ahead, work: _Work) -> Automaton:
    """Return the automaton of the texts that fulfil a look-ahead; its last state may accept."""
    found = _of_node(ahead.node, work)
    return Automaton(found.after, ~found.accepts) if ahead.negated else found


def _deterministic(nfa: _Nfa, start: int, end: int, work: _Work) -> Automaton:
    """Return the deterministic automaton of ``nfa``, by Rabin and Scott's subset construction."""

    def closure(states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            here = todo.pop()
            work.spend(1 + len(nfa.free[here]))
            for to in nfa.free[here]:
                if to not in found:
                    found.add(to)
                    todo.append(to)
        # a state that reads nothing and does not end a match adds nothing
        return frozenset(s for s in found if nfa.moves[s] or s == end)

    edges = {0, 256} | {edge for moves in nfa.moves for low, high, _ in moves for edge in (low, high + 1)}
    cuts = sorted(edges)
    place = {cut: i for i, cut in enumerate(cuts)}
    known = {closure([start]): 0}
    order = list(known)
    rows: list[list[int]] = []
    while len(rows) < len(order):
        into: list[set[int]] = [set() for _ in cuts[:-1]]
        for state in order[len(rows)]:
            for low, high, to in nfa.moves[state]:
                work.spend(place[high + 1] - place[low])
                for piece in range(place[low], place[high + 1]):
                    into[piece].add(to)
        row = []
        for targets in into:
            subset = closure(targets) if targets else frozenset()
            if subset and subset not in known:
                if len(order) >= MAX_STATES:
                    raise PatternError(f"its automaton has more than {MAX_STATES:,} states; take a simpler one")
                known[subset] = len(order)
                order.append(subset)
            row.append(known[subset] if subset else -1)
        rows.append(row)
    after = np.full((len(rows) + 1, 256), len(rows), np.int32)
    for state, row in enumerate(rows):
        for piece, to in enumerate(row):
            if to >= 0:
                after[state, cuts[piece] : cuts[piece + 1]] = to
    return Automaton(after, np.array([*(end in subset for subset in order), False]))
