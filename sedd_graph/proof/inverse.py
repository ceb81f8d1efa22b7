"""The derived inverses held to numbers: each block that claims one, by itself, with random weights and random inputs.

A block keeps its graph, its Configs and its widths; batch and length are shrunk. What it is held to are means that know
nothing of the derivation: the values that went in, the determinant and norm of Jacobians made by autograd, and gradients of
stored activations. Axes: b rows, l length, n numbers of one sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sedd_graph.axes import PortType, Size
from sedd_graph.engine.construct import build_block, count_parameters
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.reversible import DRIFT
from sedd_graph.engine.units import Layout, Values
from sedd_graph.engine.volume import log_det
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.claims import Use, uses
from sedd_graph.graph.model import Graph, Running
from sedd_graph.inverse import Contraction, Solve
from sedd_graph.plugins import Registry
from sedd_graph.proof.check import Check

__all__ = ["Certificate", "prove_inverses"]

BATCH, LENGTH = 2, 6
JACOBIAN = 1536
"""The largest Jacobian that is made, numbers a side."""
WEIGHTS = 8_000_000
"""How many different weights a chain of layers gets; beyond, layers share them."""
DEPTH = 64
"""The longest chain that is run."""
EMULATED = 1_000_000, 4
"""Weights of a layer, and layers, up to which bfloat16 is emulated on a CPU, which is hundreds of times slower there."""
_TOO_LARGE = f"the Jacobian of one position has {{n:,}} numbers a side; {JACOBIAN:,} are the most made"
CLOSED, ITERATIVE, SINGLE = 1e-9, 1e-5, 1e-4
"""Relative errors that are let pass: of closed forms and of iterations in float64, and in float32."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was found of one block's claim. ``use`` says where the block stands."""

    use: Use
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.holds is False)


def prove_inverses(graph: Graph, registry: Registry, *, device: torch.device) -> list[Certificate]:
    """A certificate for each block that claims to be invertible, from seconds of work whatever its size.

    What depends on hardware (rounding by depth, bfloat16, determinism) is run on ``device``; torch's own generators are
    left as they are.
    """
    found = []
    for use in uses(graph.root):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found.append(Certificate(use, tuple(_Subject(use, registry, device).checks())))
    return found


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def _by_rows(found: PortType) -> bool:
    """Whether the first axis is the batch, and no other is."""
    return [i for i, d in enumerate(found.dims) if "batch" in d.size.symbols] == [0] and found.dims[0].size == Size.of("batch")  # fmt: skip


def _off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error."""
    return max(
        (float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)),
        default=0.0,
    )  # fmt: skip


class _Subject:
    """One claimed block: how it is made small, and what is asked of it."""

    def __init__(self, use: Use, registry: Registry, device: torch.device) -> None:
        self.use, self.region, self.registry, self.device = use, use.layer, registry, device
        assert self.region.claim is not None
        self.layout = Layout(self.region, self.region.claim.given)
        self.iterative = any(
            isinstance(d, Contraction) or (isinstance(d, Solve) and d.rule.iterative)
            for d in self.layout.program.derivations
        )
        self.weights = count_parameters(self._meta())
        self.chains = self.region.outputs.keys() <= self.region.inputs.keys() and all(
            t == self.region.inputs[n] for n, t in self.region.output_types.items()
        )

    # -- instances --------------------------------------------------------------------------------------------------

    def _meta(self) -> RegionModule:
        with torch.device("meta"):
            return build_block(self.region, self.registry)

    def layer(
        self, dtype: torch.dtype, seed: int = 0, *, repeat: int = 0, running: Running | None = None
    ) -> RegionModule:
        """The block with random weights: gates and couplings that start at zero are moved off it."""
        torch.manual_seed(seed)
        made = build_block(self.region, self.registry, repeat=repeat, running=running or Running())
        for parameter in made.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.add_(torch.randn_like(parameter) * size * (0.2 if parameter.any() else 1.0))
        return made.to(dtype).train()

    def inputs(self, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
        """Random inputs in order; of a mask the last row's last position is hidden."""
        generator = torch.Generator().manual_seed(seed)

        def draw(found: PortType) -> Tensor:
            shape = _shape(found, batch, length)
            if found.kind == "float":
                return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if found.kind == "int":
                return torch.randint(0, 2, shape, generator=generator)
            shown = torch.ones(shape, dtype=torch.bool)
            if length > 1:
                shown[(-1,) * len(shape)] = False
            return shown

        return [draw(t) for t in self.region.inputs.values()]

    def key(self, batch: int = BATCH) -> Tensor:
        return torch.arange(1, batch + 1, dtype=torch.int32) * 7919

    def started(self, layer: RegionModule, inputs: Sequence[Tensor]) -> RegionModule:
        """The layer once it has seen a batch: what starts from data (ActNorm) has started."""
        layer(None, *inputs)
        return layer

    def streams(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        by_name = dict(zip(self.region.inputs, inputs, strict=True))
        return [by_name[name] for name in self.layout.streams]

    # -- the claims -------------------------------------------------------------------------------------------------

    def checks(self) -> Iterator[Check]:
        dtype = torch.float64
        try:
            self.started(self.layer(dtype), self.inputs(dtype))
        except (RuntimeError, TypeError):
            dtype = torch.float32  # a component that does not take float64
        yield self._guarded("round_trip", "its inputs are had back from its outputs", self._round_trip, dtype)
        for d in self.layout.program.derivations:
            if isinstance(d, Contraction):
                claim = f"what is undone by iteration moves at most {d.bound:.4g} times as far as {d.target}"
                yield self._guarded("contraction", claim, self._contraction, dtype, d)
        if self.layout.program.level != "injective":
            claim = "the log-determinant of the derived inverse is that of the Jacobian"
            yield self._guarded("log_det", claim, self._log_det, dtype)
        claim = "gradients of reversible execution are those of stored activations"
        yield self._guarded("gradients", claim, self._gradients, dtype)
        yield self._guarded("recompute", "evaluated again it gives the same to the last bit", self._recompute)
        if self.use.exact:
            claim = "exact arithmetic gives the inputs back to the last bit"
            yield self._guarded("exact", claim, self._depth, Grid(), None)
        claim = f"rebuilt in float32 its inputs are off by less than the drift guard lets pass ({DRIFT:g})"
        yield self._guarded("float32", claim, self._depth, None, None)
        if self.device.type == "cuda" or self.weights <= EMULATED[0]:
            claim = "how far off its inputs are, rebuilt under bfloat16 autocast"
            yield self._guarded("bfloat16", claim, self._depth, None, torch.bfloat16)

    def _guarded(self, name: str, claim: str, run: Any, *arguments: Any) -> Check:
        """The check; an iteration that does not converge, or values that leave the grid, are its finding."""
        try:
            holds, value, how = run(*arguments)
        except SeddGraphError as error:
            holds, value, how = False, str(error), "it could not be run"
        return Check(f"{self.use.name}.{name}", f"{self.use.name}: {claim}", holds, value, how)

    def _tolerance(self, dtype: torch.dtype) -> float:
        return SINGLE if dtype == torch.float32 else ITERATIVE if self.iterative else CLOSED

    def _round_trip(self, dtype: torch.dtype) -> tuple[bool, str, str]:
        inputs, key = self.inputs(dtype), self.key()
        layer = self.started(self.layer(dtype), inputs)
        outputs = RegionModule.forward(layer, key, *inputs)
        found = self._undone(self.layout, layer, key, inputs, outputs)
        error = _off(found, self.streams(inputs))
        how = f"relative, {_name(dtype)}, {BATCH} rows of {LENGTH}, dropout on"
        return error <= self._tolerance(dtype), f"{error:.1e}", how

    def _undone(
        self,
        layout: Layout,
        layer: RegionModule,
        key: Tensor | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> list[Tensor]:
        """The streams, rebuilt from outputs and what is given."""
        values: Values = [None] * layout.count
        for name, x in zip(layout.inputs, inputs, strict=True):
            if name in layout.constants:
                values[layout.inputs[name]] = x
        for value, x in zip(layout.outputs.values(), outputs, strict=False):
            values[value] = x
        layout.undo(layer, key, values, [False] * layout.count)
        return [values[layout.inputs[name]] for name in layout.streams]

    def _filled(self, layer: RegionModule, key: Tensor | None, inputs: Sequence[Tensor]) -> Values:
        values: Values = [None] * self.layout.count
        for value, x in zip(self.layout.inputs.values(), inputs, strict=True):
            values[value] = x
        self.layout.forward(layer, key, values)
        return values

    def _short(self, refs: Sequence[PortType]) -> tuple[int, int]:
        """The length of a sequence, and how many numbers of ``refs`` are in it, that a Jacobian can be made of."""
        counts = [(l, sum(math.prod(_shape(t, 1, l)) for t in refs)) for l in (4, 2, 1)]
        return next(((l, n) for l, n in counts if n <= JACOBIAN), counts[-1])

    def _log_det(self, dtype: torch.dtype) -> tuple[bool | None, str, str]:
        if self.layout.program.unmeasured:
            names = ", ".join(d.path for d in self.layout.program.unmeasured)
            return None, "not run", f"{names} declares no log-determinant"
        types = [self.region.inputs[name] for name in self.layout.streams]
        length, n = self._short(types)
        if n > JACOBIAN or not all(
            _by_rows(t) and t.kind == "float" for t in (*types, *self.region.output_types.values())
        ):
            return None, "not run", _TOO_LARGE.format(n=n)
        layer = self.started(self.layer(dtype), self.inputs(dtype))
        inputs, key = self.inputs(dtype, 1, length), self.key(1)
        found = float(log_det(self.layout, layer, key, self._filled(layer, key, inputs), 1, exact_up_to=JACOBIAN))
        at = [list(self.layout.inputs).index(name) for name in self.layout.streams]
        jacobian = _jacobian(
            lambda rows: RegionModule.forward(layer, self.key(1).expand(n), *rows)[: len(self.layout.outputs)],
            [x.expand(n, *x.shape[1:]) if _by_rows(t) else x for x, t in zip(inputs, self.region.inputs.values(), strict=True)],
            at,
        )  # fmt: skip
        expected = float(torch.linalg.slogdet(jacobian).logabsdet)
        size = max(1.0, abs(expected))
        how = f"slogdet of the Jacobian by autograd, {_name(dtype)}, 1 row of {length}, {n} numbers a side"
        return (
            abs(found - expected) <= 10 * self._tolerance(dtype) * size,
            f"{found:.8g} against {expected:.8g} nats",
            how,
        )

    def _contraction(self, dtype: torch.dtype, d: Contraction) -> tuple[bool | None, str, str]:
        found = self.layout.program.types[d.target]
        length, n = self._short([found])
        if n > JACOBIAN or not _by_rows(found):
            return None, "not run", _TOO_LARGE.format(n=n)
        layer = self.started(self.layer(dtype), self.inputs(dtype))
        slopes = []
        for seed, scale in enumerate((1.0, 0.1, 4.0)):
            inputs = [x * scale if x.is_floating_point() else x for x in self.inputs(dtype, 1, length, seed)]
            wide = [x.expand(n, *x.shape[1:]) if _by_rows(t) else x for x, t in zip(inputs, self.region.inputs.values(), strict=True)]  # fmt: skip
            values = self._filled(layer, None, wide)
            g = self.layout.remainder(d, layer, None, values)
            jacobian = _jacobian(lambda rows, g=g: (g(rows[0]),), [values[self.layout.index[d.target]]], [0])
            slopes.append(float(torch.linalg.matrix_norm(jacobian, 2)))
        how = f"spectral norm of the Jacobian at {len(slopes)} points, 1 row of {length}, {n} numbers a side"
        return max(slopes) <= d.bound * (1 + 1e-6), f"{max(slopes):.4g}", how

    @torch.enable_grad()
    def _gradients(self, dtype: torch.dtype) -> tuple[bool, str, str]:
        repeat = 2 if self.chains and self.use.depth > 1 else 0
        found: list[list[Tensor]] = []
        state: dict[str, Tensor] = {}
        for memory in ("store", "reversible"):
            with torch.no_grad():
                module = self.layer(dtype, repeat=repeat, running=Running(memory))
                if memory == "store":
                    state = self.started(module, self.inputs(dtype)).state_dict()
                module.load_state_dict(state)
            inputs = [x.requires_grad_(x.is_floating_point()) for x in self.inputs(dtype)]
            outputs = module(self.key(), *inputs)[: len(self.layout.outputs)]
            generator = torch.Generator().manual_seed(3)
            total = sum(
                (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for o in outputs
            )
            wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
            made = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
            found.append([*made])
        floor = (
            max(float(g.norm()) for g in found[0]) * torch.finfo(dtype).eps * 100
        )  # what is zero but for rounding is nobody's gradient
        pairs = [(a, b) for a, b in zip(*found, strict=True) if max(float(a.norm()), float(b.norm())) > floor]
        error = _off([b for _, b in pairs], [a for a, _ in pairs])
        how = (
            f"the worst of {len(pairs)} inputs and parameters, relative, {_name(dtype)}, {repeat or 1} deep, dropout on"
        )
        return error <= self._tolerance(dtype), f"{error:.1e}", how

    def _recompute(self) -> tuple[bool, str, str]:
        inputs = self.inputs(torch.float32)
        layer = self.started(self.layer(torch.float32), inputs).to(self.device)
        inputs, key = [x.to(self.device) for x in inputs], self.key().to(self.device)
        first, second = (RegionModule.forward(layer, key, *inputs) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        error = _off(second, first)
        return (
            same,
            "equal" if same else f"off by {error:.1e}",
            f"torch.equal, float32 on {self.device.type}, dropout on",
        )

    def _depth(self, grid: Grid | None, autocast: torch.dtype | None) -> tuple[bool | None, str, str]:
        """The round trip of chains of layers, by depth."""
        layout = self.layout if grid is None else Layout(self.region, self.layout.constants, grid)
        emulated = autocast is not None and self.device.type != "cuda"
        depth = min(self.use.depth if self.chains else 1, DEPTH, EMULATED[1] if emulated else DEPTH)
        different = max(1, min(depth, WEIGHTS // max(1, self.weights)))
        given = self.inputs(torch.float32)
        layers = [self.started(self.layer(torch.float32, seed), given).to(self.device) for seed in range(different)]
        given = [x.to(self.device) for x in given]
        if grid is not None:
            given = [grid.snap(x) if n in layout.streams else x for n, x in zip(layout.inputs, given, strict=True)]
        key = self.key().to(self.device)
        cast = contextlib.nullcontext() if autocast is None else torch.autocast(self.device.type, autocast, cache_enabled=False)  # fmt: skip
        errors: dict[int, float] = {}
        equal = True
        with cast:
            states = [given]
            for at in range(depth):
                values: Values = [None] * layout.count
                for value, x in zip(layout.inputs.values(), states[-1], strict=True):
                    values[value] = x
                layout.forward(layers[at % different], key + at, values)
                made = dict(zip(layout.outputs, [values[v] for v in layout.outputs.values()], strict=True))
                if grid is not None:
                    grid.hold(list(made.values()), f"block {self.region.label!r}")
                last = made
                states.append([made.get(n, x) for n, x in zip(layout.inputs, states[-1], strict=True)])
                if at + 1 == depth or (at + 1).bit_count() == 1:  # 1, 2, 4, ... and the whole depth
                    known = last
                    for below in reversed(range(at + 1)):
                        outputs = [known[n] for n in layout.outputs]
                        rebuilt = self._undone(layout, layers[below % different], key + below, states[below], outputs)
                        known = dict(zip(layout.streams, rebuilt, strict=True))
                    expected = [dict(zip(layout.inputs, given, strict=True))[n] for n in layout.streams]
                    errors[at + 1] = _off(rebuilt, expected)
                    equal = equal and all(torch.equal(a, b) for a, b in zip(rebuilt, expected, strict=True))
        worst = errors[depth]
        estimate = ""
        if depth < self.use.depth and not emulated and self.chains:
            estimate = f"; {_extrapolated(errors, self.use.depth):.1e} expected at {self.use.depth}"
        text = ", ".join(f"{error:.1e} at {d}" for d, error in errors.items()) + estimate
        how = f"relative, by depth, {'emulated on a CPU' if emulated else f'on {self.device.type}'}; {different} different layer" + "s" * (different > 1)  # fmt: skip
        if grid is not None:
            return equal, "equal" if equal else f"off by {worst:.1e}", f"torch.equal, {depth} deep, grid of 2^-{grid.bits}, on {self.device.type}"  # fmt: skip
        return (None if autocast is not None else worst <= DRIFT), text, how


def _extrapolated(errors: dict[int, float], depth: int) -> float:
    """A power law through the last two depths."""
    (a, first), (b, last) = list(errors.items())[-2:]
    power = math.log(max(last, 1e-30) / max(first, 1e-30)) / math.log(b / a)
    return float(last * (depth / b) ** max(power, 0.0))


@torch.enable_grad()
def _jacobian(function: Any, rows: Sequence[Tensor], at: Sequence[int]) -> Tensor:
    """The Jacobian [n, n] of one sequence, of which all n rows are copies: one backward pass with another number each."""
    leaves = [x.detach().clone().requires_grad_(i in at) for i, x in enumerate(rows)]
    outputs = torch.cat([o.flatten(1) for o in function(leaves)], dim=1)
    eye = torch.eye(len(outputs), dtype=outputs.dtype)
    if not outputs.requires_grad:
        return torch.zeros_like(eye)
    made = torch.autograd.grad(outputs, [leaves[i] for i in at], eye, materialize_grads=True)
    return torch.cat([g.flatten(1) for g in made], dim=1).double()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
