"""Shapes: a component's own axis names against the sizes that come in, with messages that show what is bound so far."""

from __future__ import annotations

from collections.abc import Mapping

from sedd_graph.axes import AxisError, Dim, PortType, Size
from sedd_graph.contract import Port

__all__ = ["Binding", "Mismatch"]


class Mismatch(Exception):
    """A port that does not fit; the message names the port, its pattern and the axes bound so far."""


class Binding:
    """The axis values of one node, growing as its ports are unified."""

    def __init__(self, known: Mapping[str, Size] | None = None) -> None:
        self.axes: dict[str, Size] = dict(known or {})
        self.variadic: dict[str, tuple[Size, ...]] = {}
        self._waiting: list[tuple[str, PortType, Size, Size, PortType]] = []

    def unify(self, port: Port, actual: PortType, *, label: str = "") -> None:
        """Hold ``actual`` (global sizes) against ``port``'s pattern. Raises :class:`Mismatch`."""
        where = label or f"port {port.name!r}"
        pattern = port.type
        if actual.kind != pattern.kind:
            raise Mismatch(f"{where} wants {pattern}, but {actual} comes in: {pattern.kind} is not {actual.kind}")
        for wanted, size in self._pair(where, pattern, actual):
            self._one(where, pattern, wanted, size, actual)
        self.settle()

    def _pair(self, where: str, pattern: PortType, actual: PortType) -> list[tuple[Size, Size]]:
        dims, sizes = pattern.dims, [d.size for d in actual.dims]
        star = next((i for i, d in enumerate(dims) if d.variadic), None)
        if star is None:
            if len(dims) != len(sizes):
                raise Mismatch(f"{where} wants {pattern} ({len(dims)} axes), but {actual} comes in ({len(sizes)} axes)")
            return list(zip([d.size for d in dims], sizes, strict=True))
        after = len(dims) - star - 1
        if len(sizes) < star + after:
            raise Mismatch(f"{where} wants {pattern} (at least {star + after} axes), but {actual} comes in")
        name, middle = dims[star].variadic or "", tuple(sizes[star : len(sizes) - after])
        if self.variadic.setdefault(name, middle) != middle:
            raise Mismatch(f"{where} wants {pattern}, but {actual} comes in; so far {self.shown()}")
        head = [(d.size, s) for d, s in zip(dims[:star], sizes[:star], strict=True)]
        tail = [(d.size, s) for d, s in zip(dims[star + 1 :], sizes[len(sizes) - after :], strict=True)]
        return head + tail

    def _one(self, where: str, pattern: PortType, wanted: Size, size: Size, actual: PortType) -> None:
        unknown = [s for s in wanted.symbols if s not in self.axes]
        if not unknown:
            if wanted.substitute(self.axes) != size:
                value = wanted.substitute(self.axes)
                equation = str(wanted) if wanted == value else f"{wanted} = {value}"
                raise Mismatch(
                    f"{where} wants {pattern}, but {actual} comes in: {equation}, not {size}; so far {self.shown()}"
                )
        elif len(unknown) == 1 and self._linear(wanted.substitute(self.axes), unknown[0]):
            try:
                solved = self._solve(wanted.substitute(self.axes), unknown[0], size)
                if solved.constant is not None and solved.constant <= 0:
                    raise AxisError(f"{unknown[0]} would be {solved}")
                self.axes[unknown[0]] = solved
            except AxisError:
                raise Mismatch(
                    f"{where} wants {pattern}, but {actual} comes in: {size} does not fit {wanted}; so far {self.shown()}"
                ) from None
        else:
            self._waiting.append((where, pattern, wanted, size, actual))

    @staticmethod
    def _linear(wanted: Size, symbol: str) -> bool:
        """Whether ``symbol`` stands in ``wanted`` with an integer factor only."""
        return all(monomial == (symbol,) or symbol not in monomial for monomial, _ in wanted.terms)

    def _solve(self, wanted: Size, symbol: str, size: Size) -> Size:
        """``symbol`` from ``wanted == size``. Raises :class:`AxisError` where the division leaves a rest."""
        factor = dict(wanted.terms)[(symbol,)]
        rest = Size(tuple((m, c) for m, c in wanted.terms if m != (symbol,)))
        return (size - rest) // factor

    def settle(self) -> None:
        """Try again what had to wait for other axes."""
        progress = True
        while progress and self._waiting:
            waiting, self._waiting = self._waiting, []
            for item in waiting:
                self._one(*item)
            progress = len(self._waiting) < len(waiting)

    def result(self, port: Port) -> PortType:
        """The type of an output. Raises :class:`Mismatch` naming the axes that nothing has bound."""
        dims: list[Dim] = []
        for dim in port.type.dims:
            if dim.variadic:
                if dim.variadic not in self.variadic:
                    raise Mismatch(
                        f"output {port.name!r} is {port.type}, but nothing says what *{dim.variadic} is: add 'out:'"
                    )
                dims += [Dim(s) for s in self.variadic[dim.variadic]]
                continue
            free = sorted(s for s in dim.size.symbols if s not in self.axes)
            if free:
                raise Mismatch(
                    f"output {port.name!r} is {port.type}, but nothing says how large {', '.join(free)} is: add 'out:' with its type"
                )
            dims.append(Dim(dim.size.substitute(self.axes)))
        return PortType(port.type.kind, tuple(dims))

    def shown(self) -> str:
        """``b=batch, l=length, d=768``"""
        parts = [f"{n}={s}" for n, s in self.axes.items()]
        parts += [f"*{n}=({' '.join(map(str, v))})" for n, v in self.variadic.items()]
        return ", ".join(parts) or "nothing is bound"
