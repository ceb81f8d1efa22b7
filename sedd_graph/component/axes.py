"""Symbolic tensor sizes (integer polynomials over axis names) and port types such as ``float b l d``. Imports no torch.

Expressions in a blueprint are never passed to ``eval``: a small parser with bounded input reads them.

Axis names in the shipped blueprints: b batch, l length, d model width, e width of the conditioning vector, v
vocabulary of the network's output (data tokens, and the mask if the kernel has one). Kernels have an axis n of all
token states: n = v in token processes, and n = v + 1 in string processes, whose BOS token has no network output.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Literal

from sedd_graph.errors import UserError, listed, suggest

__all__ = ["DYNAMIC", "MAX_SIZE", "AxisError", "Dim", "PortType", "Size", "parse_port_type", "parse_size"]

DYNAMIC = ("batch", "length")
"""Names of the axes whose size is known only when the network runs."""

MAX_SIZE = 2**40
"""Exclusive upper bound of the absolute value of each integer coefficient in a :class:`Size`, constants included."""
_MAX_TEXT, _MAX_DEPTH, _MAX_TERMS = 256, 16, 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"\s*(?:([0-9]+|[A-Za-z_][A-Za-z0-9_]*|//|[-+*()])|(\S))")  # a token, or an unexpected character


class AxisError(UserError):
    """Exception for an invalid size expression or port type, or for a size out of bounds."""


Monomial = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """Exact integer polynomial over axis names, such as ``4*d+1``.

    Arithmetic raises :class:`AxisError` when a coefficient reaches :data:`MAX_SIZE` or there are too many terms or
    factors.
    """

    terms: tuple[tuple[Monomial, int], ...] = ()
    """Sorted pairs (monomial, nonzero coefficient). A monomial is a sorted tuple of axis names: ``("d", "d")`` is d
    squared."""

    @staticmethod
    def of(value: int | str | Size) -> Size:
        """Convert an integer (a constant) or an axis name to a Size; return a Size unchanged."""
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
        """Return the exact quotient.

        Raises :class:`AxisError` if the divisor is zero, has more than one term, or leaves a remainder.
        """
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
        """Axis names that occur in the polynomial."""
        return frozenset(s for m, _ in self.terms for s in m)

    @property
    def constant(self) -> int | None:
        """Integer value of a polynomial without axis names; None for any other polynomial."""
        return None if self.symbols else sum(coefficient for _, coefficient in self.terms)

    def substitute(self, env: Mapping[str, int | Size]) -> Size:
        """Return the polynomial in which each axis name that is a key of ``env`` is replaced by its value there."""
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
        """Return the value of the polynomial for the axis sizes ``env``.

        Raises :class:`AxisError` if a size is missing.
        """
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
"""Axis names that an expression may use: None for any name, an iterable of names, or a mapping from names to the sizes
that replace them."""


class _Parser:
    def __init__(self, text: str, names: Names) -> None:
        self.text, self.names = text, None if names is None else list(names)
        self.sizes: Mapping[str, Size] = names if isinstance(names, Mapping) else {}
        if len(text) > _MAX_TEXT:
            raise AxisError(f"size expression is longer than {_MAX_TEXT} characters")
        found = _TOKEN.findall(text)
        for _, unexpected in found:
            if unexpected:
                known = "integers, axis names, + - * // and parentheses"
                raise AxisError(f"size {text!r}: unexpected {unexpected!r} ({known})")
        self.tokens: list[str] = [token for token, _ in found]
        self.at = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
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
            op = self.next()
            value = value + self.product() if op == "+" else value - self.product()
        self.depth -= 1
        return value

    def product(self) -> Size:
        value = self.atom()
        while self.peek() in ("*", "//"):
            op = self.next()
            value = value * self.atom() if op == "*" else value // self.atom()
        return value

    def atom(self) -> Size:
        sign = 1
        while (text := self.next()) == "-":
            sign = -sign
        if text.isdigit():
            if len(text) > 13:
                raise AxisError(f"size {text[:12]}... is too large: the largest is 2**40")
            value = Size.of(int(text))
        elif text.isidentifier():
            if self.names is not None and text not in self.names:
                raise AxisError(f"unknown axis {text!r}{suggest(text, self.names)}; known: {listed(self.names)}")
            value = self.sizes.get(text, Size.of(text))
        elif text == "(":
            value = self.sum()
            if self.next() != ")":
                raise AxisError(f"size {self.text!r}: a parenthesis is not closed")
        else:
            raise AxisError(f"size {self.text!r}: unexpected {text!r}")
        return value * sign


def parse_size(text: str | int, names: Names = None) -> Size:
    """Parse a size expression such as ``4*d`` or ``d//2``.

    Args:
        text: The expression; an integer is a constant.
        names: Axis names that the expression may use; None for any. A mapping also replaces each name by its size, so
            that ``d//2`` can be divided for a known ``d``.

    Raises:
        AxisError: The expression is invalid, uses an unknown axis, or is out of bounds.
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
    """One dimension of a port type: a size, or a variadic ``*s``, which matches any number of dimensions."""

    size: Size
    variadic: str | None = None
    """Name after the star of a variadic dimension, whose ``size`` is unused; None for a dimension with a size."""

    def __str__(self) -> str:
        return f"*{self.variadic}" if self.variadic else str(self.size)


Kind = Literal["float", "int", "bool"]


@dataclasses.dataclass(frozen=True)
class PortType:
    """Type of the tensors at a port (a named input or output), such as ``float b l d``.

    It consists of an element kind (float, int or bool) and dimensions.
    """

    kind: Kind
    dims: tuple[Dim, ...]

    @property
    def symbols(self) -> frozenset[str]:
        """Axis names that occur in the sizes of the dimensions."""
        return frozenset(symbol for dim in self.dims for symbol in dim.size.symbols)

    def __str__(self) -> str:
        return " ".join([self.kind, *map(str, self.dims)])


def parse_port_type(text: str, names: Names = None) -> PortType:
    """Parse a port type such as ``float b l d``: an element kind, then dimensions separated by spaces.

    Args:
        text: The port type. Each dimension is a size expression; one of them may be variadic, ``*name``.
        names: Axis names that the sizes may use, as in :func:`parse_size`.

    Raises:
        AxisError: The port type is invalid, or one of its sizes is.
    """
    if len(text) > _MAX_TEXT:
        raise AxisError(f"port type is longer than {_MAX_TEXT} characters")
    first, *rest = text.split() or [""]
    kind = next((k for k in typing.get_args(Kind) if k == first), None)
    if kind is None:
        near = suggest(first, typing.get_args(Kind))
        raise AxisError(
            f"port type {text!r}: start with float, int or bool{near}, then the axes, such as 'float b l d'"
        )
    if len(rest) > 8:
        raise AxisError(f"port type {text!r}: more than 8 dimensions")
    dims = []
    for part in rest:
        if part.startswith("*"):
            if not _NAME.fullmatch(part[1:]):
                raise AxisError(f"port type {text!r}: {part!r} is not a name after the star")
            dims.append(Dim(Size(), part[1:]))
        else:
            dims.append(Dim(parse_size(part, names)))
    if sum(d.variadic is not None for d in dims) > 1:
        raise AxisError(f"port type {text!r}: only one variadic dimension is allowed")
    return PortType(kind, tuple(dims))
