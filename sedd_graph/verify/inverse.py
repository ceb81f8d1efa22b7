"""Numerical verification of derived inverses: tests of each invertible block alone, with random weights.

A tested block has its declared graph, Configs and widths; only batch size and length are small. The references do not
use the derivation: the original inputs, log-determinants and spectral norms of autograd Jacobians, and gradients with
stored activations.

Axes: b rows, l length, n elements of one sequence (all tensors of one row, flattened and concatenated).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.drift import DRIFT, DriftWarning
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.running import RunningModule
from sedd_graph.graph.claims import Use, uses
from sedd_graph.graph.model import Graph, Running
from sedd_graph.inverse import Contraction
from sedd_graph.inverse.flat import flatten
from sedd_graph.verify.block_fixture import (
    BATCH,
    LENGTH,
    BlockFixture,
    relative_error,
)
from sedd_graph.verify.bounds import largest_slope
from sedd_graph.verify.decoding import decoders, reconstruction_error, uncertified
from sedd_graph.verify.faults import check_rules, located
from sedd_graph.verify.inverse_log_det import Finding, check_log_det, dtype_name
from sedd_graph.verify.stream_dtypes import StreamDtypes
from sedd_graph.verify.worst import worst

__all__ = ["Certificate", "prove_inverses"]

WEIGHTS = 8_000_000
"""Maximum total number of weights of a stack of layers. Deeper stacks repeat layers with the same weights."""
DEPTH = 64
"""Maximum number of layers in a tested stack."""
EMULATED = 4_000_000
"""Maximum number of weights, all layers together, in the bfloat16 check on a CPU, which emulates bfloat16 and takes
hundreds of times longer."""
CLOSED, ITERATIVE, SINGLE = 1e-9, 1e-5, 1e-4
"""Relative tolerances: for closed-form inverses in float64, for iterative inverses in float64, and for float32."""
SHAPES = (BATCH, LENGTH), (3, 1), (1, 11)
"""Numbers of rows, and of positions per row, of the inputs that are reconstructed."""
ROW, VALUES = 64, 4096
"""Number of positions per row of the inputs with every value of an integer, and largest number of values."""
_BROKEN = "it could not be run"
_MEMORIES: tuple[Literal["store", "reversible"], ...] = ("store", "reversible")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Results of the checks of one block that is declared invertible.

    Attributes:
        use: The block, with its name and its dotted path in the graph.
        checks: Results of the checks.
    """

    use: Use
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """Checks that failed."""
        return tuple(c for c in self.checks if c.holds is False)


def prove_inverses(graph: Graph, registry: Registry, *, device: torch.device) -> list[Certificate]:
    """Verify each block of a graph that is declared invertible, within seconds per block.

    The state of torch's global random generator on the CPU is preserved.

    Args:
        graph: The expanded graph.
        registry: The installed components, from which the blocks are built.
        device: Device for the checks that depend on hardware: rounding errors of stacked layers, bfloat16, determinism.
            All other checks run on the CPU.

    Returns:
        One certificate for each invertible block.
    """
    found = []
    dtypes = StreamDtypes(graph, registry)
    for use in uses(graph.root):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found.append(Certificate(use, _checks(use, registry, device, dtypes)))
    return found


def _checks(use: Use, registry: Registry, device: torch.device, dtypes: StreamDtypes) -> tuple[Check, ...]:
    try:
        trial = _Trial(use, registry, device, dtypes)
    except Exception as error:  # third-party code may raise anything
        text = located(error, flatten(use.layer))
        claim = f"{use.name}: its inputs are reconstructed from its outputs"
        return (Check(f"{use.name}.round_trip", claim, False, text, _BROKEN),)
    return tuple(trial.checks())


class _Trial:
    """Runs the checks of one invertible block."""

    def __init__(self, use: Use, registry: Registry, device: torch.device, dtypes: StreamDtypes) -> None:
        self.use, self.device, self.dtypes = use, device, dtypes
        self.fixture = BlockFixture(use.layer, registry)
        self.layout = self.fixture.layout

    def checks(self) -> Iterator[Check]:
        """Run all checks and yield their results."""
        dtype = torch.float64
        try:
            self.fixture.initialised(self.fixture.layer(dtype), self.fixture.inputs(dtype))
        except Exception:  # a component does not take float64, or fails in any case, which the first check reports
            dtype = torch.float32
        first = self._check(
            "round_trip", "its inputs are reconstructed from its outputs", partial(self._round_trip, dtype)
        )
        yield first
        if first.how == _BROKEN:
            return
        for d in self.layout.program.derivations:
            if isinstance(d, Contraction):
                claim = f"the fixed-point map of {d.target} has a Lipschitz constant of at most {d.bound:.4g}"
                yield self._check("contraction", claim, partial(self._contraction, dtype, d))
        layer = self.fixture.layer(dtype)
        if uncertified(self.layout, layer) or any(isinstance(part, Code) for part in layer.modules()):
            claim = "vectors that are decoded to tokens are within their error bound"
            yield self._check("error", claim, self._decoded)
        if self.layout.program.level != "injective" and not self.layout.program.discrete:
            claim = "the log-determinant of the derived inverse equals that of the Jacobian"
            yield self._check("log_det", claim, partial(check_log_det, self.fixture, dtype, self._tolerance))
        if self.fixture.weights or any(found.kind == "float" for found in self.fixture.region.inputs.values()):
            claim = "gradients of reversible execution equal those of stored activations"
            yield self._check("gradients", claim, partial(self._gradients, dtype))
        yield self._check("recompute", "a second evaluation is equal to the last bit", self._recompute)
        if self.use.exact:
            claim = "exact arithmetic reconstructs the inputs to the last bit"
            yield self._check("exact", claim, partial(self._depth, Grid(), None))
        claim = f"inputs reconstructed in float32 are within the tolerance of the drift guard ({DRIFT:g})"
        yield self._check("float32", claim, partial(self._depth, None, None))
        if self.device.type == "cuda" or self.fixture.weights <= EMULATED:
            claim = "error of the inputs reconstructed under bfloat16 autocast"
            yield self._check("bfloat16", claim, partial(self._depth, None, torch.bfloat16))

    def _check(self, name: str, claim: str, run: Callable[[], Finding]) -> Check:
        """Return the result of the check ``run``; an error of any kind is a failure, with the component that raised it."""
        try:
            found = run()
        except Exception as error:  # third-party code may raise anything
            found = Finding(False, located(error, self.layout.flat), _BROKEN)
        return Check(f"{self.use.name}.{name}", f"{self.use.name}: {claim}", *found)

    def _tolerance(self, dtype: torch.dtype) -> float:
        return SINGLE if dtype == torch.float32 else ITERATIVE if self.fixture.iterative else CLOSED

    def _round_trip(self, dtype: torch.dtype) -> Finding:
        fixture = self.fixture
        inputs, key = fixture.inputs(dtype), fixture.key()
        layer = fixture.initialised(fixture.layer(dtype), inputs)
        run = fixture.run(layer, key, inputs)
        run.forward()
        check_rules(run)
        shapes, errors = list(SHAPES), []
        if fixture.integers:  # enough positions for every value
            values = min(max(fixture.integers.values()), VALUES)
            shapes.append((-(-values // ROW), ROW))
        for seed, (batch, length) in enumerate(shapes, 1):
            inputs, key = fixture.inputs(dtype, batch, length, seed), fixture.key(batch)
            outputs = RegionModule.forward(layer, key, *inputs)
            errors.append(relative_error(fixture.reconstruct(layer, key, inputs, outputs), fixture.streams(inputs)))
        how = f"relative, {dtype_name(dtype)}, {_listed(shapes)}, dropout on"
        return Finding(worst(*errors) <= self._tolerance(dtype), f"{worst(*errors):.1e}", how)

    def _decoded(self) -> Finding:
        """Compare the errors of vectors that the inverse decodes to tokens with their a-priori bounds."""
        fixture, bounds = self.fixture, list[str]()
        layout = Layout(self.use.layer, self.layout.given, Grid()) if self.use.exact else self.layout
        largest, share = 0.0, 0.0
        for seed, (batch, length) in enumerate(((BATCH, LENGTH), (1, ROW))):
            inputs, key = fixture.inputs(torch.float32, batch, length, seed), fixture.key(batch)
            layer = fixture.initialised(fixture.layer(torch.float32, seed), inputs)
            bounds += [
                f"{path} is no sedd_graph.plugin.Code: its margin is unknown" for path in uncertified(layout, layer)
            ]
            for found in decoders(layout, layer, length):
                error = reconstruction_error(layout, layer, key, inputs, found.vectors)
                largest = worst(largest, error)
                share = worst(share, error / found.error if error else 0.0)
                if math.isinf(found.error):
                    bounds.append(found.reason)
        how = f"Euclidean, float32, {BATCH} rows of {LENGTH} and 1 of {ROW}, random weights"
        if bounds:
            return Finding(None, f"{largest:.1e}, without a bound", f"{how}; {bounds[0]}")
        return Finding(share <= 1, f"{largest:.1e}, {share:.2g} of the bound", how)

    def _contraction(self, dtype: torch.dtype, d: Contraction) -> Finding:
        found = largest_slope(self.fixture, dtype, d)
        slack = 1e-6 if dtype == torch.float64 else 1e-2
        how = "largest slope of Jacobians (Lanczos iteration, and whole at some rows) and between rows, points near and far, weights small and large"
        return Finding(found.slope <= d.bound * (1 + slack), f"{found.slope:.4g}", f"{how}; the largest: {found.where}")

    @torch.enable_grad()
    def _gradients(self, dtype: torch.dtype) -> Finding:
        fixture = self.fixture
        repeat = 2 if fixture.chains and self.use.depth > 1 else 0
        found: list[tuple[Tensor, ...]] = []
        state: dict[str, Tensor] = {}
        for memory in _MEMORIES:
            with torch.no_grad():
                module = fixture.layer(dtype, repeat=repeat, running=Running(memory))
                state = state or fixture.initialised(module, fixture.inputs(dtype)).state_dict()
                module.load_state_dict(state)
            inputs = [x.requires_grad_(x.is_floating_point()) for x in fixture.inputs(dtype)]
            made = module(fixture.key(), *inputs)[: len(self.layout.outputs)]
            outputs = [o for o in made if o.requires_grad]
            generator = torch.Generator().manual_seed(3)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
            wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)
                found.append(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))
            # after a fallback, the gradients are not those of the inverse
            if isinstance(module, RunningModule) and module.fallback is not None:
                how = f"relative error of the reconstructed inputs, {dtype_name(dtype)}, {repeat or 1} deep, dropout on"
                return Finding(False, f"{module.fallback:.1e}", how)
        pairs = _measurable(found[0], found[1], dtype)
        error = relative_error([b for _, b in pairs], [a for a, _ in pairs])
        how = f"the worst of {len(pairs)} inputs and weights, relative, {dtype_name(dtype)}, {repeat or 1} deep, dropout on"
        return Finding(error <= self._tolerance(dtype), f"{error:.1e}", how)

    def _recompute(self) -> Finding:
        fixture = self.fixture
        inputs = fixture.inputs(torch.float32)
        layer = fixture.initialised(fixture.layer(torch.float32), inputs).to(self.device)
        inputs, key = [x.to(self.device) for x in inputs], fixture.key().to(self.device)
        first, second = (RegionModule.forward(layer, key, *inputs) for _ in range(2))
        same = all(map(torch.equal, first, second))
        value = "equal" if same else f"off by {relative_error(second, first):.1e}"
        return Finding(same, value, f"torch.equal, float32 on {self.device.type}, dropout on")

    def _depth(self, grid: Grid | None, autocast: torch.dtype | None) -> Finding:
        """Measure the reconstruction error of stacks of layers by depth, on ``grid`` or under ``autocast`` if given."""
        fixture, device = self.fixture, self.device
        emulated = autocast is not None and device.type != "cuda"
        affordable = max(1, EMULATED // max(1, fixture.weights)) if emulated else DEPTH
        depth = min(self.use.depth if fixture.chains else 1, affordable, DEPTH)
        dtypes = {} if autocast is None else self.dtypes.of(self.use, autocast)
        depths = sorted({2**i for i in range(depth.bit_length())} | {depth})
        different = max(1, min(depth, WEIGHTS // max(1, fixture.weights)))
        layers = fixture.chain(torch.float32, different, device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            found = list(fixture.round_trips(layers, depths, grid=grid, dtypes=dtypes))
        where = f"{different} different layer{'s' * (different > 1)}, on {device.type}"
        if dtypes:
            where += f"; streams enter as {', '.join(f'{n} {dtype_name(d)}' for n, d in dtypes.items() if n in self.layout.streams)}"
        if grid is not None:
            same = all(equal for _, _, equal in found)
            value = "equal" if same else f"off by {worst(*(error for _, error, _ in found)):.1e}"
            return Finding(same, value, f"torch.equal, {depth} deep, grid of 2^-{grid.bits}; {where}")
        text = ", ".join(f"{error:.1e} at {at}" for at, error, _ in found)
        if fixture.chains and 1 < depth < self.use.depth:
            further = _extrapolated([(at, error) for at, error, _ in found], self.use.depth)
            text += f"; {further:.1e} expected at {self.use.depth}"
        holds = None if autocast is not None else found[-1][1] <= DRIFT
        return Finding(holds, text, f"relative, by depth; {where}{', emulated' if emulated else ''}")


def _measurable(
    stored: Sequence[Tensor], reversible: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of gradients that have a relative error, which those that are zero up to rounding have not."""
    norms = [float(g.norm()) for g in stored]
    floor = worst(*(norm for norm in norms if math.isfinite(norm))) * torch.finfo(dtype).eps * 100
    pairs = zip(stored, reversible, norms, strict=True)
    return [(a, b) for a, b, norm in pairs if worst(norm, float(b.norm())) > floor]


def _extrapolated(errors: Sequence[tuple[int, float]], depth: int) -> float:
    """Extrapolate (depth, error) pairs to ``depth``, by a power law through the last two pairs."""
    (a, first), (b, last) = errors[-2:]
    power = math.log(max(last, 1e-30) / max(first, 1e-30)) / math.log(b / a)
    return float(last * (depth / b) ** max(power, 0.0))


def _listed(shapes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{rows} row{'s' * (rows > 1)} of {length}" for rows, length in shapes)
