"""Why a region cannot be undone: the complement of the fixpoint, put into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sedd_graph.component.axes import AxisError
from sedd_graph.inverse.cheapest import cheapest
from sedd_graph.inverse.flat import Block, Node, total
from sedd_graph.inverse.names import Names, listed
from sedd_graph.inverse.program import Blocker, Lost, Refusal, Remedy
from sedd_graph.inverse.propagate import Closure

__all__ = ["diagnose"]


def diagnose(closure: Closure, facts: Sequence[int], given: tuple[str, ...], sizes: Mapping[str, int]) -> Refusal:
    """The diagnosis of ``closure``, in which some input is unknown."""
    flat = closure.flat
    types = dict(zip(flat.refs, flat.types, strict=True))
    writer = _Writer(closure, Names(flat.refs))
    lost: list[Lost] = []
    stuck: dict[int, None] = {}
    for name, v in flat.inputs.items():
        if not closure.known(v):
            nodes, ends = _frontier(closure, v)
            lost.append(Lost(name, tuple(flat.refs[u] for u in sorted(ends, key=flat.rank.__getitem__))))
            stuck |= dict.fromkeys(nodes)
    blockers: list[Blocker] = []
    rewrites: dict[str, None] = {}
    for index in sorted(stuck):
        node = flat.nodes[index]
        blockers.append(Blocker(node.path, node.op.contract.name, node.step.position, writer.reason(index)))
        if (hint := writer.rewrite(index)) is not None:
            rewrites[hint] = None
    remedy = cheapest(closure, facts, sizes)
    if (hint := writer.conditioning(remedy, given, len(lost))) is not None:
        rewrites = {hint: None}
    return Refusal(
        region=flat.region,
        given=given,
        lost=tuple(lost),
        blockers=tuple(blockers),
        remedy=remedy,
        rewrites=tuple(rewrites),
        types=types,
    )


def _frontier(closure: Closure, start: int) -> tuple[set[int], set[int]]:
    """From a lost input through unknown values to the nodes that hold it back, and the values at which these are reached.

    A node holds it back if something of what it gives is known; or, where its rule would need it, if what it gives is
    used by nothing. An input that meets neither is held back by wherever it ends.
    """
    flat = closure.flat
    stuck: set[int] = set()
    ends: set[int] = set()
    dead: set[int] = set()
    seen, todo = {start}, [start]
    while todo:
        v = todo.pop()
        if not flat.users[v]:
            maker = flat.producer[v]
            if maker >= 0 and _wanted(flat.nodes[maker], v):
                stuck.add(maker)
                ends.add(v)
            elif maker >= 0:
                dead.add(maker)
        for index in flat.users[v]:
            outputs = flat.nodes[index].outputs.values()
            if any(closure.known(u) for u in outputs) and not _waits(closure, flat.nodes[index]):
                stuck.add(index)
                ends.add(v)
            fresh = [u for u in outputs if not closure.known(u) and u not in seen]
            seen.update(fresh)
            todo += fresh
    if not stuck:
        return dead, set()
    return stuck, ends - {start}


def _waits(closure: Closure, node: Node) -> bool:
    """Whether a rule lacks only other outputs of the node, which are held back farther on."""
    for rule in node.algebra.rules:
        lacks = [name for name in rule.given if name in node.outputs and not closure.known(node.outputs[name])]
        inputs = [v for name in rule.given for v in node.inputs.get(name, ())]
        if lacks and all(closure.known(v) for v in inputs):
            return True
    return False


def _wanted(node: Node, v: int) -> bool:
    return any(node.outputs.get(name) == v for rule in node.algebra.rules for name in rule.given)


class _Writer:
    def __init__(self, closure: Closure, names: Names) -> None:
        self.closure, self.flat, self.names = closure, closure.flat, names

    def name(self, v: int) -> str:
        return self.names.value(self.flat.refs[v])

    def unknown(self, values: Iterable[int]) -> list[int]:
        found = [v for v in dict.fromkeys(values) if not self.closure.known(v)]
        return sorted(found, key=self.flat.rank.__getitem__)

    # -- reasons ----------------------------------------------------------------------------------------------------

    def reason(self, index: int) -> str:
        node = self.flat.nodes[index]
        row = next((r for v in node.outputs.values() if (r := self.row(v)) is not None), None)
        if row is not None:
            return self._equation(index, row)
        if node.algebra.linear and not any(any(f.values()) for f in node.algebra.linear.values()):
            return f"op {node.op.contract.name!r} multiplies by 0: nothing is left of {self.listed(node.needs)}"
        if not node.algebra.rules:
            return f"op {node.op.contract.name!r} has no rule to undo it{self._narrower(node)}"
        return "; ".join(self._rule(node, targets, given) for targets, given in self._rules(node))

    def row(self, v: int) -> int | None:
        """The linear relation of an output that is known and has unknown terms."""
        r = self.closure.problem.row_of_output.get(v)
        if r is None or not self.closure.known(v):
            return None
        return r if self.unknown(self.closure.problem.rows[r].terms) else None

    def _narrower(self, node: Node) -> str:
        made = [self.flat.types[v] for v in node.outputs.values()]
        try:
            given, wanted = total(made), total([self.flat.types[v] for v in self.unknown(node.needs)])
        except AxisError:
            return ""
        difference = (wanted - given).terms
        if not difference or any(c < 0 for _, c in difference):
            return ""
        return f", and none can be: {wanted} numbers go in and {given} come out"

    def _rules(self, node: Node) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Of the rules for unknown inputs: targets, and the given ports that are unknown."""
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
                    parts.append(f"its output {name!r}, which is used by nothing and is no output of the block")
                else:
                    parts.append(f"{name!r} ({self.described(v, node)})")
        what = f"op {node.op.contract.name!r} gives back {' and '.join(map(repr, targets))} only with "
        return what + " and ".join(parts)

    def listed(self, values: Iterable[int]) -> str:
        return listed(self.name(v) for v in values)

    def _equation(self, index: int, r: int) -> str:
        node, row = self.flat.nodes[index], self.closure.problem.rows[r]
        terms = self.unknown(v for v in row.terms if v != row.out)
        text = f"{self.name(row.out)} is one equation for {len(terms)} unknowns: " + listed(
            self.described(v, node) for v in terms
        )
        found = self.closure.searched.get(r)
        if found is None:
            return text
        if found.sources:
            return f"{text}; they go back to {self.listed(found.sources)}, which are independent"
        start = self.name(found.target)
        if found.unbounded:
            culprits = [self.flat.nodes[n] for n in dict.fromkeys(n for n, _, _ in found.unbounded)]
            shown = listed((f"op {c.op.contract.name!r} ({c.path}, {_at(c)})" for c in culprits), most=5)
            verb = "has" if len(culprits) == 1 else "have"
            return f"{text}; all follow from {start}, but no fixed point is certain: {shown} {verb} no Lipschitz bound"
        if not found.scale:
            return f"{text}; all follow from {start}, which is not itself a term of the sum"
        return (
            f"{text}; all follow from {start}, but the rest moves up to {found.bound:.6g} times as far as {start} does, "
            "and a fixed point needs less than 1"
        )

    def described(self, v: int, beside: Node) -> str:
        """A value's name, and which unknown values the block or component that makes it needs."""
        maker = self.flat.producer[v]
        if maker < 0:
            return self.name(v)
        unit = self.unit(maker, beside)
        needs = [u for u in self.unknown(unit.needs) if u != v]
        if not needs:
            return self.name(v)
        needs_text = listed((self.name(u) + self._computed(u) for u in needs), most=4)
        return f"{self.name(v)} (which needs {needs_text})"

    def unit(self, index: int, beside: Node) -> Node | Block:
        """The outermost block around a component in which ``beside`` does not stand; else the component."""
        path = f"{beside.path}."
        outer = [b for b in self.flat.around[index] if not path.startswith(f"{b.path}.")]
        return outer[0] if outer else self.flat.nodes[index]

    def _computed(self, v: int) -> str:
        """Of what is computed within: from which inputs, themselves unknown."""
        if self.flat.producer[v] < 0:
            return ""
        seen, todo, inputs = {v}, [v], set()
        while todo and len(seen) < 10_000:
            u = todo.pop()
            if self.flat.producer[u] < 0:
                inputs.add(u)
                continue
            fresh = [w for w in self.unknown(self.flat.nodes[self.flat.producer[u]].needs) if w not in seen]
            seen.update(fresh)
            todo += fresh
        return f", computed here from {self.listed(sorted(inputs, key=self.flat.rank.__getitem__))}" if inputs else ""

    # -- rewrites ---------------------------------------------------------------------------------------------------

    def rewrite(self, index: int) -> str | None:
        """Another way to write what stands here, where one is known."""
        node = self.flat.nodes[index]
        for v in node.outputs.values():
            r = self.row(v)
            if r is not None:
                return self._rewritten_sum(r)
        if not node.algebra.rules and self._narrower(node):
            return (
                f"let {node.path} keep the size (a square orthogonal map, a coupling), and give what it leaves out as an "
                "output of its own"
            )
        for _, missing in self._rules(node):
            loose = [n for n in missing if n in node.outputs and not self.flat.users[node.outputs[n]]]
            if loose:
                return f"give {node.path}.{loose[0]} as an output of the block too"
        return None

    def _rewritten_sum(self, r: int) -> str | None:
        row, found = self.closure.problem.rows[r], self.closure.searched.get(r)
        out = self.name(row.out)
        terms = self.unknown(v for v in row.terms if v != row.out)
        if found is None:
            return None
        if found.target >= 0:
            if found.target in terms and found.bound >= 1:
                x = self.name(found.target)
                return (
                    f"write the residual {out} = {x} + f({x}) with two streams, y1 = x1 + f(x2) and y2 = x2 + g(y1), or "
                    "make f a contraction: every op in it with a Lipschitz bound, whose product is below 1"
                )
            return None
        plain = [v for v in terms if self.flat.producer[v] < 0]
        if len(plain) == len(terms):
            names = " and ".join(self.name(v) for v in plain)
            return f"keep {names} as outputs of their own, or give a difference beside the sum {out}"
        if len(plain) == 1 and (others := self._crossed(terms)):
            x = self.name(plain[0])
            return (
                f"let the function in {out} = {x} + f({others[0]}) see something that is known once the other outputs are "
                f"(such as the sum that {others[0]} goes into) in place of {others[0]}"
            )
        return None

    def conditioning(self, remedy: Remedy, given: tuple[str, ...], lost: int) -> str | None:
        """What to say where all would follow from inputs that no sum carries on: they may be conditioning."""
        rows = self.closure.problem.rows
        summed = {v for r in self.closure.searched for v in rows[r].terms}
        inputs = [ref.port for ref in remedy.values if not ref.step and self.flat.inputs[ref.port] not in summed]
        if not len(inputs) == len(remedy.values) < lost:
            return None
        hint = f"where {listed(inputs)} will be known at inversion too (as conditioning is), say given: "
        return f"{hint}[{', '.join([*given, *inputs])}]"

    def _crossed(self, terms: Sequence[int]) -> list[str]:
        """The streams that the computed terms of a sum start from: lost inputs that are terms of other such sums."""
        found: set[int] = set()
        for v in terms:
            if self.flat.producer[v] >= 0:
                seen, todo = {v}, [v]
                while todo and len(seen) < 10_000:
                    u = todo.pop()
                    if self.flat.producer[u] < 0:
                        found.add(u)
                        continue
                    fresh = [w for w in self.unknown(self.flat.nodes[self.flat.producer[u]].needs) if w not in seen]
                    seen.update(fresh)
                    todo += fresh
        rows = self.closure.problem.rows
        summed = {v for r in self.closure.searched for v in rows[r].terms} - set(terms)
        return [self.name(u) for u in sorted(found & summed, key=self.flat.rank.__getitem__)]


def _at(node: Node) -> str:
    file, line, _ = node.step.position
    return f"{file}:{line}" if line else file
