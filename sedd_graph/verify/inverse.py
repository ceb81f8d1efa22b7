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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.reversible import DRIFT, DriftWarning, RunningModule
from sedd_graph.errors import UserError
from sedd_graph.graph.claims import Use, uses
from sedd_graph.graph.model import Graph, Running
from sedd_graph.inverse import Contraction
from sedd_graph.inverse.flat import flatten
from sedd_graph.verify.block_fixture import (
    BATCH,
    JACOBIAN,
    LENGTH,
    BlockFixture,
    batch_axis,
    relative_error,
)
from sedd_graph.verify.bounds import largest_slope
from sedd_graph.verify.decoding import decoders, reconstruction_error, uncertified
from sedd_graph.verify.faults import check_rules, located
from sedd_graph.verify.stream_dtypes import StreamDtypes
from sedd_graph.verify.volume import estimated_log_det, jacobian
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
LENGTHS = 1, 3
"""Numbers of positions per row at which log-determinants are compared."""
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


class _Finding(NamedTuple):
    """Result of a check: True if the claim holds (None for a note), the measured value, and how it was measured."""

    holds: bool | None
    value: str
    how: str


class _Pair(NamedTuple):
    """Log-determinant of the derivation beside that of the Jacobian, and the tolerance of their difference, nats."""

    found: float
    expected: float
    tolerance: float

    @property
    def excess(self) -> float:
        """Difference beyond the tolerance; infinite if one of the numbers is not finite."""
        return worst(abs(self.found - self.expected) - self.tolerance)


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
            yield self._check("log_det", claim, partial(self._log_det, dtype))
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

    def _check(self, name: str, claim: str, run: Callable[[], _Finding]) -> Check:
        """Return the result of the check ``run``; an error of any kind is a failure, with the component that raised it."""
        try:
            found = run()
        except Exception as error:  # third-party code may raise anything
            found = _Finding(False, located(error, self.layout.flat), _BROKEN)
        return Check(f"{self.use.name}.{name}", f"{self.use.name}: {claim}", *found)

    def _tolerance(self, dtype: torch.dtype) -> float:
        return SINGLE if dtype == torch.float32 else ITERATIVE if self.fixture.iterative else CLOSED

    def _round_trip(self, dtype: torch.dtype) -> _Finding:
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
        how = f"relative, {_name(dtype)}, {_listed(shapes)}, dropout on"
        return _Finding(worst(*errors) <= self._tolerance(dtype), f"{worst(*errors):.1e}", how)

    def _decoded(self) -> _Finding:
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
            return _Finding(None, f"{largest:.1e}, without a bound", f"{how}; {bounds[0]}")
        return _Finding(share <= 1, f"{largest:.1e}, {share:.2g} of the bound", how)

    def _log_det(self, dtype: torch.dtype) -> _Finding:
        program, region = self.layout.program, self.fixture.region
        if program.unmeasured:
            names = ", ".join(d.path for d in program.unmeasured)
            return _Finding(None, "not run", f"{names} declares no log-determinant")
        if program.mixed_rows:
            return _Finding(None, "not run", program.mixed_rows)
        layer = self.fixture.initialised(self.fixture.layer(dtype), self.fixture.inputs(dtype))
        types = [t for name in self.layout.streams if (t := region.inputs[name]).kind == "float"]
        sizes = {length: self.fixture.elements(types, length) for length in LENGTHS}
        lengths = [length for length, n in sizes.items() if n <= JACOBIAN]
        if not lengths and dtype != torch.float64:
            return _Finding(
                None, "not run", f"{sizes[LENGTHS[0]]:,} numbers per side at one position, in {_name(dtype)}"
            )
        pairs = [
            pair for length in lengths or LENGTHS[:1] for pair in self._log_dets(layer, dtype, length, bool(lengths))
        ]
        far = max(pairs, key=lambda pair: pair.excess)
        n = max(sizes[length] for length in lengths) if lengths else sizes[LENGTHS[0]]
        reference = (
            "slogdet of the Jacobian by autograd" if lengths else "estimated by Lanczos quadrature with 16 probes"
        )
        how = f"{reference}, {_name(dtype)}, {BATCH} rows of {_either(lengths or LENGTHS[:1])}, up to {n:,} numbers per side"
        shown = f"{far.found:.8g} against {far.expected:.8g} nats"
        return _Finding(far.excess <= 0, shown if lengths else f"{shown} (+-{far.tolerance:.2g})", how)

    def _log_dets(self, layer: RegionModule, dtype: torch.dtype, length: int, exact: bool) -> Iterator[_Pair]:
        """Yield the log-determinant of each row, in a batch and alone, with that of its Jacobian."""
        fixture, region = self.fixture, self.fixture.region
        inputs, key = fixture.inputs(dtype, BATCH, length), fixture.key()
        together = fixture.run(layer, key, inputs)
        values = forward_with_log_det(together, BATCH, exact_up_to=JACOBIAN)
        streams = [n for n, t in region.inputs.items() if n in self.layout.streams and t.kind == "float"]
        for row in range(BATCH):
            alone = fixture.run(layer, key[row : row + 1], fixture.row(inputs, row))
            value = forward_with_log_det(alone, 1, exact_up_to=JACOBIAN)
            self._independent(together, alone, row, dtype)
            function, x = self._function(layer, key, inputs, row, streams)
            if exact:
                expected, error = float(torch.linalg.slogdet(jacobian(function, x)).logabsdet), 0.0
            else:
                expected, error = estimated_log_det(function, x)
            tolerance = 10 * self._tolerance(value.dtype) * max(1.0, abs(expected)) + error
            yield _Pair(float(value), expected, tolerance)
            yield _Pair(float(values[row]), expected, tolerance)

    def _independent(self, together: LayerRun, alone: LayerRun, row: int, dtype: torch.dtype) -> None:
        """Verify that the outputs of a row in a batch are those of the row alone."""
        for name in self.fixture.moved:
            value = self.layout.outputs[name]
            axis = batch_axis(self.fixture.region.output_types[name])
            found = together.values[value] if axis is None else together.values[value].narrow(axis, row, 1)
            error = relative_error([found], [alone.values[value]])
            if not error <= self._tolerance(dtype):
                raise UserError(
                    f"the output {name!r} of a row depends on the other rows of the batch: it changes by {error:.1e} of its "
                    "size. A log-determinant of each row needs rows that are independent"
                )

    def _function(
        self, layer: RegionModule, key: Tensor, inputs: Sequence[Tensor], row: int, streams: Sequence[str]
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the map from the streams of one row to the outputs that depend on them, and the row.

        Both are flat: the streams, and the outputs, of real numbers are concatenated, [k, n].
        """
        fixture, region = self.fixture, self.fixture.region
        own = dict(zip(region.inputs, fixture.row(inputs, row), strict=True))
        ins = {name: batch_axis(region.inputs[name]) or 0 for name in streams}
        sizes = [own[name].numel() for name in streams]
        moved = [name for name in fixture.moved if region.output_types[name].kind == "float"]

        def function(x: Tensor) -> Tensor:
            rows = dict(zip(region.inputs, fixture.row(list(own.values()), 0, len(x)), strict=True))
            for name, part in zip(streams, x.split(sizes, dim=1), strict=True):
                shape = own[name].movedim(ins[name], 0).shape[1:]
                rows[name] = part.reshape(len(x), *shape).movedim(0, ins[name])
            made = RegionModule.forward(layer, key[row : row + 1].expand(len(x)), *rows.values())
            outputs = dict(zip(region.outputs, made, strict=False))
            return torch.cat(
                [outputs[name].movedim(batch_axis(region.output_types[name]) or 0, 0).flatten(1) for name in moved], 1
            )

        return function, torch.cat([own[name].movedim(ins[name], 0).flatten() for name in streams])

    def _contraction(self, dtype: torch.dtype, d: Contraction) -> _Finding:
        found = largest_slope(self.fixture, dtype, d)
        slack = 1e-6 if dtype == torch.float64 else 1e-2
        how = "largest slope of Jacobians (Lanczos iteration, and whole at some rows) and between rows, points near and far, weights small and large"
        return _Finding(
            found.slope <= d.bound * (1 + slack), f"{found.slope:.4g}", f"{how}; the largest: {found.where}"
        )

    @torch.enable_grad()
    def _gradients(self, dtype: torch.dtype) -> _Finding:
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
                how = f"relative error of the reconstructed inputs, {_name(dtype)}, {repeat or 1} deep, dropout on"
                return _Finding(False, f"{module.fallback:.1e}", how)
        pairs = _measurable(found[0], found[1], dtype)
        error = relative_error([b for _, b in pairs], [a for a, _ in pairs])
        how = f"the worst of {len(pairs)} inputs and weights, relative, {_name(dtype)}, {repeat or 1} deep, dropout on"
        return _Finding(error <= self._tolerance(dtype), f"{error:.1e}", how)

    def _recompute(self) -> _Finding:
        fixture = self.fixture
        inputs = fixture.inputs(torch.float32)
        layer = fixture.initialised(fixture.layer(torch.float32), inputs).to(self.device)
        inputs, key = [x.to(self.device) for x in inputs], fixture.key().to(self.device)
        first, second = (RegionModule.forward(layer, key, *inputs) for _ in range(2))
        same = all(map(torch.equal, first, second))
        value = "equal" if same else f"off by {relative_error(second, first):.1e}"
        return _Finding(same, value, f"torch.equal, float32 on {self.device.type}, dropout on")

    def _depth(self, grid: Grid | None, autocast: torch.dtype | None) -> _Finding:
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
            where += f"; streams enter as {', '.join(f'{n} {_name(d)}' for n, d in dtypes.items() if n in self.layout.streams)}"
        if grid is not None:
            same = all(equal for _, _, equal in found)
            value = "equal" if same else f"off by {worst(*(error for _, error, _ in found)):.1e}"
            return _Finding(same, value, f"torch.equal, {depth} deep, grid of 2^-{grid.bits}; {where}")
        text = ", ".join(f"{error:.1e} at {at}" for at, error, _ in found)
        if fixture.chains and 1 < depth < self.use.depth:
            further = _extrapolated([(at, error) for at, error, _ in found], self.use.depth)
            text += f"; {further:.1e} expected at {self.use.depth}"
        holds = None if autocast is not None else found[-1][1] <= DRIFT
        return _Finding(holds, text, f"relative, by depth; {where}{', emulated' if emulated else ''}")


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


def _either(lengths: Sequence[int]) -> str:
    return " and ".join(map(str, lengths))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
