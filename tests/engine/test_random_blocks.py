"""Random blocks of registered components, run by the engine: reconstruction, gradients and volumes against autograd.

References use neither the derivation nor the engine's backward pass: inputs that went in, gradients with stored
activations, and the Jacobian of a whole batch by autograd.
"""

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_graph.component.axes import PortType, Size, parse_port_type
from sedd_graph.component.registry import Registry, discover
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.drift import DriftWarning
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import RegionModule
from sedd_graph.graph.model import Claim, Op, Ref, Region, Running, Step
from sedd_graph.graph.unify import Binding
from sedd_graph.inverse import Program, Refusal, solve
from sedd_graph.inverse.format import explain
from tests.verify.test_inverse_liars import Count

WIDTH, ROWS, LENGTH = 4, 2, 3
NAMES = {"b": Size.of("batch"), "l": Size.of("length"), "d": Size.of(WIDTH)}
FLOAT, INT = parse_port_type("float b l d", NAMES), parse_port_type("int b l", NAMES)
BRANCHES: list[tuple[str, dict[str, Any]]] = [
    ("feed_forward", {}),
    ("layer_norm", {}),
    ("attention", {"heads": 2}),
    ("linear", {"width": WIDTH}),
]
BIJECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("act_norm", {}),
    ("plu", {}),
    ("orthogonal", {}),
    ("hadamard", {}),
    ("shuffle", {"seed": 1}),
    ("reverse", {}),
    ("roll", {"by": 2}),
    ("rotary_mix", {}),
]
FACTORS = (0.3, 0.1, -0.7, 2.0, 0.5, 1.0, 0.8775825618903728)
REGISTRY = discover() | Registry.of({"count": Count})


class Builder:
    """A block in the making. ``streams`` carry everything; ``beside`` are values that branches made of them, and givens."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        count = self.rng.choice([1, 2, 2, 3])
        self.inputs: dict[str, PortType] = {f"x{i}": FLOAT for i in range(count)}
        self.streams = [Ref("", name) for name in self.inputs]
        self.given = ["c"] if self.rng.random() < 0.6 else []
        self.beside = [Ref("", name) for name in self.given]
        self.inputs |= dict.fromkeys(self.given, FLOAT)
        self.integers: list[Ref] = []
        if self.rng.random() < 0.3:
            self.inputs["k"] = INT
            self.integers = [Ref("", "k")]
        self.steps: list[Step] = []
        self.types = {Ref("", name): found for name, found in self.inputs.items()}

    def node(self, op: str, refs: Sequence[Ref], config: dict[str, Any] | None = None) -> list[Ref]:
        contract = REGISTRY.contract(op)
        made = contract.config(**(config or {}))
        signature = contract.signature(made, {"*": len(refs), "xs": len(refs)})
        sizes = {n: Size.of(s) for n in ("width",) if (s := getattr(made, n, None)) is not None}
        binding = Binding(sizes)
        variadic = signature.inputs[0].variadic
        ports = [signature.inputs[0]] * len(refs) if variadic else list(signature.inputs[: len(refs)])
        for port, ref in zip(ports, refs, strict=True):
            binding.unify(port, self.types[ref])
        defaults = {"heads": Size.of(getattr(made, "heads", 1))}
        binding.finish(defaults)
        outputs = {port.name: binding.result(port) for port in signature.outputs}
        fed = {ports[0].name: tuple(refs)} if variadic else {p.name: (r,) for p, r in zip(ports, refs, strict=True)}
        name = f"n{len(self.steps)}"
        self.steps.append(Step(name, Op(contract, made, signature, binding.axes), fed, outputs, None, ("random", 1, 1)))
        found = [Ref(name, port) for port in outputs]
        self.types |= dict(zip(found, outputs.values(), strict=True))
        return found

    def grow(self) -> None:
        rng = self.rng
        at = rng.randrange(len(self.streams))
        x = self.streams[at]
        others = [r for r in [*self.streams, *self.beside] if r != x and self.types[r] == self.types[x]]
        what = rng.choice(["branch", "add", "add", "scale", "bijection", "bijection", "affine", "residual"])
        what = rng.choice([what, what, "pair", "moved", "halves", "count"])
        if what == "branch":
            self.beside += self.node(*self.branch([rng.choice([*self.streams, *self.beside])]))
        elif what == "add" and others:
            self.streams[at] = self.node(rng.choice(["add", "sub"]), [x, rng.choice(others)])[0]
        elif what == "scale":
            self.streams[at] = self.node("scale", [x], {"by": rng.choice(FACTORS)})[0]
        elif what == "bijection":
            op, config = rng.choice(BIJECTIONS)
            self.streams[at] = self.node(op, [x], config)[0]
        elif what == "affine" and len(others) > 1:
            self.streams[at] = self.node("affine", [x, *rng.sample(others, 2)])[0]
        elif what == "residual":
            f = self.node("lipschitz_linear", [x], {"width": WIDTH, "bound": 0.5})
            self.streams[at] = self.node("add", [x, *self.node("lipschitz_act", f)])[0]
        elif what == "pair" and len(self.streams) > 1:
            other = rng.choice([i for i in range(len(self.streams)) if i != at])
            pair = [x, self.streams[other]]
            self.streams[at], self.streams[other] = self.node("add", pair)[0], self.node("sub", pair)[0]
        elif what == "moved":
            turned = self.node("permute", [x], {"pattern": "b l d -> l b d"})
            op, config = rng.choice([("scale", {"by": 0.3}), ("act_norm", {}), ("reverse", {}), ("shuffle", {})])
            self.streams[at] = self.node("permute", self.node(op, turned, config), {"pattern": "l b d -> b l d"})[0]
        elif what == "halves":
            first, second = self.node("split", [x], {"sizes": (2, 2)})
            again = self.node("split", [x], {"sizes": (2, 2)}) if rng.random() < 0.5 else [first, second]
            moved = self.node("add", [again[1], *self.node("feed_forward", [first])])
            self.streams[at] = self.node("concat", [again[0], *moved])[0]
        elif what == "count" and self.integers:
            self.integers = self.node("count", self.integers)

    def branch(self, refs: list[Ref]) -> tuple[str, list[Ref], dict[str, Any]]:
        op, config = self.rng.choice(BRANCHES)
        return op, refs, config

    def region(self) -> Region:
        for _ in range(self.rng.randrange(1, 9)):
            self.grow()
        outputs = [*self.streams, *self.integers]
        if self.given and self.rng.random() < 0.4:
            outputs.append(self.rng.choice([Ref("", "c"), *self.node("scale", [Ref("", "c")], {"by": 2.0})]))
        if self.rng.random() < 0.1:
            outputs.append(self.rng.choice(outputs))
        if self.rng.random() < 0.1 and len(outputs) > 1:
            outputs.pop(0)
        if self.beside and self.rng.random() < 0.1:
            outputs.append(self.rng.choice(self.beside))
        named = {f"o{i}": ref for i, ref in enumerate(outputs)}
        claim = Claim(tuple(self.given), "injective", ("random", 1, 1), "block")
        return Region("block", self.inputs, named, tuple(self.steps), 0, "", claim)


def prepared(region: Region, seed: int, running: Running) -> RegionModule:
    """The module in float64 with random weights, some of them frozen, some shared by two components."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    module = build_block(region, REGISTRY, running=running).double().train()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    parts = list(module._modules.values())
    for first, second in itertools.pairwise(parts):
        same = type(first) is type(second) and rng.random() < 0.7
        owners = [dict(p.named_modules()) for p in (first, second) if p is not None]
        for path, part in owners[1].items() if same else ():
            for name in list(part._parameters):
                if part._parameters[name] is not None:
                    part._parameters[name] = owners[0][path]._parameters[name]
    for p in module.parameters():
        p.requires_grad_(rng.random() < 0.7)
    return module


def drawn(region: Region, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [[d.size.evaluate({"batch": ROWS, "length": LENGTH}) for d in t.dims] for t in region.inputs.values()]
    kinds = [t.kind for t in region.inputs.values()]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "float"
        else torch.randint(0, 5, shape, generator=generator)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]


def checked(seed: int, tally: Counter[str]) -> None:
    builder = Builder(seed)
    region = builder.region()
    program = solve(region, given=builder.given)
    assert explain(program)
    if isinstance(program, Refusal):
        tally["refused"] += 1
        assert isinstance(solve(region, given=builder.given, stored=program.remedy.values), Program)
        return
    tally[program.level] += 1
    inputs = drawn(region, seed)
    store = prepared(region, seed, Running("store"))
    with torch.no_grad():
        outputs = store(None, *inputs)  # ActNorm starts from this batch
        outputs = store(None, *inputs)
    reconstructed(region, builder, store, inputs, outputs)
    gradients(region, seed, store, inputs, tally)
    if program.level != "injective":
        volumes(region, builder, program, store, inputs, tally)


def reconstructed(
    region: Region, builder: Builder, module: RegionModule, inputs: list[Tensor], outputs: Sequence[Tensor]
) -> None:
    layout = Layout(region, builder.given)
    run = LayerRun(layout, module)
    for (name, value), x in zip(layout.inputs.items(), inputs, strict=True):
        if name in layout.given:
            run.values[value] = x
    run.put(layout.outputs.values(), outputs)
    run.invert()
    for (name, value), x in zip(layout.inputs.items(), inputs, strict=True):
        if name in layout.streams:
            assert run.values[value].dtype == x.dtype
            assert torch.allclose(run.values[value], x, rtol=1e-6, atol=1e-6)


def gradients(region: Region, seed: int, store: RegionModule, inputs: list[Tensor], tally: Counter[str]) -> None:
    reverse = prepared(region, seed, Running("reversible"))
    reverse.load_state_dict(store.state_dict())
    found = []
    for module in (store, reverse):
        leaves = [
            x.detach().clone().requires_grad_(x.is_floating_point() and i != seed % 5) for i, x in enumerate(inputs)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error", DriftWarning)
            outputs = module(None, *leaves)
            generator = torch.Generator().manual_seed(seed)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
            pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
            if not pairs:
                return
            torch.autograd.backward([o for o, _ in pairs], [w for _, w in pairs])
        found.append([*(x.grad for x in leaves), *(p.grad for p in module.parameters())])
        tally["frozen"] += any(not p.requires_grad for p in module.parameters())
        for p in module.parameters():
            p.grad = None
    names = [*region.inputs, *(n for n, _ in store.named_parameters())]
    scale = max(float(g.abs().max()) for g in found[0] if g is not None)
    for name, a, b in zip(names, *found, strict=True):
        expected = torch.zeros(()) if a is None else a
        assert torch.allclose(expected if b is None else b, expected, rtol=1e-6, atol=1e-7 * scale), name
    tally["gradients"] += 1


def volumes(
    region: Region,
    builder: Builder,
    program: Program,
    module: RegionModule,
    inputs: list[Tensor],
    tally: Counter[str],
) -> None:
    layout = Layout(region, builder.given)
    moving = {Ref("", name) for name in layout.streams}
    for step in region.steps:
        if any(r in moving for refs in step.inputs.values() for r in refs):
            moving |= {Ref(step.name, port) for port in step.outputs}
    wanted = [n for n in layout.streams if region.inputs[n].kind == "float"]
    ends = [n for n, r in region.outputs.items() if r in moving and region.output_types[n].kind == "float"]
    place = list(region.inputs)

    def function(*streams: Tensor) -> tuple[Tensor, ...]:
        rows = list(inputs)
        for name, x in zip(wanted, streams, strict=True):
            rows[place.index(name)] = x
        made = dict(zip(region.outputs, module(None, *rows), strict=True))
        return tuple(made[name] for name in ends)

    parts = torch.autograd.functional.jacobian(function, tuple(inputs[place.index(n)] for n in wanted))
    blocks = [[p.flatten(p.dim() - inputs[0].dim()).flatten(0, -2) for p in row] for row in parts]
    whole = torch.cat([torch.cat(row, 1) for row in blocks])
    expected = float(torch.linalg.slogdet(whole).logabsdet)
    assert whole.shape[0] == whole.shape[1]
    assert expected > -1e6
    if program.level == "volume_preserving":
        assert abs(expected) < 1e-6
    if program.unmeasured or program.mixed_rows:
        tally["mixed"] += bool(program.mixed_rows)
        return
    with torch.no_grad():
        run = LayerRun(layout, module)
        run.put(layout.inputs.values(), inputs)
        values = forward_with_log_det(run, ROWS)
    assert values.shape == (ROWS,)
    assert abs(float(values.sum()) - expected) < 1e-6 * (1 + abs(expected))
    row_of = torch.cat([torch.arange(ROWS).repeat_interleave(inputs[place.index(n)][0].numel()) for n in wanted])
    end_of = torch.cat([torch.arange(ROWS).repeat_interleave(LENGTH * WIDTH) for _ in ends])
    for row in range(ROWS):
        own = whole[end_of == row][:, row_of == row]
        assert float(whole[end_of == row][:, row_of != row].abs().max()) == 0
        assert abs(float(values[row]) - float(torch.linalg.slogdet(own).logabsdet)) < 1e-6 * (1 + abs(expected))
    tally["volumes"] += 1


def every(seeds: range) -> Counter[str]:
    tally: Counter[str] = Counter()
    for seed in seeds:
        try:
            checked(seed, tally)
        except Exception as error:
            raise AssertionError(f"block of seed {seed}: {type(error).__name__}: {error}") from error
    return tally


def test_random_blocks() -> None:
    tally = every(range(60))
    assert min(tally[k] for k in ("refused", "bijective", "gradients", "volumes", "mixed", "frozen")) >= 1, tally


@pytest.mark.slow
def test_two_thousand_random_blocks() -> None:
    tally = every(range(2_000))
    print(tally)
    assert min(tally[k] for k in ("refused", "bijective", "gradients", "volumes", "mixed", "frozen")) >= 30, tally
