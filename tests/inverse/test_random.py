"""Random graphs: what is accepted goes there and back; what is refused, a search that knows no shortcut refuses too."""

import dataclasses
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sedd_graph.graph.model import Op, Ref, Region, Step
from sedd_graph.inverse import Linear, Program, Refusal, solve
from sedd_graph.inverse.flat import flatten
from sedd_graph.inverse.format import diagnosis
from sedd_graph.inverse.program import LEVELS
from sedd_graph.inverse.propagate import Closure
from sedd_graph.inverse.system import System
from tests.inverse import toys
from tests.inverse.toys import TOYS, WIDTH, region

KINDS = ["add", "add", "add", "sub", "mean", "scale:2", "scale:-0.5", "fun", "fun2", "fun2", "lip:0.3", "lip:0.6"]
KINDS += ["turn", "affine", "both", "wave", "split", "concat", "pair", "residual", "lip:1", "scale:0", "half"]
KINDS += ["scale:0.3", "scale:0.1", "scale:-0.7", "scale:3.3333333333333335", "spin", "again", "count", "table"]
BRANCHES = ("fun", "lip", "table")
"""What is computed beside the streams, to go into them."""


class Grower:
    """A graph in the making: ``streams`` are the values that carry everything as long as steps are tame."""

    def __init__(self, inputs: list[str], known: list[str]) -> None:
        self.streams, self.beside = [name for name in inputs if name not in known], list(known)
        self.widths = dict.fromkeys(inputs, WIDTH)
        self.integers: list[str] = []
        """Streams of integers."""
        self.nodes: dict[str, tuple[str, list[str]]] = {}

    def node(self, what: str, refs: list[str]) -> list[str]:
        toy, name = TOYS[what.partition(":")[0]], f"n{len(self.nodes)}"
        self.nodes[name] = (what, refs)
        made = [name if len(toy.outs) == 1 else f"{name}.{port}" for port in toy.outs]
        self.widths |= dict(zip(made, toy.widths(None, [self.widths.get(r, WIDTH) for r in refs]), strict=True))
        return made

    def grow(self, what: str, rng: random.Random, wild: bool) -> None:
        """One more step: a tame one takes a stream, and what it adds is another stream or a branch."""
        if what in ("count", "table"):
            if self.integers:
                chosen = rng.choice(self.integers)
                made = self.node(what, [chosen])
                if what == "count":
                    del self.widths[made[0]]
                    self.integers = [made[0] if v == chosen else v for v in self.integers]
                else:
                    self.beside += made
            return
        if what == "again" and self.nodes:
            name = rng.choice([*self.nodes])
            again, refs = self.nodes[name]
            if again not in ("count", "table") and set(refs) <= self.widths.keys():
                made = self.node(again, refs)
                self.streams = [
                    rng.choice([v, v.replace(f"{name}.", f"{made[0].partition('.')[0]}.")]) for v in self.streams
                ]
            return
        first = rng.choice([*self.widths] if wild or not self.streams else self.streams)
        width = self.widths[first]
        others = [v for v in ([*self.widths] if wild else [*self.streams, *self.beside]) if self.widths[v] == width]
        others = others if wild else [v for v in others if v != first]
        if what == "pair" and others:
            second = rng.choice(others)
            self.replace([first, second], [*self.node("add", [first, second]), *self.node("sub", [first, second])])
        elif what == "spin" and others:
            second = rng.choice(others)
            p, q = (self.node("scale:0.8775825618903728", [v])[0] for v in (first, second))
            r, s = (self.node("scale:0.479425538604203", [v])[0] for v in (first, second))
            self.replace([first, second], [*self.node("sub", [p, s]), *self.node("add", [r, q])])
        elif what == "residual":
            branch = self.node(rng.choice(["lip:0.3", "lip:0.6"]), [first])
            self.replace([first], self.node("add", [first, *branch]))
        elif (
            what not in ("pair", "spin", "again")
            and (what != "half" or wild)
            and (width > 1 or what not in ("split", "half"))
        ):
            toy = TOYS[what.partition(":")[0]]
            need = rng.choice([2, 2, 3]) if toy.variadic else len(toy.ins)
            if need > 1 and not others:
                return
            refs = [first, *(rng.choice(others) for _ in range(need - 1))]
            made = self.node(what, refs)
            if what.startswith(BRANCHES):
                self.beside += made
            else:
                self.replace(refs if what in ("both", "concat") else [first], made)

    def replace(self, old: list[str], new: list[str]) -> None:
        self.streams = [v for v in self.streams if v not in old] + new


@st.composite
def graphs(draw: Callable[..., Any], most: int = 30) -> tuple[Region, list[str]]:
    """A region of up to ``most`` nodes and the inputs that are given. In half of them, every step is tame."""
    inputs = [f"x{i}" for i in range(draw(st.integers(1, 4)))]
    wildness = draw(st.sampled_from([0, 0, 1, 3]))
    step = st.tuples(st.sampled_from(KINDS), st.integers(0, 2**16))
    known = [name for name in inputs if draw(st.integers(0, 4)) == 0]
    grower = Grower(inputs, known)
    if draw(st.integers(0, 3)) == 0:
        grower.integers, integers = ["k0"], ["k0"]
        inputs = [*inputs, "k0"]
    else:
        integers = []
    for what, pick in draw(st.integers(0, most).flatmap(lambda n: st.lists(step, min_size=n, max_size=n))):
        rng = random.Random(pick)
        if len(grower.nodes) < most - 1:
            grower.grow(what, rng, rng.randrange(4) < wildness)
    picks = draw(st.lists(st.integers(0, 2**16), max_size=3)) if wildness else []
    outputs = list(dict.fromkeys([*grower.streams, *([*grower.widths][p % len(grower.widths)] for p in picks)]))
    if draw(st.integers(0, 7)) == 0 and len(outputs) > 1:
        outputs.pop()
    outputs += grower.integers
    if known and draw(st.integers(0, 2)) == 0:  # a given input passed out, or a function of given inputs alone
        outputs.append(draw(st.sampled_from([*known, *grower.node("fun", [known[0]])])))
    if outputs and draw(st.integers(0, 15)) == 0:  # one value twice
        outputs.append(draw(st.sampled_from(outputs)))
    named = {f"o{i}": ref for i, ref in enumerate(outputs or inputs[:1])}
    return region(inputs, grower.nodes, named, integers=integers), known


def merged(outer: Region) -> dict[Ref, Ref]:
    """The value that each value equals because its step repeats an equal one: same op, same number, same inputs."""
    group_of: dict[str, list[Step]] = {}
    groups: dict[Any, list[Step]] = {}
    for step in outer.steps:
        assert isinstance(step.body, Op)
        algebra = Naive.algebra(step)
        fed = tuple(
            (port, tuple((group_of[r.step][0].name if r.step else "", r.port) for r in refs))
            for port, refs in step.inputs.items()
        )
        key = (step.body.contract.name, getattr(step.body.config, "by", None), fed)
        group_of[step.name] = groups.setdefault(key if algebra.moves or algebra.linear else step.name, [])
        group_of[step.name].append(step)
    names = {name: min(s.name for s in group) for name, group in group_of.items()}
    return {Ref(s.name, p): Ref(names[s.name], p) for s in outer.steps for p in s.outputs if s.name != names[s.name]}


def ordered(steps: list[Step]) -> list[Step]:
    """Return the steps so that each comes after those that it reads, also where a later one stands for equal ones."""
    left, done = list(steps), list[Step]()
    while left:
        made = {"", *(s.name for s in done)}
        ready = [s for s in left if all(ref.step in made for refs in s.inputs.values() for ref in refs)]
        assert ready
        done += ready
        left = [s for s in left if s not in ready]
    return done


# -- the search that knows no shortcut --------------------------------------------------------------------------------


class Naive:
    """The same rules, tried one after another until none gives anything: forward, rules, rank, every pair for a fixed point.

    Steps that repeat an equal one are left out, and read where that one is.
    """

    def __init__(self, outer: Region) -> None:
        equal = merged(outer)
        steps = [s for s in outer.steps if not any(Ref(s.name, port) in equal for port in s.outputs)]
        fed = [{port: tuple(equal.get(r, r) for r in refs) for port, refs in s.inputs.items()} for s in steps]
        steps = [dataclasses.replace(s, inputs=inputs) for s, inputs in zip(steps, fed, strict=True)]
        outputs = {name: equal.get(ref, ref) for name, ref in outer.outputs.items()}
        outer = Region(outer.label, outer.inputs, outputs, tuple(ordered(steps)))
        self.outer = outer
        self.values = [Ref("", n) for n in outer.inputs] + [Ref(s.name, p) for s in outer.steps for p in s.outputs]
        self.types = {ref: outer.type_of(ref) for ref in self.values}
        self.rows: list[dict[Ref, Fraction]] = []
        self.row_of: dict[Ref, dict[Ref, Fraction]] = {}
        for step in outer.steps:
            assert isinstance(step.body, Op)
            for port, factors in self.algebra(step).linear.items():
                row = {Ref(step.name, port): Fraction(-1)}
                for name, refs in step.inputs.items():
                    for ref in refs:
                        row[ref] = row.get(ref, Fraction(0)) + factors.get(name, 0)
                row = {ref: c for ref, c in row.items() if c}
                if len(row) > 1:
                    self.rows.append(row)

    @staticmethod
    def algebra(step: Any) -> Any:
        return TOYS[step.body.contract.name].algebra(step.body.config, step.body.signature)

    def close(self, facts: set[Ref]) -> set[Ref]:
        known = set(facts)
        while True:
            found = self.forward(known) | self.rules(known) or self.systems(known) or self.fixed(known)
            if not found - known:
                return known
            known |= found

    def forward(self, known: set[Ref]) -> set[Ref]:
        found: set[Ref] = set()
        for step in self.outer.steps:
            if all(ref in known for refs in step.inputs.values() for ref in refs):
                found |= {Ref(step.name, port) for port in step.outputs}
        return found - known

    def rules(self, known: set[Ref]) -> set[Ref]:
        found: set[Ref] = set()
        for step in self.outer.steps:
            for rule in self.algebra(step).rules:
                needs = [Ref(step.name, n) if n in step.outputs else step.inputs[n][0] for n in rule.given]
                if all(ref in known for ref in needs):
                    found |= {step.inputs[n][0] for n in rule.targets}
        return found - known

    def systems(self, known: set[Ref]) -> set[Ref]:
        """An unknown is fixed if its unit vector lies among the rows; and it is not zero whatever is known."""
        columns = [ref for ref in self.values if ref not in known]
        if not self.rows or not columns:
            return set()
        all_columns = columns + [ref for ref in self.values if ref in known]
        full = np.array([[float(row.get(ref, 0)) for ref in all_columns] for row in self.rows])
        left = full[:, : len(columns)]
        rank, full_rank = np.linalg.matrix_rank(left, 1e-9), np.linalg.matrix_rank(full, 1e-9)
        found = set()
        for index, ref in enumerate(columns):
            unit = np.zeros(len(all_columns))
            unit[index] = 1
            inside = np.linalg.matrix_rank(np.vstack([left, unit[: len(columns)]]), 1e-9) == rank
            if inside and np.linalg.matrix_rank(np.vstack([full, unit]), 1e-9) > full_rank:
                found.add(ref)
        return found

    def fixed(self, known: set[Ref]) -> set[Ref]:
        """Every unknown against every known sum."""
        found = set()
        for x in self.values:
            if x in known:
                continue
            moves: dict[Ref, tuple[float, float] | None] = dict.fromkeys(known, (0.0, 0.0))
            moves[x] = (1.0, 0.0)
            for step in self.outer.steps:
                algebra = self.algebra(step)
                for port in step.outputs:
                    if (out := Ref(step.name, port)) != x and out not in known:
                        moves[out] = self.moved(step, algebra, port, moves)
            for step in self.outer.steps:
                for port in self.algebra(step).linear:
                    if Ref(step.name, port) in known:
                        move = self.moved(step, self.algebra(step), port, moves)
                        # what cancels leaves a rounding error of some 1e-16 in floats, and 0 in the solver's fractions
                        if move is not None and abs(move[0]) > 1e-13 and move[1] < (1 - 1e-9) * abs(move[0]):
                            found.add(x)
        return found

    @staticmethod
    def moved(step: Any, algebra: Any, port: str, moves: Any) -> tuple[float, float] | None:
        a, b = 0.0, 0.0
        for name, refs in step.inputs.items():
            for ref in refs:
                if moves.get(ref) is None:
                    return None
                if port in algebra.linear:
                    factor = float(algebra.linear[port][name])
                    if factor:
                        a, b = a + factor * moves[ref][0], b + abs(factor) * moves[ref][1]
                elif moves[ref] != (0.0, 0.0):
                    b += algebra.lipschitz.get((name, port), np.inf) * (abs(moves[ref][0]) + moves[ref][1])
        return a, b


# -- properties -----------------------------------------------------------------------------------------------------


def held(outer: Region, known: list[str], tally: dict[str, int]) -> None:
    naive = Naive(outer)
    start = {*naive.outer.outputs.values(), *(Ref("", name) for name in known)}
    flat = flatten(outer)
    closure = Closure(System(flat), [flat.refs.index(ref) for ref in start])
    assert {ref for v, ref in enumerate(flat.refs) if closure.known(v)} == naive.close(start)
    found = solve(outer, given=known)
    if isinstance(found, Refusal):
        tally["refused"] += 1
        assert diagnosis(found)
        remedied = solve(outer, given=known, stored=found.remedy.values)
        assert isinstance(remedied, Program)
        return
    tally[found.level] += 1
    for d in found.derivations:
        tally[type(d).__name__] += 1
        tally["Joint"] += isinstance(d, Linear) and len(d.paths) > 1
    rng = np.random.default_rng(0)
    inputs = {name: rng.normal(size=WIDTH) for name in outer.inputs}
    values = toys.forward(outer, inputs)
    made = toys.run(found, toys.facts(found, values))
    size = max(1.0, *(float(np.abs(v).max()) for v in values.values()))
    for name, value in inputs.items():
        np.testing.assert_allclose(made[Ref("", name)], value, rtol=1e-6, atol=1e-6 * size)
    if found.level != "injective":
        true = toys.true_log_det(found, inputs)
        assert np.isfinite(true)
        assert toys.log_det(found, values) == pytest.approx(true, abs=1e-6 * (1 + abs(true)))
    if found.level == "volume_preserving":
        assert true == pytest.approx(0, abs=1e-6)


def shuffled(outer: Region, seed: int) -> Region:
    """The same steps in another order that can be run."""
    rng, left = random.Random(seed), list(outer.steps)
    steps: list[Step] = []
    while left:
        done = {s.name for s in steps}
        ready = [s for s in left if all(not r.step or r.step in done for refs in s.inputs.values() for r in refs)]
        steps.append(rng.choice(ready))
        left.remove(steps[-1])
    return Region(outer.label, outer.inputs, outer.outputs, tuple(steps))


OPTIONS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
    "database": None,
}


def every(count: int) -> dict[str, int]:
    tally = dict.fromkeys(("refused", *LEVELS, "Forward", "Solve", "Linear", "Joint", "Contraction"), 0)

    @settings(max_examples=count, **OPTIONS)
    @given(graphs())
    def check(drawn: tuple[Region, list[str]]) -> None:
        held(*drawn, tally)

    check()
    return tally


def test_three_hundred_graphs() -> None:
    tally = every(300)
    assert min(tally.values()) >= 1, tally  # hypothesis mixes in constants of whatever modules are loaded: counts shift


@pytest.mark.slow
def test_ten_thousand_graphs() -> None:
    tally = every(10_000)
    print(tally)
    assert min(tally.values()) >= 100, tally


@settings(max_examples=100, **OPTIONS)
@given(graphs(), st.integers(0, 2**16))
def test_the_order_of_steps_changes_nothing(drawn: tuple[Region, list[str]], seed: int) -> None:
    outer, known = drawn
    other = shuffled(outer, seed)
    keys = []
    for one in (outer, other):
        flat = flatten(one)
        facts = [*flat.outputs.values(), *(flat.inputs[name] for name in known)]
        closure = Closure(System(flat), facts)
        keys.append({ref: closure.keys[v] for v, ref in enumerate(flat.refs)})
    assert keys[0] == keys[1]
    first, second = solve(outer, given=known), solve(other, given=known)
    if isinstance(first, Program):
        assert isinstance(second, Program)
        assert (first.level, first.note, first.cost) == (second.level, second.note, second.cost)
        assert [d.targets for d in first.derivations] == [d.targets for d in second.derivations]
    else:
        assert isinstance(second, Refusal)
        assert first.remedy == second.remedy
        assert first.lost == second.lost


@settings(max_examples=60, **OPTIONS)
@given(graphs(most=7))
def test_nothing_smaller_than_the_remedy_would_do(drawn: tuple[Region, list[str]]) -> None:
    """Against every set of unknown values."""
    outer, known = drawn
    found = solve(outer, given=known, sizes={})
    if isinstance(found, Program):
        return
    naive = Naive(outer)
    facts = {*naive.outer.outputs.values(), *(Ref("", name) for name in known)}
    unknown = [ref for ref in naive.values if ref not in naive.close(facts)]
    size = {ref: 4 * (naive.types[ref].dims[0].size.constant or 0) for ref in unknown}
    inputs = {Ref("", name) for name in outer.inputs}
    assert found.remedy.lower == found.remedy.total == sum(size[ref] for ref in found.remedy.values)
    for code in range(2 ** len(unknown)):
        chosen = {ref for i, ref in enumerate(unknown) if code >> i & 1}
        if sum(size[ref] for ref in chosen) < found.remedy.total:
            assert not inputs <= naive.close(facts | chosen)
