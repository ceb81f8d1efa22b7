"""Symbolic sizes and port types: exact integer polynomials over axis symbols, and ``float b l d``.

No evaluation of user text ever happens here: sizes come from a small bounded parser. No torch.

Axis glossary used throughout: b batch, l length, d model width, e conditioning width, v data tokens (+ mask), n states.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from sedd_graph.errors import UserError, listed, suggest

__all__ = ["DYNAMIC", "MAX_SIZE", "AxisError", "Dim", "PortType", "Size", "parse_port_type", "parse_size"]

DYNAMIC = ("batch", "length")
"""Symbols whose value is known only when a step runs."""

MAX_SIZE = 2**40
"""Sizes and coefficients stay below it."""
_MAX_TEXT, _MAX_DEPTH, _MAX_TERMS = 256, 16, 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([A-Za-z_][A-Za-z0-9_]*)|(//|[-+*()]))")


class AxisError(UserError):
    """A size expression or port type that cannot be read, or a size out of bounds."""


Monomial = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """An exact integer polynomial: ``terms`` maps a sorted tuple of symbols to a nonzero coefficient."""

    terms: tuple[tuple[Monomial, int], ...] = ()

    @staticmethod
    def of(value: int | str | Size) -> Size:
        """A constant, a symbol, or a Size itself."""
        if isinstance(value, Size):
            return value
        return Size._from({(): value} if isinstance(value, int) else {(value,): 1})

    @staticmethod
    def _from(terms: Mapping[Monomial, int]) -> Size:
        kept = {m: c for m, c in terms.items() if c}
        if len(kept) > _MAX_TERMS:
            raise AxisError(f"size expression has more than {_MAX_TERMS} terms")
        if any(abs(c) >= MAX_SIZE for c in kept.values()):
            raise AxisError("size is too large: the largest is 2**40")
        if any(len(m) > 8 for m in kept):
            raise AxisError("size expression multiplies more than 8 symbols")
        return Size(tuple(sorted(kept.items())))

    def __add__(self, other: int | str | Size) -> Size:
        out = dict(self.terms)
        for m, c in Size.of(other).terms:
            out[m] = out.get(m, 0) + c
        return Size._from(out)

    def __neg__(self) -> Size:
        return Size._from({m: -c for m, c in self.terms})

    def __sub__(self, other: int | str | Size) -> Size:
        return self + (-Size.of(other))

    def __mul__(self, other: int | str | Size) -> Size:
        out: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in Size.of(other).terms:
                m = tuple(sorted(m1 + m2))
                out[m] = out.get(m, 0) + c1 * c2
        return Size._from(out)

    def __floordiv__(self, other: int | str | Size) -> Size:
        """Exact division; :class:`AxisError` where it leaves a rest."""
        divisor = Size.of(other)
        if not divisor.terms:
            raise AxisError("division by zero in a size expression")
        if len(divisor.terms) != 1:
            raise AxisError(f"cannot divide by the sum {divisor}")
        (dm, dc), out = divisor.terms[0], {}
        for m, c in self.terms:
            rest = list(m)
            for symbol in dm:
                if symbol not in rest:
                    raise AxisError(f"{self} is not divisible by {divisor}")
                rest.remove(symbol)
            if c % dc:
                raise AxisError(f"{self} is not divisible by {divisor}")
            out[tuple(rest)] = c // dc
        return Size._from(out)

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(s for m, _ in self.terms for s in m)

    @property
    def constant(self) -> int | None:
        """The value where no symbol is left, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if self.terms[0][0] == () and len(self.terms) == 1 else None

    def substitute(self, env: Mapping[str, int | Size]) -> Size:
        """Replace the symbols that ``env`` knows."""
        if not any(s in env for s in self.symbols):
            return self
        total = Size()
        for m, c in self.terms:
            product = Size.of(c)
            for symbol in m:
                product = product * env.get(symbol, symbol)
            total = total + product
        return total

    def evaluate(self, env: Mapping[str, int]) -> int:
        """The integer under ``env``; :class:`AxisError` if a symbol is missing."""
        value = self.substitute(env).constant
        if value is None:
            missing = ", ".join(sorted(self.symbols - env.keys()))
            raise AxisError(f"size {self} needs a value for {missing}")
        return value

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        text = ""
        for m, c in sorted(self.terms, key=lambda t: (-len(t[0]), t[0])):
            body = "*".join(m)
            magnitude = str(abs(c)) if not m else body if abs(c) == 1 else f"{abs(c)}*{body}"
            text += (("-" if c < 0 else "") if not text else ("-" if c < 0 else "+")) + magnitude
        return text


Names = Iterable[str] | Mapping[str, "Size"] | None
"""The axes that an expression may use: any (None), those listed, or the keys of a mapping to sizes."""


class _Parser:
    def __init__(self, text: str, names: Names) -> None:
        self.text, self.names = text, None if names is None else list(names)
        self.sizes: Mapping[str, Size] = names if isinstance(names, Mapping) else {}
        if len(text) > _MAX_TEXT:
            raise AxisError(f"size expression is longer than {_MAX_TEXT} characters")
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if match is None:
                raise AxisError(
                    f"size {text!r}: unexpected {text[at:].strip()[:1]!r} (integers, axis names, + - * // and parentheses)"
                )
            kind = "int" if match[1] else "name" if match[2] else "op"
            self.tokens.append((kind, match[0].strip()))
            at = match.end()
        self.at = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def next(self) -> tuple[str, str]:
        if self.at >= len(self.tokens):
            raise AxisError(f"size {self.text!r}: something is missing at the end")
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> Size:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise AxisError(f"size {self.text!r}: nested deeper than {_MAX_DEPTH}")
        value = self.product()
        while self.peek() in ("+", "-"):
            op = self.next()[1]
            value = value + self.product() if op == "+" else value - self.product()
        self.depth -= 1
        return value

    def product(self) -> Size:
        value = self.atom()
        while self.peek() in ("*", "//"):
            op = self.next()[1]
            value = value * self.atom() if op == "*" else value // self.atom()
        return value

    def atom(self) -> Size:
        negative = False
        while self.peek() == "-":
            self.next()
            negative = not negative
        kind, text = self.next()
        if kind == "int":
            if len(text) > 13:
                raise AxisError(f"size {text[:12]}... is too large: the largest is 2**40")
            value = Size.of(int(text))
        elif kind == "name":
            if self.names is not None and text not in self.names:
                raise AxisError(f"unknown axis {text!r}{suggest(text, self.names)}; known: {listed(self.names)}")
            value = self.sizes.get(text, Size.of(text))
        elif text == "(":
            value = self.sum()
            if self.next()[1] != ")":
                raise AxisError(f"size {self.text!r}: a parenthesis is not closed")
        else:
            raise AxisError(f"size {self.text!r}: unexpected {text!r}")
        return -value if negative else value


def parse_size(text: str | int, names: Names = None) -> Size:
    """Read ``4*d`` or ``d//2``. ``names``, where given, are the axes that may be used.

    A mapping of names to sizes substitutes them, so that ``d//2`` can be evaluated for a known ``d``.
    Raises :class:`AxisError`.
    """
    if isinstance(text, int):
        return Size.of(text)
    parser = _Parser(text, names)
    if not parser.tokens:
        raise AxisError("a size is empty")
    value = parser.sum()
    if parser.at < len(parser.tokens):
        raise AxisError(f"size {text!r}: unexpected {parser.peek()!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of a port type: a size, or a variadic ``*s`` that stands for any number of dimensions."""

    size: Size
    variadic: str | None = None

    def __str__(self) -> str:
        return f"*{self.variadic}" if self.variadic else str(self.size)


Kind = Literal["float", "int", "bool"]


@dataclasses.dataclass(frozen=True)
class PortType:
    """What travels along an edge: a kind of number and its dimensions, such as ``float b l d``."""

    kind: Kind
    dims: tuple[Dim, ...]

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*(d.size.symbols for d in self.dims if not d.variadic)) if self.dims else frozenset()

    def __str__(self) -> str:
        return " ".join([self.kind, *map(str, self.dims)])


def parse_port_type(text: str, names: Names = None) -> PortType:
    """Read ``float b l d``: a kind, then dimensions apart by spaces, each a size or one ``*name``.

    ``names`` as in :func:`parse_size`. Raises :class:`AxisError`.
    """
    if len(text) > _MAX_TEXT:
        raise AxisError(f"port type is longer than {_MAX_TEXT} characters")
    parts = text.split()
    if not parts or parts[0] not in ("float", "int", "bool"):
        found = parts[0] if parts else ""
        raise AxisError(
            f"port type {text!r}: start with float, int or bool{suggest(found, ('float', 'int', 'bool'))}, "
            "then the axes, such as 'float b l d'"
        )
    if len(parts) > 9:
        raise AxisError(f"port type {text!r}: more than 8 dimensions")
    dims = []
    for part in parts[1:]:
        if part.startswith("*"):
            if not _NAME.fullmatch(part[1:]):
                raise AxisError(f"port type {text!r}: {part!r} is not a name after the star")
            dims.append(Dim(Size(), part[1:]))
        else:
            dims.append(Dim(parse_size(part, names)))
    if sum(d.variadic is not None for d in dims) > 1:
        raise AxisError(f"port type {text!r}: only one variadic dimension is allowed")
    kind: Kind = "float" if parts[0] == "float" else "int" if parts[0] == "int" else "bool"
    return PortType(kind, tuple(dims))
