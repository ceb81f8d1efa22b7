"""Unification of port types: binds the axis names in a node's port types to the sizes of its input values.

Each dimension of a port gives an equation ``expression = size``. An equation without unknowns is verified, one with a
single unknown binds that unknown, and one with several waits until all but one are bound by other ports.
:meth:`Binding.finish` raises an error if an equation remains unsolved, so that every dimension is verified. Messages
show the axes bound so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sedd_graph.blueprint.location import Location
from sedd_graph.component.axes import AxisError, Dim, PortType, Size
from sedd_graph.component.contract import Port

__all__ = ["Binding", "Mismatch"]


class Mismatch(Exception):
    """Exception for a port whose type does not match the value that feeds it, or (for an output) its declared type.

    The message contains the port, its type and the axes bound so far.

    Args:
        message: The message.
        at: Location of the edge into the port, or of the declared type of an output; None if neither is at fault, so
            that the problem is reported at the node.
    """

    def __init__(self, message: str, at: Location | None = None) -> None:
        super().__init__(message)
        self.at = at


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """The type of a port, a pattern over axis names, and the actual type of the value that feeds it."""

    label: str
    pattern: PortType
    actual: PortType
    at: Location | None

    def refuse(self, reason: str) -> Mismatch:
        return Mismatch(f"{self.label} expects {self.pattern}, but receives {self.actual}{reason}", self.at)


@dataclasses.dataclass(frozen=True)
class _Equation:
    """One dimension: the ``wanted`` expression over axis names of the port equals the actual ``size``."""

    meeting: _Meeting
    wanted: Size
    size: Size


class Binding:
    """Sizes of the axis names in one node's port types, bound step by step as the ports are unified.

    Args:
        known: Sizes that are known before any port is unified, such as those set by Config fields; None for none.
    """

    def __init__(self, known: Mapping[str, Size] | None = None) -> None:
        self.axes: dict[str, Size] = dict(known or {})
        self.variadic: dict[str, tuple[Size, ...]] = {}
        self._waiting: list[_Equation] = []

    def unify(self, port: Port, actual: PortType, *, label: str = "", at: Location | None = None) -> None:
        """Unify the type of a port with an actual type, which binds axis names to sizes.

        Args:
            port: The port. Its type is the pattern: its axis names, such as ``b l d``, are bound to the sizes of
                ``actual``.
            actual: Type of the value that feeds an input port, or declared type of an output port. Its sizes are
                numbers or expressions in ``batch`` and ``length``.
            label: Description of the port in messages; ``port 'NAME'`` if empty.
            at: Location of the edge or of the declared type, for messages; None: messages refer to the node.

        Raises:
            Mismatch: The types do not match.
        """
        meeting = _Meeting(label or f"port {port.name!r}", port.type, actual, at)
        if actual.kind != port.type.kind:
            raise meeting.refuse(f": {port.type.kind} is not {actual.kind}")
        self._waiting += self._pair(meeting)
        self._settle()

    def finish(self, defaults: Mapping[str, Size] | None = None) -> None:
        """Bind the remaining axis names to their ``defaults``, and verify all dimensions that were unified.

        Each dimension of a port gives an equation between the port's expression in axis names and the actual size, such
        as ``2*d = 768``.

        Args:
            defaults: Sizes for axis names that no port has bound, by name; None for none.

        Raises:
            Mismatch: An equation cannot be solved or does not hold.
        """
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
        """Return the type of an output port, with axis names replaced by their bound sizes.

        Raises:
            Mismatch: An axis of ``port`` is unbound, or a size is not positive.
        """
        what, dims = f"output {port.name!r} is {port.type}, but", list[Dim]()
        for dim in port.type.dims:
            if dim.variadic:
                if dim.variadic not in self.variadic:
                    raise Mismatch(f"{what} *{dim.variadic} is not determined: add 'out:' with its type")
                dims += [Dim(s) for s in self.variadic[dim.variadic]]
                continue
            free = sorted(dim.size.symbols - self.axes.keys())
            if free:
                raise Mismatch(f"{what} the size of {', '.join(free)} is not determined: add 'out:' with its type")
            try:
                size = dim.size.substitute(self.axes)
            except AxisError as error:
                raise Mismatch(f"{what} {error}; {self.shown()}") from None
            if not _possible(size):
                raise Mismatch(f"{what} {dim.size} = {size}: a size is at least 1; {self.shown()}")
            dims.append(Dim(size))
        return PortType(port.type.kind, tuple(dims))

    def shown(self) -> str:
        """Return the axes bound so far as text, such as ``b=batch, l=length, d=768``."""
        parts = [f"{n}={s}" for n, s in self.axes.items()]
        parts += [f"*{n}=({' '.join(map(str, v))})" for n, v in self.variadic.items()]
        return ", ".join(parts) or "nothing is bound"

    def _pair(self, meeting: _Meeting) -> list[_Equation]:
        """Return an equation per dimension. The dimensions that a star matches must equal those of its other uses."""
        wanted, sizes = meeting.pattern.dims, [d.size for d in meeting.actual.dims]
        star = next((i for i, d in enumerate(wanted) if d.variadic), None)
        if star is None:
            if len(wanted) != len(sizes):
                raise meeting.refuse(f": {len(wanted)} axes, not {len(sizes)}")
        else:
            after = len(wanted) - star - 1
            if len(sizes) < star + after:
                raise meeting.refuse(f": at least {star + after} axes, not {len(sizes)}")
            name, middle = wanted[star].variadic or "", tuple(sizes[star : len(sizes) - after])
            if self.variadic.setdefault(name, middle) != middle:
                raise meeting.refuse(f"; so far {self.shown()}")
            wanted, sizes = wanted[:star] + wanted[star + 1 :], sizes[:star] + sizes[len(sizes) - after :]
        return [_Equation(meeting, dim.size, size) for dim, size in zip(wanted, sizes, strict=True)]

    def _settle(self) -> None:
        """Solve and verify equations, in order, until each that is left has several unknowns."""
        progress = True
        while progress:
            waiting, self._waiting = self._waiting, []
            self._waiting = [e for e in waiting if not self._solved(e)]
            progress = len(self._waiting) < len(waiting)

    def _solved(self, equation: _Equation) -> bool:
        wanted, size, refuse = equation.wanted, equation.size, equation.meeting.refuse
        try:
            # a question mark tells an unknown of the component from the blueprint's axis of the same name
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
    """Return False for a size that is known not to be positive."""
    return size.constant is None or size.constant > 0


def _is_linear(left: Size, unknown: str) -> bool:
    """Return True where ``unknown`` occurs once in ``left``."""
    found = [monomial for monomial, _ in left.terms if unknown in monomial]
    return len(found) == 1 and found[0].count(unknown) == 1


def _solve(left: Size, unknown: str, size: Size) -> Size:
    """Return ``unknown`` from ``left == size``. Raises :class:`AxisError` where the division leaves a remainder."""
    term = next((m, c) for m, c in left.terms if unknown in m)
    factor = Size(((tuple(s for s in term[0] if s != unknown), term[1]),))
    return (size - Size(tuple(t for t in left.terms if t != term))) // factor
