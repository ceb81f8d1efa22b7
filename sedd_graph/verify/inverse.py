"""The derived inverses held to numbers: each block that claims one, by itself, with random weights and random inputs.

A block keeps its graph, its Configs and its widths; batch and length are shrunk. What it is held to are means that know
nothing of the derivation: the values that went in, the determinant and norm of Jacobians made by autograd, and gradients of
stored activations. Axes: b rows, l length, n numbers of one sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.engine import volume
from sedd_graph.engine.fixed_point import Map
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.reversible import DRIFT
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.claims import Use, uses
from sedd_graph.graph.model import Graph, Running
from sedd_graph.inverse import Contraction
from sedd_graph.verify.block_fixture import BATCH, JACOBIAN, LENGTH, BlockFixture, by_rows, jacobian, off

__all__ = ["Certificate", "prove_inverses"]

WEIGHTS = 8_000_000
"""How many different weights a chain of layers gets; beyond, layers share them."""
DEPTH = 64
"""The longest chain that is run."""
EMULATED = 1_000_000, 4
"""Weights of a layer, and layers, up to which bfloat16 is emulated on a CPU, which is hundreds of times slower there."""
_TOO_LARGE = f"the Jacobian of one position has {{n:,}} numbers a side; {JACOBIAN:,} are the most made"
CLOSED, ITERATIVE, SINGLE = 1e-9, 1e-5, 1e-4
"""Relative errors that are let pass: of closed forms and of iterations in float64, and in float32."""
_SCALES = 1.0, 0.1, 4.0
"""How large the inputs are at which slopes are measured."""
_WAYS: tuple[Literal["store", "reversible"], ...] = ("store", "reversible")


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
            found.append(Certificate(use, tuple(_Trial(use, registry, device).checks())))
    return found


class _Trial:
    """One claimed block, and what is asked of it."""

    def __init__(self, use: Use, registry: Registry, device: torch.device) -> None:
        self.use, self.device = use, device
        self.subject = BlockFixture(use.layer, registry)
        self.layout = self.subject.layout

    def checks(self) -> Iterator[Check]:
        dtype = torch.float64
        try:
            self.subject.started(self.subject.layer(dtype), self.subject.inputs(dtype))
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
        if self.device.type == "cuda" or self.subject.weights <= EMULATED[0]:
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
        return SINGLE if dtype == torch.float32 else ITERATIVE if self.subject.iterative else CLOSED

    def _round_trip(self, dtype: torch.dtype) -> tuple[bool, str, str]:
        subject = self.subject
        inputs, key = subject.inputs(dtype), subject.key()
        layer = subject.started(subject.layer(dtype), inputs)
        outputs = RegionModule.forward(layer, key, *inputs)
        error = off(subject.undone(layer, key, inputs, outputs), subject.streams(inputs))
        how = f"relative, {_name(dtype)}, {BATCH} rows of {LENGTH}, dropout on"
        return error <= self._tolerance(dtype), f"{error:.1e}", how

    def _log_det(self, dtype: torch.dtype) -> tuple[bool | None, str, str]:
        if self.layout.program.unmeasured:
            names = ", ".join(d.path for d in self.layout.program.unmeasured)
            return None, "not run", f"{names} declares no log-determinant"
        subject, region = self.subject, self.subject.region
        types = [region.inputs[name] for name in self.layout.streams]
        length, n = subject.short(types)
        if n > JACOBIAN or not all(by_rows(t) and t.kind == "float" for t in (*types, *region.output_types.values())):
            return None, "not run", _TOO_LARGE.format(n=n)
        layer = subject.started(subject.layer(dtype), subject.inputs(dtype))
        inputs, key = subject.inputs(dtype, 1, length), subject.key(1)
        found = float(volume.forward(self.layout, layer, key, subject.fed(inputs), 1, exact_up_to=JACOBIAN))

        def outputs(rows: Sequence[Tensor]) -> Sequence[Tensor]:
            return RegionModule.forward(layer, key.expand(n), *rows)[: len(region.outputs)]

        at = [list(region.inputs).index(name) for name in self.layout.streams]
        expected = float(torch.linalg.slogdet(jacobian(outputs, subject.copies(inputs, n), at)).logabsdet)
        holds = abs(found - expected) <= 10 * self._tolerance(dtype) * max(1.0, abs(expected))
        how = f"slogdet of the Jacobian by autograd, {_name(dtype)}, 1 row of {length}, {n:,} numbers a side"
        return holds, f"{found:.8g} against {expected:.8g} nats", how

    def _contraction(self, dtype: torch.dtype, d: Contraction) -> tuple[bool | None, str, str]:
        subject, found = self.subject, self.layout.program.types[d.target]
        length, n = subject.short([found])
        if n > JACOBIAN or not by_rows(found):
            return None, "not run", _TOO_LARGE.format(n=n)
        layer = subject.started(subject.layer(dtype), subject.inputs(dtype))
        worst = 0.0
        for seed, scale in enumerate(_SCALES):
            inputs = [x * scale if x.is_floating_point() else x for x in subject.inputs(dtype, 1, length, seed)]
            values = subject.filled(layer, None, subject.copies(inputs, n))
            g = self.layout.remainder(d, layer, None, values)

            def remainder(rows: Sequence[Tensor], g: Map = g) -> Sequence[Tensor]:
                return [g(rows[0])]

            slopes = jacobian(remainder, [values[self.layout.index[d.target]]], [0])
            worst = max(worst, float(torch.linalg.matrix_norm(slopes, 2)))
        how = f"spectral norm of the Jacobian at {len(_SCALES)} points, 1 row of {length}, {n:,} numbers a side"
        return worst <= d.bound * (1 + 1e-6), f"{worst:.4g}", how

    @torch.enable_grad()
    def _gradients(self, dtype: torch.dtype) -> tuple[bool, str, str]:
        subject = self.subject
        repeat = 2 if subject.chains and self.use.depth > 1 else 0
        found: list[tuple[Tensor, ...]] = []
        state: dict[str, Tensor] = {}
        for memory in _WAYS:
            with torch.no_grad():
                module = subject.layer(dtype, repeat=repeat, running=Running(memory))
                state = state or subject.started(module, subject.inputs(dtype)).state_dict()
                module.load_state_dict(state)
            inputs = [x.requires_grad_(x.is_floating_point()) for x in subject.inputs(dtype)]
            outputs = module(subject.key(), *inputs)[: len(self.layout.outputs)]
            generator = torch.Generator().manual_seed(3)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
            wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
            found.append(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))
        # what is zero but for rounding is nobody's gradient
        floor = max(float(g.norm()) for g in found[0]) * torch.finfo(dtype).eps * 100
        pairs = [(a, b) for a, b in zip(*found, strict=True) if max(float(a.norm()), float(b.norm())) > floor]
        error = off([b for _, b in pairs], [a for a, _ in pairs])
        how = f"the worst of {len(pairs)} inputs and weights, relative, {_name(dtype)}, {repeat or 1} deep, dropout on"
        return error <= self._tolerance(dtype), f"{error:.1e}", how

    def _recompute(self) -> tuple[bool, str, str]:
        subject = self.subject
        inputs = subject.inputs(torch.float32)
        layer = subject.started(subject.layer(torch.float32), inputs).to(self.device)
        inputs, key = [x.to(self.device) for x in inputs], subject.key().to(self.device)
        first, second = (RegionModule.forward(layer, key, *inputs) for _ in range(2))
        same = all(map(torch.equal, first, second))
        value = "equal" if same else f"off by {off(second, first):.1e}"
        return same, value, f"torch.equal, float32 on {self.device.type}, dropout on"

    def _depth(self, grid: Grid | None, autocast: torch.dtype | None) -> tuple[bool | None, str, str]:
        """The round trip of chains of layers, by depth."""
        subject, device = self.subject, self.device
        emulated = autocast is not None and device.type != "cuda"
        depth = min(self.use.depth if subject.chains else 1, EMULATED[1] if emulated else DEPTH)
        depths = sorted({2**i for i in range(depth.bit_length())} | {depth})
        different = max(1, min(depth, WEIGHTS // max(1, subject.weights)))
        layers = subject.chain(torch.float32, different, device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            found = list(subject.rebuilt(layers, depths, grid=grid))
        where = f"{different} different layer{'s' * (different > 1)}, on {device.type}"
        if grid is not None:
            same = all(equal for _, _, equal in found)
            value = "equal" if same else f"off by {max(error for _, error, _ in found):.1e}"
            return same, value, f"torch.equal, {depth} deep, grid of 2^-{grid.bits}; {where}"
        text = ", ".join(f"{error:.1e} at {at}" for at, error, _ in found)
        if subject.chains and depth < self.use.depth and not emulated:
            further = _extrapolated([(at, error) for at, error, _ in found], self.use.depth)
            text += f"; {further:.1e} expected at {self.use.depth}"
        holds = None if autocast is not None else found[-1][1] <= DRIFT
        return holds, text, f"relative, by depth; {where}{', emulated' if emulated else ''}"


def _extrapolated(errors: Sequence[tuple[int, float]], depth: int) -> float:
    """A power law through the last two depths."""
    (a, first), (b, last) = errors[-2:]
    power = math.log(max(last, 1e-30) / max(first, 1e-30)) / math.log(b / a)
    return float(last * (depth / b) ** max(power, 0.0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
