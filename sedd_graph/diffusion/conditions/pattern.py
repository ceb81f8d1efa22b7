"""Parser of regular expressions without anchors or back-references, of bounded size; look-ahead stands at their start.

Every pattern of this subset describes a regular language, so it has a finite automaton (:mod:`.automaton`). Python's
``re`` neither exposes an automaton nor bounds its running time. Does not import torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NoReturn

__all__ = [
    "Ahead",
    "Chain",
    "Choice",
    "Expression",
    "Node",
    "PatternError",
    "Ranges",
    "Repeat",
    "Set",
    "complement",
    "parse",
    "union",
]

Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges (first, last) of code points, ascending, disjoint and not adjacent."""

MAX_LENGTH, MAX_DEPTH, MAX_REPEAT, MAX_AHEADS = 4096, 64, 1000, 16

SHORT: dict[str, Ranges] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": ((9, 13), (32, 32)),
}
COUNTS = re.compile(r"(?!,?\})([0-9]{0,5})(?:(,)([0-9]{0,5}))?\}")
CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


class PatternError(ValueError):
    """Error that a regular expression is malformed, has unsupported syntax or is too large; the message says where."""


def parse(pattern: str) -> Expression:
    """Return the syntax tree of a regular expression and of the look-aheads at its start.

    Args:
        pattern: The regular expression.

    Raises:
        PatternError: The pattern is too long or malformed, or has unsupported syntax.
    """
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"it is longer than {MAX_LENGTH:,} characters")
    return _Parser(pattern).whole()


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the union of inclusive code point ranges, sorted and merged."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def complement(ranges: Ranges) -> Ranges:
    """Return the ranges of all characters outside ``ranges``; surrogates (U+D800 to U+DFFF) are excluded."""
    edges = [-1, *(edge for low, high in union((*ranges, (0xD800, 0xDFFF))) for edge in (low - 1, high)), 0x10FFFF]
    return tuple((a + 1, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


@dataclasses.dataclass(frozen=True)
class Set:
    """Syntax tree node that matches one character.

    Attributes:
        ranges: Code points that match.
    """

    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Chain:
    """Syntax tree node of a concatenation.

    Attributes:
        parts: Nodes that match one after the other.
    """

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Syntax tree node of an alternation ``a|b``.

    Attributes:
        parts: Alternative nodes.
    """

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Syntax tree node of a repetition.

    Attributes:
        part: The repeated node.
        low: Smallest number of repetitions.
        high: Largest number of repetitions; None: unlimited.
    """

    part: Node
    low: int
    high: int | None


Node = Set | Chain | Choice | Repeat
"""A node of the syntax tree of a regular expression."""

ANYTHING = Repeat(Set(complement(())), 0, None)
"""Syntax tree that matches every text."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A look-ahead at the start of an expression: a condition on the whole text.

    Attributes:
        node: What the whole text matches.
        negated: True for ``(?!...)``: the whole text does not match ``node``.
    """

    node: Node
    negated: bool


@dataclasses.dataclass(frozen=True)
class Expression:
    """A regular expression: a syntax tree, and look-aheads that the text fulfils as well.

    Attributes:
        body: Syntax tree of the expression behind the look-aheads.
        aheads: The look-aheads, in order.
    """

    body: Node
    aheads: tuple[Ahead, ...]


class _Parser:
    """Recursive descent over the text of a pattern; each method consumes what it parses."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.looking = False
        self.bare = False  # the choice that was parsed last has alternatives outside of a group

    def refuse(self, why: str) -> NoReturn:
        raise PatternError(f"at character {min(self.at, len(self.text)) + 1} of {self.text[:60]!r}: {why}")

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, what: str) -> bool:
        found = self.text.startswith(what, self.at)
        self.at += len(what) * found
        return found

    def whole(self) -> Expression:
        aheads: list[Ahead] = []
        while self.text.startswith(("(?=", "(?!"), self.at):
            if len(aheads) >= MAX_AHEADS:
                self.refuse(f"there are more than {MAX_AHEADS} look-aheads")
            aheads.append(self.ahead())
        node = self.choice(0)
        if self.next:
            self.refuse("this ')' closes nothing; write \\) for the character")
        if aheads and isinstance(node, Choice) and self.bare:
            self.refuse("behind a look-ahead, alternatives stand in a group: (?=...)(?:a|b)")
        return Expression(node, tuple(aheads))

    def ahead(self) -> Ahead:
        """Parse a look-ahead: what the text begins with or, if it ends in ``$``, what the whole text is."""
        negated = self.text[self.at + 2] == "!"
        self.at += 3
        self.looking = True
        node = self.choice(1)
        self.looking = False
        if (exact := self.take("$")) and self.bare:
            self.refuse("alternatives before '$' stand in a group: (?=(?:a|b)$)")
        if not self.take(")"):
            self.refuse("a look-ahead '(?' is never closed")
        if self.next and self.next in "*+?{":
            self.refuse("a look-ahead cannot be repeated")
        return Ahead(node if exact else Chain((node, ANYTHING)), negated)

    def choice(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self.refuse(f"groups lie more than {MAX_DEPTH} deep")
        parts = [self.chain(depth)]
        while self.take("|"):
            parts.append(self.chain(depth))
        self.bare = len(parts) > 1
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def chain(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.next and self.next not in "|)" and not self.at_end(depth):
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def at_end(self, depth: int) -> bool:
        """Return True at the ``$`` that ends a look-ahead."""
        return self.looking and depth == 1 and self.text.startswith("$)", self.at)

    def atom(self, depth: int) -> Node:
        if self.take("("):
            if self.next == "?" and not self.take("?:"):
                self.refuse(
                    "of groups that begin with (? only (?: is known, and (?= and (?! at the start of the expression: "
                    "no other look-around, no flags, no names"
                )
            node = self.choice(depth + 1)
            if not self.take(")"):
                self.refuse("a '(' is never closed")
            return node
        if self.take("["):
            return Set(self.members())
        if self.take("."):
            return Set(complement(((10, 10),)))
        if self.next in "^$":
            self.refuse(
                "the whole text is matched, so there are no anchors but '$' at the end of a look-ahead; write \\^ or \\$ for the characters"
            )
        if self.next in "*+?{":
            self.refuse(f"there is nothing that {self.next!r} could repeat; write \\{self.next} for the character")
        return Set(self.character())

    def character(self) -> Ranges:
        """Parse one character, or a class such as \\d."""
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
        """Parse the rest of a [class] after its opening bracket."""
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
        """Parse the rest of a {count} after its opening brace."""
        found = COUNTS.match(self.text, self.at)
        if found is None:
            self.refuse("a count is written {3}, {3,} or {3,5}; write \\{ for the character")
        low, comma, high = found.groups()
        least, most = int(low or 0), int(high) if high else (None if comma else int(low))
        if most is not None and most < least:
            self.refuse(f"{{{found[0][:-1]}}} counts down")
        if max(least, most or 0) > MAX_REPEAT:
            self.refuse(f"repeats go up to {MAX_REPEAT:,}")
        self.at = found.end()
        return least, most
