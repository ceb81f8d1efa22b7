"""Regular expressions as automata: a small safe subset, over the bytes of UTF-8, in bounded time and size.

Own and not Python's ``re``, since what a sampler needs is the automaton (which texts can still match), and a pattern in a
blueprint must not be able to take for ever. A whole text is matched, so there are no anchors; nothing that is not
regular is known (look-around, back-references). No torch here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

__all__ = ["Automaton", "PatternError", "TokenAutomaton", "compile_pattern", "spell"]

Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points, ascending and apart."""

MAX_LENGTH, MAX_DEPTH, MAX_REPEAT = 4096, 64, 1000
MAX_PARTS = 50_000
"""States of the automaton before it is made deterministic."""
MAX_STATES = 10_000
MAX_WORK = 4_000_000
"""Moves looked at while it is made deterministic: a few seconds."""
MAX_TABLE = 2**26
"""States times tokens."""

EVERY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
SHORT: dict[str, Ranges] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": ((9, 13), (32, 32)),
}
CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


class PatternError(ValueError):
    """A pattern that cannot be used, in a sentence."""


# -- sets of characters -------------------------------------------------------------------------------------------------


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def complement(ranges: Ranges) -> Ranges:
    """All other characters; surrogates are none."""
    edges = [-1, *(edge for low, high in union((*ranges, (0xD800, 0xDFFF))) for edge in (low - 1, high)), 0x10FFFF]
    return tuple((a + 1, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def utf8_ranges(low: int, high: int) -> Iterable[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that spell just the characters from ``low`` to ``high``."""
    for top in (0x7F, 0x7FF, 0xFFFF):
        if low <= top < high:
            yield from utf8_ranges(low, top)
            yield from utf8_ranges(top + 1, high)
            return
    size = len(chr(low).encode("utf-8", "surrogatepass"))
    for i in range(1, size):
        span = (1 << 6 * i) - 1  # below a lead, the last i bytes must run through everything, or the lead stay
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


# -- reading a pattern --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Set:
    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Chain:
    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    part: Node
    low: int
    high: int | None


Node = Set | Chain | Choice | Repeat


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def refuse(self, why: str) -> NoReturn:
        raise PatternError(f"at character {min(self.at, len(self.text)) + 1} of {self.text[:60]!r}: {why}")

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, what: str) -> bool:
        found = self.text.startswith(what, self.at)
        self.at += len(what) * found
        return found

    def whole(self) -> Node:
        node = self.choice(0)
        if self.next:
            self.refuse("this ')' closes nothing; write \\) for the character")
        return node

    def choice(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self.refuse(f"groups lie more than {MAX_DEPTH} deep")
        parts = [self.chain(depth)]
        while self.take("|"):
            parts.append(self.chain(depth))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def chain(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.next and self.next not in "|)":
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def atom(self, depth: int) -> Node:
        if self.take("("):
            if self.next == "?" and not self.take("?:"):
                self.refuse("of groups that begin with (? only (?: is known: no look-around, no flags, no names")
            node = self.choice(depth + 1)
            if not self.take(")"):
                self.refuse("a '(' is never closed")
            return node
        if self.take("["):
            return Set(self.members())
        if self.take("."):
            return Set(complement(((10, 10),)))
        if self.next in "^$":
            self.refuse("the whole text is matched, so there are no anchors; write \\^ or \\$ for the characters")
        if self.next in "*+?{":
            self.refuse(f"there is nothing that {self.next!r} could repeat; write \\{self.next} for the character")
        return Set(self.character())

    def character(self) -> Ranges:
        """One character, or a class such as \\d."""
        if not self.take("\\"):
            code = ord(self.next)
            self.at += 1
            return ((code, code),)
        letter = self.next
        self.at += 1
        if letter.lower() in SHORT:
            return SHORT[letter.lower()] if letter.islower() else complement(SHORT[letter.lower()])
        if letter in CONTROL:
            code = ord(CONTROL[letter])
        elif letter and letter in "xuU":
            width = {"x": 2, "u": 4, "U": 8}[letter]
            digits = self.text[self.at : self.at + width]
            self.at += width
            if len(digits) < width or not set(digits) <= set("0123456789abcdefABCDEF"):
                self.refuse(f"\\{letter} needs {width} hexadecimal digits")
            code = int(digits, 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                self.refuse(f"\\{letter}{digits} is no character")
        elif not letter or (letter.isalnum() and letter.isascii()):
            self.at -= 1
            self.refuse(f"\\{letter} is not known; known are \\d \\w \\s \\D \\W \\S \\n \\t \\r \\f \\v \\xHH \\uHHHH")
        else:
            code = ord(letter)
        return ((code, code),)

    def members(self) -> Ranges:
        """The rest of a [class]."""
        negated, first = self.take("^"), True
        found: list[tuple[int, int]] = []
        while first or self.next != "]":
            if not self.next:
                self.refuse("a '[' is never closed")
            first = False
            low = self.character()
            if self.next == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.character()
                if low[0][0] != low[-1][1] or high[0][0] != high[-1][1] or low[0][0] > high[0][0]:
                    self.refuse("a range goes from one character to a later one; write \\- for the character")
                low = ((low[0][0], high[0][0]),)
            found += low
        self.at += 1
        return complement(union(found)) if negated else union(found)

    def repeated(self, node: Node) -> Node:
        while self.next and self.next in "*+?{":
            if self.take("{"):
                low, high = self.counts()
            else:
                low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.next]
                self.at += 1
            if self.next == "+":
                self.refuse("possessive repeats are not known")
            self.take("?")  # a lazy repeat matches the same whole texts
            node = Repeat(node, low, high)
            if self.next and self.next in "*+?{":
                self.refuse("a repeat of a repeat needs a group: (a*){2}")
        return node

    def counts(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        inside = self.text[self.at : end] if end >= 0 else ""
        low, comma, high = inside.partition(",")
        if not all(part.isascii() and (part.isdigit() or not part) and len(part) < 6 for part in (low, high)) or not (
            low or high
        ):
            self.refuse("a count is written {3}, {3,} or {3,5}; write \\{ for the character")
        least, most = int(low or 0), int(high) if high else (None if comma else int(low))
        if most is not None and most < least:
            self.refuse(f"{{{inside}}} counts down")
        if max(least, most or 0) > MAX_REPEAT:
            self.refuse(f"repeats go up to {MAX_REPEAT:,}")
        self.at = end + 1
        return least, most


# -- automata -----------------------------------------------------------------------------------------------------------


class _Parts:
    """A nondeterministic automaton (Thompson's): ``free`` moves cost nothing, ``moves`` a byte of a range."""

    def __init__(self) -> None:
        self.free: list[list[int]] = []
        self.moves: list[list[tuple[int, int, int]]] = []

    def new(self) -> int:
        if len(self.free) >= MAX_PARTS:
            raise PatternError(f"its repeats need more than {MAX_PARTS:,} parts; take smaller counts")
        self.free.append([])
        self.moves.append([])
        return len(self.free) - 1

    def add(self, node: Node, start: int) -> int:
        """Lay ``node`` out from ``start``; returns where it ends."""
        if isinstance(node, Chain):
            for part in node.parts:
                start = self.add(part, start)
            return start
        end = self.new()
        if isinstance(node, Choice):
            for part in node.parts:
                branch = self.new()
                self.free[start].append(branch)
                self.free[self.add(part, branch)].append(end)
        elif isinstance(node, Repeat):
            for _ in range(node.low):
                begin = self.new()
                self.free[start].append(begin)
                start = self.add(node.part, begin)
            if node.high is None:
                loop = self.new()
                self.free[start].append(loop)
                self.free[self.add(node.part, loop)].append(loop)
                self.free[loop].append(end)
            else:
                for _ in range(node.high - node.low):
                    self.free[start].append(end)
                    begin = self.new()
                    self.free[start].append(begin)
                    start = self.add(node.part, begin)
                self.free[start].append(end)
        else:
            for low, high in node.ranges:
                for spelled in utf8_ranges(low, high):
                    here = start
                    for first, last in spelled[:-1]:
                        after = self.new()
                        self.moves[here].append((first, last, after))
                        here = after
                    self.moves[here].append((*spelled[-1], end))
        return end


@dataclasses.dataclass(frozen=True)
class Automaton:
    """Deterministic, over bytes: ``after`` int32 [states + 1, 256], of which the last state is dead; 0 is the start.

    ``accepts`` bool [states + 1].
    """

    after: npt.NDArray[np.int32]
    accepts: npt.NDArray[np.bool_]

    def matches(self, text: bytes) -> bool:
        """Whether the whole of ``text`` matches."""
        state = 0
        for byte in text:
            state = int(self.after[state, byte])
        return bool(self.accepts[state])


def compile_pattern(pattern: str) -> Automaton:
    """The automaton of a regular expression. Raises :class:`PatternError`, in bounded time."""
    return _compiled(pattern)


@functools.lru_cache(maxsize=16)
def _compiled(pattern: str) -> Automaton:
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"it is longer than {MAX_LENGTH:,} characters")
    parts = _Parts()
    start = parts.new()
    end = parts.add(_Reader(pattern).whole(), start)
    return _deterministic(parts, start, end)


def _deterministic(parts: _Parts, start: int, end: int) -> Automaton:
    """Rabin and Scott's subsets."""
    work = 0

    def closed(states: Iterable[int]) -> frozenset[int]:
        nonlocal work
        found, todo = set(states), list(states)
        while todo:
            here = todo.pop()
            work += 1 + len(parts.free[here])
            for to in parts.free[here]:
                if to not in found:
                    found.add(to)
                    todo.append(to)
        # those without a move of their own say nothing more
        return frozenset(s for s in found if parts.moves[s] or s == end)

    edges = {0, 256} | {edge for moves in parts.moves for low, high, _ in moves for edge in (low, high + 1)}
    cuts = sorted(edges)
    place = {cut: i for i, cut in enumerate(cuts)}
    known = {closed([start]): 0}
    order = list(known)
    rows: list[list[int]] = []
    while len(rows) < len(order):
        into: list[set[int]] = [set() for _ in cuts[:-1]]
        for state in order[len(rows)]:
            for low, high, to in parts.moves[state]:
                work += place[high + 1] - place[low]
                for piece in range(place[low], place[high + 1]):
                    into[piece].add(to)
        row = []
        for targets in into:
            subset = closed(targets) if targets else frozenset()
            if work > MAX_WORK:
                raise PatternError("its automaton takes too long to make; take a simpler one")
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


@dataclasses.dataclass(frozen=True)
class TokenAutomaton:
    """An automaton over tokens: ``kind`` int64 [n] sorts tokens into those that lead to the same states everywhere,
    ``after`` int64 [states + 1, kinds], of which the last state is dead, 0 the start. ``accepts`` bool [states + 1].

    Every state but the last can be reached, and a text that matches be reached from it.
    """

    kind: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    accepts: npt.NDArray[np.bool_]

    def lengths(self, most: int, allowed: npt.NDArray[np.bool_]) -> list[int]:
        """Up to ``most``, how many tokens (of those ``allowed`` bool [n]) a text that matches can have."""
        kinds = np.unique(self.kind[allowed])
        here, found = np.zeros(len(self.accepts), bool), []
        here[0] = True
        for length in range(most + 1):
            if bool((here & self.accepts).any()):
                found.append(length)
            there = np.zeros_like(here)
            there[self.after[here][:, kinds]] = True
            there[-1] = False
            here = there
        return found


def spell(automaton: Automaton, pieces: Sequence[bytes | None]) -> TokenAutomaton:
    """``automaton`` over tokens that stand for ``pieces`` (None: for no text, and never part of one that matches).

    Raises :class:`PatternError` where the table would be too large, or nothing matches.
    """
    dead, count = len(automaton.after) - 1, len(pieces)
    if (dead + 1) * count > MAX_TABLE:
        raise PatternError(
            f"its automaton has {dead:,} states, too many for {count:,} tokens (at most {MAX_TABLE // count:,}); "
            "take a simpler one"
        )
    table = np.tile(np.arange(dead + 1, dtype=np.int32)[:, None], (1, count))
    table[:, [i for i, piece in enumerate(pieces) if piece is None]] = dead
    longest_first = sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: -len(pieces[i] or b""))
    spelled = [pieces[i] or b"" for i in longest_first]
    for place in range(len(spelled[0]) if spelled else 0):
        while len(spelled[-1]) <= place:
            spelled.pop()
        live = longest_first[: len(spelled)]
        table[:, live] = automaton.after[table[:, live], np.array([piece[place] for piece in spelled])]
    return _trimmed(table, automaton.accepts)


def _trimmed(table: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_]) -> TokenAutomaton:
    """What can be reached and can end, with tokens that do the same put together."""
    rng = np.random.default_rng(0)
    mix = rng.integers(2**63, size=len(table), dtype=np.int64)
    sums = np.zeros(table.shape[1], np.int64)
    for weight, row in zip(mix, table, strict=True):
        sums += weight * (row.astype(np.int64) + 1)  # wraps around: a hash of the column
    _, first, kind = np.unique(sums, return_index=True, return_inverse=True)
    after = table[:, first]
    if not np.array_equal(after[:, kind], table):  # two columns with one hash
        kind, after = np.arange(table.shape[1]), table
    dead = len(after) - 1
    reached, ends = np.arange(dead + 1) == 0, accepts.copy()
    while True:
        more = reached.copy()
        more[after[reached]] = True
        if np.array_equal(more, reached):
            break
        reached = more
    while True:
        more = ends | ends[after].any(1)
        if np.array_equal(more, ends):
            break
        ends = more
    kept = reached & ends
    kept[dead] = False
    if not kept[0]:
        raise PatternError("no text of this model's tokens matches it")
    name = np.full(dead + 1, int(kept.sum()))
    name[kept] = np.arange(int(kept.sum()))
    states = [*np.flatnonzero(kept), dead]
    return TokenAutomaton(kind.astype(np.int64), name[after[states]].astype(np.int64), accepts[states])
