"""Toy components in numpy, a way to wire them into regions, and a plain interpreter of programs.

Nothing here comes from the solver: it is what programs are held to. Values are vectors; forward passes take complex ones
too, so that Jacobians come from complex steps, exact to rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sedd_graph.component.axes import Dim, Kind, PortType, Size
from sedd_graph.component.contract import Algebra, ComponentConfig, Contract, Port, Rule, Signature
from sedd_graph.graph.model import Claim, Op, Ref, Region, Step
from sedd_graph.inverse.program import Contraction, Forward, Linear, Program, Solve

Array = np.ndarray[Any, Any]
WIDTH = 4


def vector(size: int = WIDTH, kind: Kind = "float") -> PortType:
    return PortType(kind, (Dim(Size.of(size)),))


@lru_cache(maxsize=4096)
def weights(path: str, rows: int, columns: int) -> Array:
    """Of spectral norm 1."""
    w = np.random.default_rng(zlib.crc32(path.encode())).normal(size=(rows, columns))
    return np.asarray(w / np.linalg.svd(w, compute_uv=False)[0])


@lru_cache(maxsize=4096)
def rotation(path: str, size: int) -> Array:
    return np.asarray(np.linalg.qr(np.random.default_rng(zlib.crc32(path.encode())).normal(size=(size, size)))[0])


class Toy:
    """One kind of component: its contract, ``forward``, and the methods that its rules name."""

    kind = "mixer"
    ins: tuple[str, ...] = ("x",)
    outs: tuple[str, ...] = ("out",)
    variadic = False
    integers = False
    """Whether the outputs are integers."""

    class Config(ComponentConfig):
        by: float = 1.0

    @classmethod
    def widths(cls, config: Any, given: Sequence[int]) -> list[int]:
        return [given[0]] * len(cls.outs)

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra()

    @classmethod
    def contract(cls) -> Contract:
        return Contract(cls.__name__.lower(), 1, cls.kind, cls.Config, cls.no_signature, algebra=cls.algebra)

    @staticmethod
    def no_signature(config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
        raise NotImplementedError

    def __init__(self, path: str, config: Any) -> None:
        self.path, self.config = path, config

    def forward(self, *xs: Array) -> Any:
        raise NotImplementedError


class Add(Toy):
    kind, ins, variadic = "arithmetic", ("xs",), True

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"xs": Fraction(1)}})

    def forward(self, *xs: Array) -> Array:
        return np.asarray(sum(xs[1:], xs[0]))


class Sub(Toy):
    kind, ins = "arithmetic", ("x", "y")

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(1), "y": Fraction(-1)}})

    def forward(self, *xs: Array) -> Array:
        return np.asarray(xs[0] - xs[1])


class Mean(Toy):
    kind, ins = "arithmetic", ("x", "y")

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(1, 2), "y": Fraction(1, 2)}})

    def forward(self, *xs: Array) -> Array:
        return np.asarray((xs[0] + xs[1]) / 2)


class Scale(Toy):
    kind = "arithmetic"

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(config.by)}})

    def forward(self, *xs: Array) -> Array:
        return np.asarray(xs[0] * self.config.by)


class Fun(Toy):
    """Any function: no rule, no bound."""

    def forward(self, *xs: Array) -> Array:
        return np.asarray(np.tanh(weights(self.path, len(xs[0]), len(xs[0])) @ xs[0]))


class Fun2(Fun):
    """Any function of two values."""

    ins = ("x", "y")

    def forward(self, *xs: Array) -> Array:
        size = len(xs[0])
        return np.asarray(np.tanh(weights(self.path, size, 2 * size) @ np.concatenate(xs)))


class Lip(Toy):
    """A function with the Lipschitz bound ``by``."""

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): config.by})

    def forward(self, *xs: Array) -> Array:
        return np.asarray(self.config.by * np.tanh(weights(self.path, len(xs[0]), len(xs[0])) @ xs[0]))


class Turn(Toy):
    """An orthogonal map."""

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        rule = Rule("x", ("out",), "back")
        return Algebra((rule,), lipschitz={("x", "out"): 1.0}, log_det={"x": "zero"})

    def forward(self, *xs: Array) -> Array:
        return np.asarray(rotation(self.path, len(xs[0])) @ xs[0])

    def back(self, out: Array) -> Array:
        return np.asarray(rotation(self.path, len(out)).T @ out)


class Affine(Toy):
    """An affine coupling: ``x`` scaled and shifted by functions of ``c``."""

    ins = ("x", "c")

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out", "c"), "inverse"),), log_det={"x": "measure"})

    def parts(self, c: Array) -> tuple[Array, Array]:
        return 0.3 * np.tanh(weights(f"{self.path}s", len(c), len(c)) @ c), weights(self.path, len(c), len(c)) @ c

    def forward(self, *xs: Array) -> Array:
        scale, shift = self.parts(xs[1])
        return np.asarray(xs[0] * np.exp(scale) + shift)

    def inverse(self, out: Array, c: Array) -> Array:
        scale, shift = self.parts(c)
        return np.asarray((out - shift) * np.exp(-scale))

    def measure(self, x: Array, c: Array) -> float:
        return float(self.parts(c)[0].sum())


class Both(Toy):
    """Two values turned together: one rule gives both."""

    ins, outs = ("x", "y"), ("u", "v")

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra((Rule(("x", "y"), ("u", "v"), "inverse"),), log_det={("x", "y"): "zero"})

    def forward(self, *xs: Array) -> tuple[Array, Array]:
        made = rotation(self.path, 2 * len(xs[0])) @ np.concatenate(xs)
        return made[: len(xs[0])], made[len(xs[0]) :]

    def inverse(self, u: Array, v: Array) -> tuple[Array, Array]:
        made = rotation(self.path, 2 * len(u)).T @ np.concatenate([u, v])
        return made[: len(u)], made[len(u) :]


class Wave(Toy):
    """``x + 0.5 sin x``, inverted by iteration."""

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(
            (Rule("x", ("out",), "inverse", cost=40, iterative=True),),
            lipschitz={("x", "out"): 1.5},
            log_det={"x": "measure"},
        )

    def forward(self, *xs: Array) -> Array:
        return np.asarray(xs[0] + 0.5 * np.sin(xs[0]))

    def inverse(self, out: Array) -> Array:
        x = out
        for _ in range(60):
            x = x - (x + 0.5 * np.sin(x) - out) / (1 + 0.5 * np.cos(x)) if _ > 20 else out - 0.5 * np.sin(x)
        return x

    def measure(self, x: Array) -> float:
        return float(np.log(np.abs(1 + 0.5 * np.cos(x))).sum())


class Split(Toy):
    """Two halves."""

    kind, outs = "arithmetic", ("x0", "x1")

    @classmethod
    def widths(cls, config: Any, given: Sequence[int]) -> list[int]:
        return [given[0] // 2, given[0] - given[0] // 2]

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra(
            (Rule("x", ("x0", "x1"), "join", cost=0),),
            lipschitz={("x", "x0"): 1.0, ("x", "x1"): 1.0},
            log_det={"x": "zero"},
            moves=True,
        )

    def forward(self, *xs: Array) -> tuple[Array, Array]:
        half = len(xs[0]) // 2
        return xs[0][:half], xs[0][half:]

    def join(self, *parts: Array) -> Array:
        return np.concatenate(parts)


class Concat(Toy):
    kind, ins = "arithmetic", ("x0", "x1")

    @classmethod
    def widths(cls, config: Any, given: Sequence[int]) -> list[int]:
        return [sum(given)]

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        sizes = [p.type.dims[0].size.constant for p in signature.inputs]
        assert None not in sizes  # the solver shows the types of the graph
        rule = Rule(("x0", "x1"), ("out",), "part", cost=0)
        bounds = {("x0", "out"): 1.0, ("x1", "out"): 1.0}
        return Algebra((rule,), lipschitz=bounds, log_det={("x0", "x1"): "zero"}, moves=True)

    def forward(self, *xs: Array) -> Array:
        return np.concatenate(xs)

    def part(self, out: Array) -> tuple[Array, Array]:
        half = len(out) // 2  # all that is joined here has one size
        return out[:half], out[half:]


class Count(Toy):
    """Integers plus 1: no volume, and an inverse."""

    integers = True

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out",), "inverse"),))

    def forward(self, *xs: Array) -> Array:
        return np.asarray(xs[0] + 1)

    def inverse(self, out: Array) -> Array:
        return out - 1


class Table(Fun):
    """A function of integers."""


class Half(Toy):
    """The first half of a value turned: the rest is gone."""

    @classmethod
    def widths(cls, config: Any, given: Sequence[int]) -> list[int]:
        return [given[0] // 2]

    def forward(self, *xs: Array) -> Array:
        return np.asarray((rotation(self.path, len(xs[0])) @ xs[0])[: len(xs[0]) // 2])


TOYS: dict[str, type[Toy]] = {
    t.__name__.lower(): t
    for t in (Add, Sub, Mean, Scale, Fun, Fun2, Lip, Turn, Affine, Both, Wave, Split, Concat, Count, Table, Half)
}
CONTRACTS = {name: toy.contract() for name, toy in TOYS.items()}

Spec = Mapping[str, tuple[Any, Sequence[str]]]


def _ref(text: str, steps: Mapping[str, Mapping[str, PortType]]) -> Ref:
    name, _, port = text.partition(".")
    if name not in steps:
        return Ref("", name)
    return Ref(name, port or next(iter(steps[name])))


def region(
    inputs: Mapping[str, int] | Sequence[str],
    nodes: Spec,
    outputs: Mapping[str, str] | Sequence[str],
    *,
    label: str = "toy",
    order: Sequence[str] | None = None,
    integers: Sequence[str] = (),
) -> Region:
    """``nodes`` maps names to (op, refs), (op:by, refs), or (region, refs); a ref is ``name`` or ``name.port``.

    ``order`` arranges the finished steps in another way; ``integers`` names inputs that are integers.
    """
    widths = dict(inputs) if isinstance(inputs, Mapping) else dict.fromkeys(inputs, WIDTH)
    given = {name: vector(width, "int" if name in integers else "float") for name, width in widths.items()}
    made: dict[str, Mapping[str, PortType]] = {}
    steps: list[Step] = []
    for line, (name, (what, texts)) in enumerate(nodes.items(), start=1):
        refs = [_ref(text, made) for text in texts]
        types = [made[r.step][r.port] if r.step else given[r.port] for r in refs]
        body: Op | Region
        fed: dict[str, tuple[Ref, ...]]
        if isinstance(what, Region):
            body, outs = what, dict(what.output_types)
            fed = {port: (ref,) for port, ref in zip(what.inputs, refs, strict=True)}
        else:
            op, _, by = what.partition(":")
            toy = TOYS[op]
            config = toy.Config(by=float(by)) if by else toy.Config()
            sizes = [int(t.dims[0].size.constant or 0) for t in types]
            kind: Kind = "int" if toy.integers else "float"
            outs = {port: vector(size, kind) for port, size in zip(toy.outs, toy.widths(config, sizes), strict=True)}
            if toy.variadic:
                fed = {toy.ins[0]: tuple(refs)}
            else:
                fed = {port: (ref,) for port, ref in zip(toy.ins, refs, strict=True)}
            ports = tuple(Port(p, types[0], variadic=toy.variadic) for p in toy.ins)
            body = Op(CONTRACTS[op], config, Signature(ports, tuple(Port(n, t) for n, t in outs.items())), {})
        made[name] = outs
        steps.append(Step(name, body, fed, outs, None, ("toy.yaml", line, 1)))
    if order is not None:
        by_name = {s.name: s for s in steps}
        steps = [by_name[name] for name in order]
    named = outputs if isinstance(outputs, Mapping) else {text.replace(".", "_"): text for text in outputs}
    return Region(label, given, {name: _ref(text, made) for name, text in named.items()}, tuple(steps))


def chain(inner: Region, count: int) -> Region:
    """``count`` repeats of a block, as the expander makes them."""
    steps = []
    for index in range(count):
        inputs = {
            name: (Ref(str(index - 1), name) if index and name in inner.outputs else Ref("", name),)
            for name in inner.inputs
        }
        steps.append(Step(str(index), inner, inputs, inner.output_types, None, ("toy.yaml", 1, 1)))
    outputs = {name: Ref(str(count - 1), name) for name in inner.outputs}
    return Region(inner.label, inner.inputs, outputs, tuple(steps), repeat=count)


def claim(inner: Region, given: Sequence[str] = (), level: str = "injective") -> Region:
    place = Claim(tuple(given), level, ("toy.yaml", 1, 1), "blocks.toy.invertible")
    return Region(inner.label, inner.inputs, inner.outputs, inner.steps, inner.repeat, inner.description, place)


# -- running --------------------------------------------------------------------------------------------------------


def forward(outer: Region, values: Mapping[str, Array]) -> dict[Ref, Array]:
    """Every value of the region, by its absolute name."""
    found: dict[Ref, Array] = {Ref("", name): value for name, value in values.items()}

    def visit(inner: Region, prefix: str, fed: Mapping[str, Array]) -> dict[str, Array]:
        local = {Ref("", name): value for name, value in fed.items()}
        for step in inner.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                made = visit(step.body, f"{path}.", {p: local[refs[0]] for p, refs in step.inputs.items()})
            else:
                made = call(path, step, [local[r] for refs in step.inputs.values() for r in refs])
                found.update({Ref(path, port): value for port, value in made.items()})
            local.update({Ref(step.name, port): value for port, value in made.items()})
        return {name: local[ref] for name, ref in inner.outputs.items()}

    visit(outer, "", values)
    return found


def component(path: str, step: Step) -> Toy:
    assert isinstance(step.body, Op)
    return TOYS[step.body.contract.name](path, step.body.config)


def call(path: str, step: Step, arguments: Sequence[Array]) -> dict[str, Array]:
    made = component(path, step).forward(*arguments)
    return dict(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True))


def evaluate(d: Forward, known: Mapping[Ref, Array]) -> dict[Ref, Array]:
    """A component or a whole block."""
    if isinstance(d.step.body, Region):
        prefix = Region(d.path, d.step.body.inputs, d.step.body.outputs, d.step.body.steps)
        made = _block(prefix, d.path, {port: known[refs[0]] for port, refs in d.inputs.items()})
    else:
        made = call(d.path, d.step, [known[ref] for refs in d.inputs.values() for ref in refs])
    return {ref: made[port] for port, ref in d.outputs.items()}


def _block(inner: Region, path: str, fed: Mapping[str, Array]) -> dict[str, Array]:
    local = {Ref("", name): value for name, value in fed.items()}
    for step in inner.steps:
        if isinstance(step.body, Region):
            made = _block(step.body, f"{path}.{step.name}", {p: local[r[0]] for p, r in step.inputs.items()})
        else:
            made = call(f"{path}.{step.name}", step, [local[r] for refs in step.inputs.values() for r in refs])
        local.update({Ref(step.name, port): value for port, value in made.items()})
    return {name: local[ref] for name, ref in inner.outputs.items()}


def run(program: Program, facts: Mapping[Ref, Array]) -> dict[Ref, Array]:
    """Interpret a program. A derivation that needs what is not known is a KeyError."""
    known = dict(facts)
    for d in program.derivations:
        assert not set(d.needs) - known.keys(), f"{d} needs what is not known"
        if isinstance(d, Forward):
            made = evaluate(d, known)
        elif isinstance(d, Solve):
            result = getattr(component(d.path, d.step), d.rule.method)(
                *[None if r is None else known[r] for r in d.given]
            )
            made = dict(zip(d.targets, result if len(d.targets) > 1 else (result,), strict=True))
        elif isinstance(d, Linear):
            made = {
                target: sum((float(c) * known[ref] for ref, c in terms), np.zeros(1))
                for target, terms in zip(d.targets, d.terms, strict=True)
            }
        else:
            made = {d.target: fixed_point(d, known)}
        for ref, value in made.items():
            known.setdefault(ref, value)
    return known


def fixed_point(d: Contraction, known: Mapping[Ref, Array]) -> Array:
    x = known[d.value] / float(d.scale)
    for _ in range(3 * d.iterations):  # to 1e-18 of the start
        x = x + (known[d.value] - body(d, known, x)) / float(d.scale)
    return np.asarray(x)


def body(d: Contraction, known: Mapping[Ref, Array], x: Array) -> Array:
    inner = {ref: known[ref] for ref in d.needs} | {d.target: x}
    del inner[d.value]
    for part in d.body:
        inner.update({ref: v for ref, v in evaluate(part, inner).items() if ref not in d.known})
    return inner[d.value]


def facts(program: Program, values: Mapping[Ref, Array]) -> dict[Ref, Array]:
    """What a program starts from."""
    start = [*program.outputs.values(), *(Ref("", name) for name in program.given), *program.stored]
    return {ref: values[ref] for ref in start}


def log_det(program: Program, values: Mapping[Ref, Array]) -> float:
    """The sum over derivations, at the values of the forward pass."""
    total = 0.0
    for d in program.derivations:
        if isinstance(d, Solve) and d.log_det != "zero":
            assert d.log_det is not None
            arguments = [values[ref] for refs in d.inputs.values() for ref in refs]
            total += getattr(component(d.path, d.step), d.log_det)(*arguments)
        elif isinstance(d, Linear):
            total += float(np.log(float(d.factor))) * len(values[d.targets[0]])
        elif isinstance(d, Contraction):
            matrix = jacobian(partial(body, d, values), values[d.target])
            total += float(np.linalg.slogdet(matrix)[1])
    return total


def jacobian(function: Callable[[Array], Array], at: Array) -> Array:
    """By complex steps."""
    columns = [function(at + 1e-30j * unit).imag / 1e-30 for unit in np.eye(len(at))]
    return np.stack(columns, axis=1)


def dependents(outer: Region, names: Sequence[str]) -> set[Ref]:
    """The values that something leads to from inputs of these names, by their absolute names."""
    found = {Ref("", name) for name in names}

    def visit(inner: Region, prefix: str, moving: set[str]) -> set[str]:
        local = {Ref("", name) for name in moving}
        for step in inner.steps:
            if isinstance(step.body, Region):
                fed = {port for port, refs in step.inputs.items() if refs[0] in local}
                made = visit(step.body, f"{prefix}{step.name}.", fed)
            else:
                made = {p for p in step.outputs if any(r in local for refs in step.inputs.values() for r in refs)}
                found.update(Ref(f"{prefix}{step.name}", port) for port in made)
            local |= {Ref(step.name, port) for port in made}
        return {name for name, ref in inner.outputs.items() if ref in local}

    visit(outer, "", set(names))
    return found


def true_log_det(program: Program, values: Mapping[str, Array]) -> float:
    """log |det d outputs / d inputs| of the whole region, from its Jacobian. Inputs that are given stand still."""
    outer = program.region
    passed = set(program.outputs.values())
    types = outer.inputs
    free = [n for n in types if n not in program.given and Ref("", n) not in passed and types[n].kind == "float"]
    moving = dependents(outer, free)
    ends = [ref for ref in dict.fromkeys(program.outputs.values()) if ref.step and ref in moving]
    if not free:
        return 0.0
    cuts = np.cumsum([len(values[name]) for name in free])[:-1]

    def function(x: Array) -> Array:
        parts = dict(zip(free, np.split(x, cuts), strict=True))
        made = forward(outer, {name: parts.get(name, value) for name, value in values.items()})
        return np.concatenate([made[ref] for ref in ends])

    matrix = jacobian(function, np.concatenate([values[name] for name in free]))
    return float(np.linalg.slogdet(matrix)[1])
