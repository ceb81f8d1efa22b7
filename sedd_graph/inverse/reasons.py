"""Text of a diagnosis: why the derivation of an inverse stops at a component, and how to change the blueprint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from sedd_graph.component.axes import DYNAMIC, AxisError, Dim, PortType
from sedd_graph.errors import EnvironmentFault
from sedd_graph.inverse.contraction import ContractionSearch
from sedd_graph.inverse.flat import Block, Node, algebra_of, total
from sedd_graph.inverse.linear import dependent
from sedd_graph.inverse.names import Names, join_and
from sedd_graph.inverse.program import Remedy
from sedd_graph.inverse.propagate import Closure

__all__ = ["Reasons"]

_MAX_VISITED = 10_000
"""Largest number of unknown values visited in a search for the inputs that one value depends on."""


class Reasons:
    """Texts of one diagnosis: why derivations stop at components, and which changes to the blueprint may help.

    Values and components are identified by their indices in :class:`sedd_graph.inverse.flat.Flat`.

    Args:
        closure: All values of the region that can be derived.
    """

    def __init__(self, closure: Closure) -> None:
        self.closure, self.flat, self.names = closure, closure.flat, Names(closure.flat.refs)

    def name(self, v: int) -> str:
        """Return the display name of the value with index ``v``."""
        return self.names.value(self.flat.refs[v])

    def listed(self, values: Iterable[int]) -> str:
        """Return the display names of values, joined to a list in words, such as ``a, b and c``.

        Args:
            values: Indices of the values.
        """
        return join_and(self.name(v) for v in values)

    def sorted(self, values: Iterable[int]) -> list[int]:
        """Return the indices of values, sorted by the values' names."""
        return sorted(values, key=self.flat.rank.__getitem__)

    def unknown(self, values: Iterable[int]) -> list[int]:
        """Return the indices of the unknown values among ``values``, each once, sorted by name."""
        return self.sorted(v for v in dict.fromkeys(values) if not self.closure.known(v))

    # -- reasons ----------------------------------------------------------------------------------------------------

    def reason(self, index: int) -> str:
        """Return the reason why the unknown inputs of a component cannot be derived from its known outputs.

        Args:
            index: Index of the component.
        """
        node = self.flat.nodes[index]
        relation = self.open_relation(node)
        if relation is not None:
            return self._equation(node, relation)
        if node.algebra.linear and not any(any(f.values()) for f in node.algebra.linear.values()):
            return f"op {node.op.contract.name!r} multiplies by 0: nothing is left of {self.listed(node.needs)}"
        if node.algebra.linear and not any(map(self.closure.known, node.outputs.values())):
            return (
                f"nothing is known of its output {self.listed(node.outputs.values())}: no output of the block needs it"
            )
        if not node.algebra.rules:
            return f"op {node.op.contract.name!r} has no inversion rule{self._narrower(node) or self._varying(node)}"
        return "; ".join(self._rule(node, targets, given) for targets, given in self._rules(node))

    def open_relation(self, node: Node) -> int | None:
        """Return the index of a component's first linear relation with a known output and unknown terms, or None.

        Args:
            node: The component.
        """
        system = self.closure.system
        for v in node.outputs.values():
            r = system.relation_of_output.get(v)
            if r is not None and self.closure.known(v) and self.unknown(system.relations[r].terms):
                return r
        return None

    def _narrower(self, node: Node) -> str:
        made = [self.flat.types[v] for v in node.outputs.values()]
        try:
            given, wanted = total(made), total([self.flat.types[v] for v in self.unknown(node.needs)])
        except AxisError:
            return ""
        difference = (wanted - given).terms
        if not difference or any(c < 0 for _, c in difference):
            return ""
        return f", and cannot have one: {wanted} numbers go in and {given} come out"

    def _varying(self, node: Node) -> str:
        """Return that a component would have a rule if no size depended on the batch or the length, or an empty text."""
        sizes = dict.fromkeys(DYNAMIC, 2)
        fed = {port: self.flat.types[values[0]] for port, values in node.inputs.items()}
        varying = [f"{port} is {found}" for port, found in fed.items() if not found.symbols.isdisjoint(DYNAMIC)]
        if not varying:
            return ""

        def fixed(found: PortType) -> PortType:
            return PortType(found.kind, tuple(Dim(d.size.substitute(sizes), d.variadic) for d in found.dims))

        try:
            outputs = {port: fixed(found) for port, found in node.step.outputs.items()}
            step = dataclasses.replace(node.step, outputs=outputs)
            algebra = algebra_of(node.path, step, node.op, {port: fixed(found) for port, found in fed.items()})
        except (AxisError, EnvironmentFault):
            return ""
        if not algebra.rules:
            return ""
        return f" for sizes that depend on the batch or the length ({join_and(varying, most=4)}): it has one for fixed sizes"

    def _rules(self, node: Node) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Return the targets and the unknown given ports of each rule for an unknown input."""
        found = []
        for rule in node.algebra.rules:
            if any(self.unknown(node.inputs.get(name, ())) for name in rule.targets):
                ports = {name: node.inputs.get(name, ()) for name in rule.given} | {
                    name: (node.outputs[name],) for name in rule.given if name in node.outputs
                }
                found.append((rule.targets, tuple(n for n in rule.given if self.unknown(ports[n]))))
        return found

    def _rule(self, node: Node, targets: tuple[str, ...], missing: tuple[str, ...]) -> str:
        parts = []
        for name in missing:
            values = (node.outputs[name],) if name in node.outputs else node.inputs[name]
            for v in self.unknown(values):
                if name in node.outputs and not self.flat.users[v]:
                    parts.append(f"its output {name!r}, which nothing uses and which is no output of the block")
                else:
                    parts.append(f"{name!r} ({self._described(v, node)})")
        recovered = " and ".join(map(repr, targets))
        return f"op {node.op.contract.name!r} recovers {recovered} only with {' and '.join(parts)}"

    def _equation(self, node: Node, r: int) -> str:
        relation = self.closure.system.relations[r]
        terms = self.unknown(v for v in relation.terms if v != relation.out)
        described = join_and(self._described(v, node) for v in terms)
        text = f"{self.name(relation.out)} is one equation for {len(terms)} unknowns: {described}"
        search = self.closure.searched.get(r)
        text = text if search is None else f"{text}; {self._no_fixed_point(search)}"
        others = dependent(self.closure.system, self.closure.keys, r)
        if len(others) < 2:
            return text
        outs = self.listed(self.closure.system.relations[other].out for other in others)
        return f"{text}; these equations are dependent, so that one of them says nothing new: those of {outs}"

    def _no_fixed_point(self, search: ContractionSearch) -> str:
        if search.sources:
            return f"they depend on {self.listed(search.sources)}, which are independent"
        start = self.name(search.target)
        text = f"all follow from {start}"
        if search.unbounded:
            culprits = [self.flat.nodes[n] for n in dict.fromkeys(n for n, _, _ in search.unbounded)]
            shown = join_and((f"op {c.op.contract.name!r} ({c.path}, {_at(c)})" for c in culprits), most=5)
            verb = "has" if len(culprits) == 1 else "have"
            return f"{text}, but a fixed-point iteration need not converge: {shown} {verb} no Lipschitz bound"
        if not search.scale:
            return f"{text}, which is not itself a term of the sum"
        return (
            f"{text}, but relative to it the other terms have a Lipschitz bound of {search.bound:.6g}, and a fixed-point "
            "iteration needs less than 1"
        )

    def _described(self, v: int, beside: Node) -> str:
        """Return a value's name, and which unknown values the block or component that computes it needs."""
        maker = self.flat.producer[v]
        if maker < 0:
            return self.name(v)
        needs = [u for u in self.unknown(self._unit(maker, beside).needs) if u != v]
        if not needs:
            return self.name(v)
        needs_text = join_and((self.name(u) + self._computed(u) for u in needs), most=4)
        return f"{self.name(v)} (which needs {needs_text})"

    def _unit(self, index: int, beside: Node) -> Node | Block:
        """Return the outermost block around a component that does not contain ``beside``; else the component."""
        path = f"{beside.path}."
        outer = [b for b in self.flat.around[index] if not path.startswith(f"{b.path}.")]
        return outer[0] if outer else self.flat.nodes[index]

    def _computed(self, v: int) -> str:
        """Return the unknown inputs that a value within is computed from, as text."""
        inputs = self._inputs_behind(v) if self.flat.producer[v] >= 0 else ()
        return f", computed here from {self.listed(self.sorted(inputs))}" if inputs else ""

    def _inputs_behind(self, v: int) -> set[int]:
        """Return the unknown inputs that ``v`` depends on."""
        seen, todo, inputs = {v}, [v], set()
        while todo and len(seen) < _MAX_VISITED:
            u = todo.pop()
            if self.flat.producer[u] < 0:
                inputs.add(u)
                continue
            fresh = [w for w in self.unknown(self.flat.nodes[self.flat.producer[u]].needs) if w not in seen]
            seen.update(fresh)
            todo += fresh
        return inputs

    # -- rewrites ---------------------------------------------------------------------------------------------------

    def rewrite(self, index: int) -> str | None:
        """Return a suggested change to the blueprint that makes a component invertible; None if no change is known.

        Args:
            index: Index of the component.
        """
        node = self.flat.nodes[index]
        relation = self.open_relation(node)
        if relation is not None:
            return self._rewritten_sum(relation)
        if not node.algebra.rules and self._narrower(node):
            return (
                f"replace {node.path} by a component that keeps the size (a square orthogonal map, a coupling), and make "
                "what it drops an output"
            )
        for _, missing in self._rules(node):
            loose = [n for n in missing if n in node.outputs and not self.flat.users[node.outputs[n]]]
            if loose:
                return f"make {node.path}.{loose[0]} an output of the block too"
        return None

    def _rewritten_sum(self, r: int) -> str | None:
        relation, search = self.closure.system.relations[r], self.closure.searched.get(r)
        out = self.name(relation.out)
        terms = self.unknown(v for v in relation.terms if v != relation.out)
        if search is None:
            return None
        if search.target >= 0:
            if search.target in terms and search.bound >= 1:
                x = self.name(search.target)
                return (
                    f"write the residual {out} = {x} + f({x}) with two streams, y1 = x1 + f(x2) and y2 = x2 + g(y1), or "
                    "make f a contraction: every op in it with a Lipschitz bound, whose product is below 1"
                )
            return None
        plain = [v for v in terms if self.flat.producer[v] < 0]
        if len(plain) == len(terms):
            names = " and ".join(self.name(v) for v in plain)
            return f"make {names} outputs too, or output a difference beside the sum {out}"
        if len(plain) == 1 and (others := self._crossed(terms)):
            x = self.name(plain[0])
            return (
                f"compute the function in {out} = {x} + f({others[0]}) from a value that is known once the other outputs "
                f"are (such as the sum that {others[0]} goes into) instead of {others[0]}"
            )
        return None

    def conditioning(self, remedy: Remedy, given: tuple[str, ...], lost: int) -> str | None:
        """Return a suggestion to declare lost inputs as conditioning inputs (``given``), or None if it does not apply.

        The suggestion is made if all values to store are inputs of the region, if they are fewer than the lost inputs,
        and if none of them is a term of a sum in which a contraction was searched for.

        Args:
            remedy: Values to store so that all inputs can be recovered.
            given: Names of the present conditioning inputs.
            lost: Number of lost inputs.
        """
        inputs = [
            ref.port for ref in remedy.values if not ref.step and self.flat.inputs[ref.port] not in self._summed()
        ]
        if not len(inputs) == len(remedy.values) < lost:
            return None
        verb = "is" if len(inputs) == 1 else "are"
        hint = f"if {join_and(inputs)} {verb} known at inversion too (as conditioning is), declare given: "
        return f"{hint}[{', '.join([*given, *inputs])}]"

    def _crossed(self, terms: Sequence[int]) -> list[str]:
        """Return the lost inputs that computed terms of a sum depend on and that are terms of other such sums."""
        found: set[int] = set()
        for v in terms:
            if self.flat.producer[v] >= 0:
                found |= self._inputs_behind(v)
        return [self.name(u) for u in self.sorted(found & (self._summed() - set(terms)))]

    def _summed(self) -> set[int]:
        """Return the terms of all sums that were searched for a contraction."""
        return {v for r in self.closure.searched for v in self.closure.system.relations[r].terms}


def _at(node: Node) -> str:
    file, line, _ = node.step.position
    return f"{file}:{line}" if line else file
