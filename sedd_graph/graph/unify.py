"""Shapes: axis names of a component or block against the sizes that come in, with messages that show what is bound so far.

Every dimension of every port is an equation, ``pattern = size``. One with a single unknown binds it; one with none is
checked; one with several waits until other ports have bound all but one of them, and :meth:`Binding.finish` refuses
what waits for ever. So no declared dimension goes unverified.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sedd_graph.component.axes import AxisError, Dim, PortType, Size
from sedd_graph.component.contract import Port
from sedd_graph.graph.location import Location

__all__ = ["Binding", "Mismatch"]


class Mismatch(Exception):
    """A port that does not fit; the message names the port, its pattern and the axes bound so far.

    ``at`` is where the port got its value, if that was given.
    """

    def __init__(self, message: str, at: Location | None = None) -> None:
        super().__init__(message)
        self.at = at


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """A port's pattern and the type that meets it."""

    label: str
    pattern: PortType
    actual: PortType
    at: Location | None

    def refuse(self, reason: str) -> Mismatch:
        return Mismatch(f"{self.label} wants {self.pattern}, but {self.actual} comes in{reason}", self.at)


@dataclasses.dataclass(frozen=True)
class _Equation:
    """One dimension: the ``wanted`` expression over own axis names is the ``size`` that comes in."""

    meeting: _Meeting
    wanted: Size
    size: Size


class Binding:
    """The axis values of one node, growing as its ports are unified."""

    def __init__(self, known: Mapping[str, Size] | None = None) -> None:
        self.axes: dict[str, Size] = dict(known or {})
        self.variadic: dict[str, tuple[Size, ...]] = {}
        self._waiting: list[_Equation] = []

    def unify(self, port: Port, actual: PortType, *, label: str = "", at: Location | None = None) -> None:
        """Hold ``actual`` (sizes of the blueprint) against ``port``'s pattern. Raises :class:`Mismatch`."""
        meeting = _Meeting(label or f"port {port.name!r}", port.type, actual, at)
        if actual.kind != port.type.kind:
            raise meeting.refuse(f": {port.type.kind} is not {actual.kind}")
        self._waiting += self._pair(meeting)
        self._settle()

    def finish(self, defaults: Mapping[str, Size] | None = None) -> None:
        """Give the axes that no port has bound their ``defaults``. Raises :class:`Mismatch` for what is open even then."""
        for name in sorted({s for e in self._waiting for s in e.wanted.symbols} - self.axes.keys()):
            if defaults and name in defaults:
                self.axes[name] = defaults[name]
        self._settle()
        for equation in self._waiting:
            free = " and ".join(sorted(equation.wanted.symbols - self.axes.keys()))
            raise equation.meeting.refuse(
                f": {equation.wanted} = {equation.size} cannot be solved for {free}; so far {self.shown()}"
            )

    def result(self, port: Port) -> PortType:
        """The type of an output. Raises :class:`Mismatch` naming the axes that nothing has bound."""
        what, dims = f"output {port.name!r} is {port.type}, but", list[Dim]()
        for dim in port.type.dims:
            if dim.variadic:
                if dim.variadic not in self.variadic:
                    raise Mismatch(f"{what} nothing says what *{dim.variadic} is: add 'out:'")
                dims += [Dim(s) for s in self.variadic[dim.variadic]]
                continue
            free = sorted(dim.size.symbols - self.axes.keys())
            if free:
                raise Mismatch(f"{what} nothing says how large {', '.join(free)} is: add 'out:' with its type")
            try:
                size = dim.size.substitute(self.axes)
            except AxisError as error:
                raise Mismatch(f"{what} {error}; {self.shown()}") from None
            if not _possible(size):
                raise Mismatch(f"{what} {dim.size} = {size}: a size is at least 1; {self.shown()}")
            dims.append(Dim(size))
        return PortType(port.type.kind, tuple(dims))

    def shown(self) -> str:
        """``b=batch, l=length, d=768``"""
        parts = [f"{n}={s}" for n, s in self.axes.items()]
        parts += [f"*{n}=({' '.join(map(str, v))})" for n, v in self.variadic.items()]
        return ", ".join(parts) or "nothing is bound"

    def _pair(self, meeting: _Meeting) -> list[_Equation]:
        """The dimensions of the pattern beside those that come in; what a star stands for is held to its other uses."""
        wanted, sizes = meeting.pattern.dims, [d.size for d in meeting.actual.dims]
        star = next((i for i, d in enumerate(wanted) if d.variadic), None)
        if star is None:
            if len(wanted) != len(sizes):
                counts = f" ({len(wanted)} axes), but {meeting.actual} comes in ({len(sizes)} axes)"
                raise Mismatch(f"{meeting.label} wants {meeting.pattern}{counts}", meeting.at)
        else:
            after = len(wanted) - star - 1
            if len(sizes) < star + after:
                counts = f" (at least {star + after} axes), but {meeting.actual} comes in"
                raise Mismatch(f"{meeting.label} wants {meeting.pattern}{counts}", meeting.at)
            name, middle = wanted[star].variadic or "", tuple(sizes[star : len(sizes) - after])
            if self.variadic.setdefault(name, middle) != middle:
                raise meeting.refuse(f"; so far {self.shown()}")
            wanted, sizes = wanted[:star] + wanted[star + 1 :], sizes[:star] + sizes[len(sizes) - after :]
        return [_Equation(meeting, dim.size, size) for dim, size in zip(wanted, sizes, strict=True)]

    def _settle(self) -> None:
        """Solve and check, in order, until what is left has several unknowns."""
        progress = True
        while progress:
            waiting, self._waiting = self._waiting, []
            self._waiting = [e for e in waiting if not self._solved(e)]
            progress = len(self._waiting) < len(waiting)

    def _solved(self, equation: _Equation) -> bool:
        wanted, size, refuse = equation.wanted, equation.size, equation.meeting.refuse
        try:
            # A question mark keeps an unknown of the component apart from the blueprint's axis of the same name.
            left = wanted.substitute({s: self.axes.get(s, Size.of(f"?{s}")) for s in wanted.symbols})
        except AxisError as error:
            raise refuse(f": {wanted}: {error}; so far {self.shown()}") from None
        unknown = [s for s in left.symbols if s.startswith("?")]
        if not unknown:
            if left != size:
                shown = str(wanted) if wanted == left else f"{wanted} = {left}"
                raise refuse(f": {shown}, not {size}; so far {self.shown()}")
            return True
        if len(unknown) > 1 or not _is_linear(left, unknown[0]):
            return False
        try:
            solved = _solve(left, unknown[0], size)
        except AxisError:
            solved = Size()
        if not _possible(solved):
            raise refuse(f": {size} does not fit {wanted}; so far {self.shown()}")
        self.axes[unknown[0][1:]] = solved
        return True


def _possible(size: Size) -> bool:
    """Whether it may be the size of an axis, as far as one can know before a step runs."""
    return size.constant is None or size.constant > 0


def _is_linear(left: Size, unknown: str) -> bool:
    """Whether ``unknown`` stands in one term of ``left`` only, and there once."""
    found = [monomial for monomial, _ in left.terms if unknown in monomial]
    return len(found) == 1 and found[0].count(unknown) == 1


def _solve(left: Size, unknown: str, size: Size) -> Size:
    """``unknown`` from ``left == size``. Raises :class:`AxisError` where the division leaves a rest."""
    term = next((m, c) for m, c in left.terms if unknown in m)
    factor = Size(((tuple(s for s in term[0] if s != unknown), term[1]),))
    return (size - Size(tuple(t for t in left.terms if t != term))) // factor
