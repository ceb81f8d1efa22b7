"""Conversion of inverse programs and diagnoses to text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from sedd_graph.component.axes import Size
from sedd_graph.graph.model import Op, Ref, Region
from sedd_graph.inverse.factors import rational, shown
from sedd_graph.inverse.flat import algebra_of, numbers
from sedd_graph.inverse.names import Names, join_and
from sedd_graph.inverse.program import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve

__all__ = ["arrows", "diagnosis", "explain", "pseudo_code", "summary"]

_INLINE, _LINES = 72, 60
"""Formatting limits: largest length of a call that is inlined, in characters; largest number of lines of a program."""


# -- programs -------------------------------------------------------------------------------------------------------


def pseudo_code(program: Program, *, typed: bool = False) -> str:
    """Return an inverse program as pseudo-code: one line per derivation, then level, cost and log-determinant.

    A short call whose result is used once is written into the expression that uses it. Example:

    >>> inverse of couple: x1, x2 from y1, y2, given c
    >>>   x2 = y2 - g(y1, c)
    >>>   x1 = y1 - f(x2, c)
    >>>   volume_preserving; 2 evaluations; log|det| = 0

    Args:
        program: The inverse program.
        typed: True to state the types of the region's inputs after its label (its name in messages), to distinguish
            regions that have the same label.
    """
    writer = _Writer(program)
    lines = [line for d in program.derivations if (line := writer.line(d)) is not None]
    if len(lines) > _LINES:
        half = _LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more", *lines[-half:]]
    wanted = [name for name in program.region.inputs if name not in program.given]
    head = f"inverse of {_label(program.region, typed=typed)}: {', '.join(wanted)} from {writer.outputs()}"
    if program.given:
        head += f", given {', '.join(program.given)}"
    if program.stored:
        head += f", stored {', '.join(writer.names.value(ref) for ref in program.stored)}"
    return "\n".join([head, *(f"  {line}" for line in lines), f"  {summary(program)}"])


def summary(program: Program) -> str:
    """Return one line with a program's level of invertibility (and why it is not higher), cost and log-determinant."""
    level = program.level + (f" ({program.note})" if program.note else "")
    cost = f"{program.cost:g} evaluation" + ("" if program.cost == 1 else "s")
    text = f"{level}; {cost}"
    if program.level == "injective":
        return text
    if program.discrete:
        return f"{text}; integers, which have no log-determinant"
    text = f"{text}; log|det| = {_log_det(program)}"
    return f"{text}, and not one for each row: {program.mixed_rows}" if program.mixed_rows else text


def _log_det(program: Program) -> str:
    parts: list[str] = []
    names = Names(program.types)
    constant: dict[Fraction, Size] = {}
    for d in program.derivations:
        if isinstance(d, Solve) and d.log_det != "zero":
            parts.append(f"{d.path}.{d.log_det}" if d.log_det else f"unknown ({d.path} declares none)")
        elif isinstance(d, Linear) and d.factor != 1:
            constant[d.factor] = constant.get(d.factor, Size()) + numbers(program.types[d.targets[0]])
        elif isinstance(d, Contraction):
            inner = "I" if d.scale == 1 else f"{shown(d.scale)} I"
            parts.append(f"log|det({inner} + J)| at {names.value(d.target)}")
    if program.level != "volume_preserving":
        parts += [f"{size}*log({shown(factor)})" for factor, size in constant.items()]
    if len(parts) > 8:
        parts = [*parts[:4], f"... {len(parts) - 8} more ...", *parts[-4:]]
    return " + ".join(parts) if parts else "0"


class _Writer:
    """Writer of one program. ``inlined`` has the text of each inlined value, and whether it is a sum."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = Names(program.types)
        self.uses = Counter(ref for d in program.derivations for ref in _mentions(d))
        self.inlined: dict[Ref, tuple[str, bool]] = {}

    def outputs(self) -> str:
        shown = []
        for name, ref in self.program.outputs.items():
            value = self.names.value(ref)
            shown.append(value if value == name else f"{value} (output {name})")
        return ", ".join(shown)

    def line(self, d: Derivation) -> str | None:
        """Return the statement of a derivation, or None where it is inlined into the one that uses it."""
        if isinstance(d, Forward):
            fresh = list(d.outputs.values())
            text, compound = self.call(d)
            if len(fresh) == 1 and self.uses[fresh[0]] == 1 and len(text) <= _INLINE:
                self.inlined[fresh[0]] = (text, compound)
                return None
            return f"{', '.join(self.names.value(r) for r in fresh)} = {text}"
        if isinstance(d, Solve):
            arguments = ", ".join("none" if ref is None else self.value(ref) for ref in d.given)
            return f"{', '.join(self.names.value(r) for r in d.targets)} = {d.path}.{d.rule.method}({arguments})"
        if isinstance(d, Linear):
            rows = zip(d.targets, d.terms, strict=True)
            return "; ".join(f"{self.names.value(t)} = {self.total(terms)}" for t, terms in rows)
        inner = _Writer(self.program)
        inner.inlined = self.inlined
        inner.uses = Counter(ref for call in d.body for ref in call.needs)
        inner.uses[d.value] += 1
        before = [line for call in d.body if (line := inner.line(call)) is not None]
        made, _ = inner.inlined.pop(d.value, (self.names.value(d.value), False))
        where = "".join(f", {line}" for line in before)
        target, value = self.names.value(d.target), self.names.value(d.value)
        return f"{target}: {value} = {made}{where}  (fixed point: bound {d.bound:.4g}, {d.iterations} iterations)"

    def value(self, ref: Ref, *, grouped: bool = False) -> str:
        text, compound = self.inlined.pop(ref, (self.names.value(ref), False))
        return f"({text})" if grouped and compound else text

    def call(self, d: Forward) -> tuple[str, bool]:
        """Return a call as text, and whether it is a sum."""
        body = d.step.body
        if isinstance(body, Op) and len(d.outputs) == 1:
            fed = {port: self.program.types[refs[0]] for port, refs in d.inputs.items()}
            factors = algebra_of(d.path, d.step, body, fed).linear.get(next(iter(d.outputs)))
            if factors:
                terms = [(ref, rational(factors.get(port, 0))) for port, refs in d.inputs.items() for ref in refs]
                return self.total(terms), True
        arguments = ", ".join(self.value(ref) for refs in d.inputs.values() for ref in refs)
        return f"{d.path}({arguments})", False

    def total(self, terms: Iterable[tuple[Ref, Fraction]]) -> str:
        text = ""
        for ref, factor in sorted(terms, key=lambda t: t[1] < 0):  # positive terms first: y - f, not -f + y
            grouped = factor != 1 or bool(text)
            value = self.value(ref, grouped=grouped)
            body = value if abs(factor) == 1 else f"{shown(abs(factor))} {value}"
            text += ((" - " if text else "-") if factor < 0 else (" + " if text else "")) + body
        return text


def _mentions(d: Derivation) -> tuple[Ref, ...]:
    """Return the values that a derivation's line mentions, with repetitions."""
    if isinstance(d, Forward):
        return tuple(ref for refs in d.inputs.values() for ref in refs)
    if isinstance(d, Solve):
        return tuple(ref for ref in d.given if ref is not None)
    if isinstance(d, Linear):
        return tuple(ref for row in d.terms for ref, _ in row)
    return (d.value, *(ref for call in d.body for ref in _mentions(call)))


def arrows(found: Program | Refusal) -> tuple[tuple[str, str], ...]:
    """Return the data flow of an inverse as arrows (source box, target box), for a drawing of the region.

    A box is identified by a string: the name of a top-level step of the region, ``>NAME`` for the region's input NAME,
    or ``<NAME`` for its output NAME. For each derivation, arrows lead from the values that it reads to the values that
    it derives. A value is at the box that computes it in the forward pass, except that an arrow from an output of the
    region starts at the output's box. A region that is not invertible has no arrows.

    Args:
        found: The inverse program, or the diagnosis.
    """
    if isinstance(found, Refusal):
        return ()
    outputs = {ref: f"<{name}" for name, ref in found.outputs.items()}

    def box(ref: Ref) -> str:
        return ref.step.split(".")[0] if ref.step else f">{ref.port}"

    pairs = ((outputs.get(n, box(n)), box(t)) for d in found.derivations for n in d.needs for t in d.targets)
    return tuple(dict.fromkeys((source, target) for source, target in pairs if source != target))


def explain(found: Program | Refusal, *, typed: bool = False) -> str:
    """Return the text of a solver result: the inverse as pseudo-code, or the diagnosis.

    Args:
        found: The result.
        typed: True to state the types of the region's inputs after its label (its name in messages), to distinguish
            regions that have the same label.
    """
    return pseudo_code(found, typed=typed) if isinstance(found, Program) else diagnosis(found, typed=typed)


def _label(region: Region, *, typed: bool) -> str:
    return f"{region.label} ({', '.join(f'{n}: {t}' for n, t in region.inputs.items())})" if typed else region.label


# -- refusals -------------------------------------------------------------------------------------------------------


def diagnosis(refusal: Refusal, *, typed: bool = False) -> str:
    """Return the text of a diagnosis, several lines.

    It lists the lost inputs, the components where the derivation stops with the reasons, the cheapest values to store,
    and possible changes to the blueprint.

    Args:
        refusal: The diagnosis.
        typed: True to state the types of the region's inputs after its label (its name in messages), to distinguish
            regions that have the same label.
    """
    names = Names(refusal.types)
    label = _label(refusal.region, typed=typed)
    lines = [f"{label} is not invertible: {join_and(l.input for l in refusal.lost)} cannot be recovered"]
    for lost in refusal.lost[:8]:
        if lost.through:
            lines.append(
                f"  lost: {lost.input} (unknown with it: {join_and(names.value(ref) for ref in lost.through)})"
            )
    for blocker in refusal.blockers[:8]:
        file, line, col = blocker.place
        place = f"{file}:{line}:{col}" if line else file
        lines.append(f"  at {place}: {blocker.path}: {blocker.reason}")
    if len(refusal.blockers) > 8:
        lines.append(f"  and at {len(refusal.blockers) - 8} more nodes")
    lines.append(f"  store: {_remedy(refusal, names)}")
    lines += [f"  or: {text}" for text in refusal.rewrites[:4]]
    return "\n".join(lines)


def _remedy(refusal: Refusal, names: Names) -> str:
    remedy = refusal.remedy
    at = join_and(f"{name} {size:,}" for name, size in remedy.sizes.items() if name in ("batch", "length"))
    values = join_and(f"{names.value(ref)} ({refusal.types[ref]})" for ref in remedy.values)
    size = f"{remedy.bytes} bytes, " if remedy.bytes.terms and remedy.bytes.constant is None else ""
    text = f"{values}: {size}{remedy.total:,} at {at}" if at else f"{values}: {remedy.total:,} bytes"
    if remedy.lower == remedy.total:
        return f"{text}; no smaller set suffices"
    return f"{text}; any set that suffices takes at least {remedy.lower:,}"
