"""A-priori bounds on the errors of values that an inverse program reconstructs in floating point.

The error of a value is the Euclidean distance, over all elements of one sequence, between the value that the program
reconstructs from the computed outputs and the value that the forward pass computed. Every bound follows from
declarations: Lipschitz constants, linear relations and :attr:`~sedd_graph.component.contract.Algebra.rounding`. A
component that declares no bound has an infinite error, with a reason; nothing is estimated. Two evaluations of a component
with the same inputs are equal to the last bit, which the certificate of a block verifies (its check ``recompute``).

The terms are those of Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapters 3 and 18.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from sedd_graph.graph.model import Ref
from sedd_graph.inverse.flat import Flat, Node, flatten, log_det_of
from sedd_graph.inverse.program import Contraction, Forward, Linear, Program, Solve

__all__ = ["ErrorBounds", "error_bounds"]


@dataclasses.dataclass(frozen=True)
class ErrorBounds:
    """Error bounds of the values of a region, by reference, in the Euclidean norm of a sequence.

    Attributes:
        errors: Bound of each value that is known at inversion or derived; infinite where there is none.
        reasons: For each value with an infinite bound, which component has no bound, as text.
    """

    errors: Mapping[Ref, float]
    reasons: Mapping[Ref, str]


def error_bounds(
    program: Program, *, unit: float, norms: Mapping[Ref, float], tolerance: Callable[[float], float]
) -> ErrorBounds:
    """Return bounds on the errors of all values that a program reconstructs.

    Args:
        program: The inverse program.
        unit: Unit roundoff of the arithmetic, such as 2^-24 for float32.
        norms: Upper bounds on the norms of values, over one sequence, by reference; at least those of the inputs of
            bounded components that no other bound gives, such as the codewords of a sequence.
        tolerance: Function that returns, for a Lipschitz constant, the error relative to the norm of the solution or of
            the right-hand side at which a fixed-point iteration stops.
    """
    return _Analysis(program, unit, norms, tolerance).run()


def _times(factor: float, size: float) -> float:
    """Return the product of a factor and a size that may be infinite; 0 if the factor is 0."""
    return factor * size if factor else 0.0


class _Analysis:
    """State of one analysis: norms and errors by index of the value, and reasons of infinite ones."""

    def __init__(
        self, program: Program, unit: float, norms: Mapping[Ref, float], tolerance: Callable[[float], float]
    ) -> None:
        self.program, self.unit, self.tolerance = program, unit, tolerance
        self.flat: Flat = flatten(program.region)
        count = len(self.flat.refs)
        self.norm, self.error = [math.inf] * count, [math.inf] * count
        self.reason, self.unsized = [""] * count, [""] * count
        self.by_path = {node.path: node for node in self.flat.nodes}
        for ref, norm in norms.items():
            self.norm[self.flat.index[ref]] = norm
        for name, v in self.flat.inputs.items():
            if math.isinf(self.norm[v]):
                self.unsized[v] = f"the input {name!r} has no bound on its size"
        for node in self.flat.nodes:
            self._norms(node)

    def run(self) -> ErrorBounds:
        flat, program = self.flat, self.program
        known = [flat.index[ref] for ref in (*program.outputs.values(), *program.stored)]
        for v in (*known, *(flat.inputs[name] for name in program.given)):
            self.error[v] = 0.0
        for d in program.derivations:
            before = [self.error[flat.index[ref]] for ref in d.targets]
            if isinstance(d, Forward):
                for node in self._nodes(d):
                    self._forward(node, self.error, 2, again=True)
            elif isinstance(d, Solve):
                self._solve(d)
            elif isinstance(d, Linear):
                self._linear(d)
            else:
                self._contract(d)
            for ref, error in zip(d.targets, before, strict=True):
                # a value that was known before is not derived again
                self.error[flat.index[ref]] = min(self.error[flat.index[ref]], error)
        named = {ref: v for v, ref in enumerate(flat.refs)}
        return ErrorBounds(
            {ref: self.error[v] for ref, v in named.items()},
            {ref: self.reason[v] for ref, v in named.items() if self.reason[v] and math.isinf(self.error[v])},
        )

    # -- the forward direction --------------------------------------------------------------------------------------

    def _norms(self, node: Node) -> None:
        """Set bounds on the norms of a component's outputs, as computed, from those of its inputs."""
        for port, v in node.outputs.items():
            if not math.isinf(self.norm[v]) or self.flat.types[v].kind != "float":
                continue
            fed = {name: [self.norm[u] for u in values] for name, values in node.inputs.items()}
            if node.algebra.moves:
                self.norm[v] = math.hypot(*(n for values in fed.values() for n in values))
            elif (factors := node.algebra.linear.get(port)) is not None:
                total = sum(_times(abs(float(factors.get(name, 0))), n) for name, values in fed.items() for n in values)
                self.norm[v] = total * (1 + self._sum_rounding(node))
            elif self._bounded(node, port):
                lipschitz, rounding = node.algebra.lipschitz, node.algebra.rounding
                self.norm[v] = sum(
                    _times(lipschitz[name, port] + self.unit * rounding[name, port], n)
                    for name, values in fed.items()
                    for n in values
                )
            if math.isinf(self.norm[v]):
                why = next((self.unsized[u] for u in node.needs if self.unsized[u]), "")
                self.unsized[v] = why or f"op {node.op.contract.name!r} ({node.path}) has no bound on its errors"

    def _bounded(self, node: Node, port: str) -> bool:
        declared = node.algebra.lipschitz.keys() & node.algebra.rounding.keys()
        return all((name, port) in declared for name in node.inputs)

    def _sum_rounding(self, node: Node) -> float:
        """Return the relative rounding error of a weighted sum: two roundings for each term, of product and sum."""
        terms = (2 * sum(len(values) for values in node.inputs.values()) + 1) * self.unit
        return terms / (1 - terms) if terms < 1 else math.inf

    def _forward(self, node: Node, errors: list[float], evaluations: int, *, again: bool) -> None:
        """Set the errors of a component's outputs from those of its inputs, in ``errors``.

        Args:
            node: The component.
            errors: Errors by index of the value, updated.
            evaluations: Number of evaluations whose rounding errors are counted: 2 if computed outputs are compared
                with computed ones, 1 if with exact ones.
            again: True if inputs without error give outputs without error, since the same evaluation is repeated.
        """
        fed = [(name, u) for name, values in node.inputs.items() for u in values]
        for port, v in node.outputs.items():
            if again and all(errors[u] == 0 for _, u in fed):
                errors[v] = 0.0
            elif node.algebra.moves:
                errors[v] = math.hypot(*(errors[u] for _, u in fed))
            elif (factors := node.algebra.linear.get(port)) is not None:
                rounding = evaluations * self._sum_rounding(node)
                sizes = [(abs(float(factors.get(name, 0))), u) for name, u in fed]
                errors[v] = sum(_times(f, errors[u] + rounding * (self.norm[u] + errors[u])) for f, u in sizes)
            elif self._bounded(node, port):
                lipschitz, rounded = node.algebra.lipschitz, node.algebra.rounding
                errors[v] = sum(
                    _times(lipschitz[name, port], errors[u])
                    + _times(evaluations * self.unit * rounded[name, port], self.norm[u] + errors[u])
                    for name, u in fed
                )
            else:
                errors[v] = math.inf
            if math.isinf(errors[v]):
                self._blame(v, (u for _, u in fed), node, "has no bound on its errors")

    def _nodes(self, call: Forward) -> Iterable[Node]:
        inside = f"{call.path}."
        return (node for node in self.flat.nodes if node.path == call.path or node.path.startswith(inside))

    def _blame(self, v: int, needs: Iterable[int], node: Node, text: str) -> None:
        """Record why the error of ``v`` is infinite: the reason of a value that it needs, or the component itself."""
        inherited = next((self.reason[u] for u in needs if self.reason[u] and math.isinf(self.error[u])), "")
        self.reason[v] = inherited or f"op {node.op.contract.name!r} ({node.path}) {text}"

    # -- derivations ------------------------------------------------------------------------------------------------

    def _solve(self, d: Solve) -> None:
        flat, node = self.flat, self.by_path[d.path]
        given = [flat.index[ref] for ref in d.given if ref is not None]
        targets = [flat.index[ref] for ref in d.targets]
        made = [v for v in given if v in node.outputs.values()]
        for v in targets:
            if flat.types[v].kind != "float":
                self.error[v] = 0.0  # if what it is decoded from is within the margin, which the caller verifies
            elif node.algebra.moves:
                self.error[v] = math.hypot(*(self.error[u] for u in given))
            else:
                self.error[v] = self._isometry(node, d, v, made, given)
            if math.isinf(self.error[v]):
                self._blame(v, given, node, "has no bound on the errors of its inverse")

    def _isometry(self, node: Node, d: Solve, x: int, made: list[int], given: list[int]) -> float:
        """Return the error of x from an isometry, a map with Lipschitz constant 1 that preserves volume; else infinity.

        All singular values of its Jacobian are at most 1 and their product is 1, so that all are 1, and the inverse has
        the Lipschitz constant 1 too.
        """
        port = next((name for name, v in node.outputs.items() if made == [v]), None)
        key = (d.rule.targets[0], port or "")
        others = [u for u in given if u not in made]
        if (
            len(d.rule.targets) > 1
            or node.algebra.lipschitz.get(key, math.inf) > 1
            or log_det_of(self.flat, node, d.rule) != "zero"
            or key not in node.algebra.rounding
            or any(self.error[u] for u in others)
        ):
            return math.inf
        rounding = self.unit * node.algebra.rounding[key]
        return self.error[made[0]] + rounding * (self.norm[x] + self.norm[made[0]] + self.error[made[0]])

    def _linear(self, d: Linear) -> None:
        flat, node = self.flat, self.by_path[d.paths[0]]
        port = next((name for name in node.outputs if name in node.algebra.linear), None)
        for ref, terms in zip(d.targets, d.terms, strict=True):
            v = flat.index[ref]
            needs = [(abs(float(factor)), flat.index[r]) for r, factor in terms]
            if len(d.paths) > 1 or port is None:
                self.error[v] = math.inf
                self._blame(v, (u for _, u in needs), node, "is solved jointly with other sums, without an error bound")
                continue
            rounding, factors = self._sum_rounding(node), node.algebra.linear[port]
            fed = [(float(factors.get(name, 0)), u) for name, values in node.inputs.items() for u in values]
            # the computed output is off by the rounding of the forward sum, divided by the factor of the unknown
            own = abs(sum(f for f, u in fed if u == v)) or 1.0
            forward = rounding * sum(_times(abs(f), self.norm[u]) for f, u in fed) / own
            inverse = sum(_times(f, self.error[u] + rounding * (self.norm[u] + self.error[u])) for f, u in needs)
            self.error[v] = forward + inverse
            if math.isinf(self.error[v]):
                self._blame(v, (u for _, u in needs), node, "sums values without a bound")
                self.reason[v] = next((self.unsized[u] for _, u in fed if self.unsized[u]), self.reason[v])

    def _contract(self, d: Contraction) -> None:
        flat = self.flat
        x, y = flat.index[d.target], flat.index[d.value]
        errors, scale = list(self.error), abs(float(d.scale))
        errors[x] = 0.0
        known = {flat.index[ref] for ref in d.known} - {y}
        culprit = None
        for node in (node for call in d.body for node in self._nodes(call)):
            kept = {v: errors[v] for v in node.outputs.values() if v in known}
            self._forward(node, errors, 1, again=False)
            for v, error in kept.items():
                errors[v] = error
            if culprit is None and any(math.isinf(errors[v]) for v in node.outputs.values()):
                culprit = node
        # roundings of the forward sum, of the map at the solution, and of the difference and quotient that iterate it
        rounding = 2 * errors[y] + 4 * self.unit * (self.norm[y] + scale * self.norm[x])
        solved = (self.error[y] + rounding) / (scale * (1 - d.bound)) if d.bound < 1 else math.inf
        # the iterates may be a little larger than the solution
        self.error[x] = solved + 1.01 * self.tolerance(d.bound) * max(self.norm[x], self.norm[y] / scale)
        if math.isinf(self.error[x]):
            self._blame(x, (y,), culprit or flat.nodes[flat.producer[y]], "has no bound on its rounding errors")
        for node in (node for call in d.body for node in self._nodes(call)):  # evaluated again at the solution
            kept = {v: self.error[v] for v in node.outputs.values() if self.error[v] < math.inf}
            self._forward(node, self.error, 2, again=True)
            for v, error in kept.items():
                self.error[v] = error
