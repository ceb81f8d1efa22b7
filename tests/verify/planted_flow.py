"""Processes with a probability-flow ODE and planted faults, and the check that must find each."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from sedd_graph_registry.noise.schedules_gumbel import Gumbel
from sedd_graph_registry.vectors.langflow import LangFlow
from sedd_graph_registry.vectors.normalized import NormalizedGaussian
from sedd_graph_registry.vectors.ode import Ode
from sedd_graph_registry.vectors.reversible import ReversibleHeun
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.vectors import flow
from sedd_graph.diffusion.vectors.flow import Flow, FlowLikelihood, root_snr
from sedd_graph.diffusion.vectors.gaussian import along, noise_std
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.reversible import Field, Level, State
from sedd_graph.diffusion.vectors.sampler import VectorWalk

__all__ = ["FAULTS", "FlowFault", "parts"]


def parts(**changed: Any) -> VectorParts:
    """Return the components of LangFlow with three tokens, some of them changed; values are classes."""
    context = Context({"n": 3})
    made = {
        "kernel": changed.get("kernel", NormalizedGaussian)(
            NormalizedGaussian.toy(NormalizedGaussian.Config(vocab=3, width=128), 3), context
        ),
        "schedule": changed.get("schedule", Gumbel)(Gumbel.Config(location=3.0, entropy=3.0), context),
        "objective": changed.get("objective", LangFlow)(LangFlow.Config(), context),
        "sampler": changed.get("sampler", Ode)(Ode.Config(), context),
    }
    return VectorParts(*made.values())


@dataclasses.dataclass(frozen=True)
class FlowFault:
    """A process with one fault.

    Attributes:
        name: The fault in words.
        part: The component that has it, ``reversible`` for a reversible sampler, or ``flow`` for the ODE of the objective.
        caught: Suffixes of the names of checks, one of which must fail.
        methods: Methods that replace those of the sound class.
        group: The check function that finds it: ``fitted``, ``flow``, ``order``, ``inverse``, ``law``, ``objective``,
            ``kernel`` or ``sampler``.
    """

    name: str
    part: str
    caught: str
    methods: dict[str, Any]
    group: str

    def parts(self) -> VectorParts:
        """Return the components with the fault."""
        if self.part == "flow":
            faulty: Any = dataclasses.dataclass(frozen=True, kw_only=True)(type("Faulty", (Flow,), self.methods))

            def own(objective: Any, kernel: Any, schedule: Any) -> Flow:
                sound = LangFlow.flow(objective, kernel, schedule)
                made: Flow = faulty(**{f.name: getattr(sound, f.name) for f in dataclasses.fields(Flow)})
                return made

            return parts(objective=type("Planted", (LangFlow,), {"flow": own}))
        bases = {
            "kernel": NormalizedGaussian,
            "schedule": Gumbel,
            "objective": LangFlow,
            "sampler": Ode,
            "reversible": ReversibleHeun,
        }
        part = "sampler" if self.part == "reversible" else self.part
        return parts(**{part: type("Planted", (bases[self.part],), self.methods)})


def likelihood(change: Callable[[FlowLikelihood], FlowLikelihood]) -> dict[str, Any]:
    """Change the terms of the likelihood."""
    return {"likelihood": lambda self, *a, **k: change(Flow.likelihood(self, *a, **k))}


def walk(step: Callable[..., Tensor]) -> dict[str, Any]:
    """Replace the steps of the sampler: ``step(sampler, walk, t, s, y, start, end)`` returns y at s."""

    def run(self: Any, walk: VectorWalk, times: Tensor) -> None:
        every = [t.expand(len(walk.x)) for t in times]
        for t, s in itertools.pairwise(every):
            here, there = walk.sigma(t), walk.sigma(s)
            y = walk.x / along(noise_std(here), walk.x)
            found = step(self, walk, t, s, y, root_snr(here), root_snr(there))
            walk.put(along(noise_std(there), found) * found, s)
            walk.end_step()
        walk.put(walk.kernel.embed(walk.estimate(every[-1]).logits.argmax(-1)), torch.zeros_like(every[-1]))
        walk.end_step()

    return {"walk": run}


def half_heun(self: Any, walk: VectorWalk, t: Tensor, s: Tensor, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return flow.advance(y, start, end, walk.estimate(t).x0)


def midpoint(self: Any, walk: VectorWalk, t: Tensor, s: Tensor, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Heun with its second estimate at the old noise level."""
    first = walk.estimate(t).x0
    there = along(noise_std(walk.sigma(t)), y) * flow.advance(y, start, end, first)
    return flow.advance(y, start, end, first, walk.estimate(t, x=there).x0)


def backwards(self: Any, walk: VectorWalk, t: Tensor, s: Tensor, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return flow.advance(y, end, start, walk.estimate(t).x0)


def biased_probes(self: Any, y: Tensor, moving: Tensor, random: Any) -> list[Tensor]:
    found = Flow._probes(self, y, moving, random)
    return found if not self.probes else [torch.where(probe > 0, probe, 0.5 * probe) for probe in found]


def first_coordinates(self: Any, y: Tensor, moving: Tensor, random: Any) -> list[Tensor]:
    found = Flow._probes(self, y, moving, random)
    return found if self.probes else found[: len(found) // 2]


def uniform_noise(self: Any, *arguments: Any, **more: Any) -> Any:
    """Times are drawn early, as if the proposal were another."""
    draw = LangFlow._draw(self, *arguments, **more)
    return dataclasses.replace(draw, t=draw.t.square())


def unweighted(self: Any, *arguments: Any, **more: Any) -> Any:
    draw = LangFlow._draw(self, *arguments, **more)
    return dataclasses.replace(draw, weight=torch.full_like(draw.weight, float(draw.weight.mean())))


def shifted_fit(self: Any, sigma: Tensor, nats: Tensor) -> Tensor:
    return Gumbel.fit(self, sigma * 1.05, nats)


def smaller_noise(self: Any, walk: VectorWalk, times: Tensor) -> None:
    """The initial noise has 0.9 of its standard deviation."""
    walk.x = 0.9 * walk.x
    Ode.walk(self, walk, times)


def heun(self: Any, field: Field, state: State, start: Level, end: Level, *, snap: Any, mean: bool = False) -> State:
    """A step of the reversible Heun method with another rounding."""
    y, z = state
    half = along((end.s - start.s) / 2, y)
    first = field(z, start)
    mirrored = 2 * (y + snap(half * first)) - z
    second = field(mirrored, end)
    if mean:
        return y + snap(half * (first + second)), mirrored
    return y + snap(half * first) + snap(half * second), mirrored


def explicit(self: Any, field: Field, state: State, start: Level, end: Level) -> State:
    """Heun's own method on the grid, whose second stage is forgotten."""
    y, _ = state
    h = along(end.s - start.s, y)
    first = field(y, start)
    moved = y + self.grid.snap(h * first)
    found = y + self.grid.snap(h * (first + field(moved, end)) / 2)
    return found, found


def late(self: Any, field: Field, state: State, start: Level, end: Level) -> State:
    """The inverse step evaluates the network at the exchanged noise levels."""
    return self.advance(field, state, end._replace(t=start.t), start._replace(t=end.t))


def remembers(self: Any, field: Any, state: State, start: Level, end: Level) -> State:
    """A self-conditioned network is conditioned on the estimate of the step before."""
    y, z = state
    half = along((end.s - start.s) / 2, y)
    walk = field._walk

    def at(x: Tensor, level: Level) -> Tensor:
        return walk.estimate(level.t, x=(along(level.noise, x) * x).float()).x0.double()

    walk.x = (along(start.noise, z) * z).float()
    middle = y + self.grid.snap(half * walk.estimate(start.t).x0.double())
    mirrored = 2 * middle - z
    return middle + self.grid.snap(half * at(mirrored, end)), mirrored


FAULTS = [
    FlowFault("initial noise of 0.9 standard deviations", "sampler", "law", {"walk": smaller_noise}, "law"),
    FlowFault(
        "steps that are not rounded to the grid",
        "reversible",
        "inverse",
        {"advance": lambda *a: heun(*a, snap=lambda x: x)},
        "inverse",
    ),
    FlowFault(
        "steps rounded as a whole, and not in halves",
        "reversible",
        "inverse",
        {"advance": lambda self, *a: heun(self, *a, snap=self.grid.snap, mean=True)},
        "inverse",
    ),
    FlowFault("a companion that is forgotten", "reversible", "inverse", {"advance": explicit}, "inverse"),
    FlowFault("noise levels exchanged in the inverse", "reversible", "inverse", {"retreat": late}, "inverse"),
    FlowFault("a step that depends on the one before", "reversible", "inverse", {"advance": remembers}, "inverse"),
    FlowFault("sign of the drift", "sampler", "step", walk(backwards), "sampler"),
    FlowFault("Heun without its second evaluation", "sampler", "order", walk(half_heun), "order"),
    FlowFault("Heun's second evaluation at the old noise", "sampler", "order", walk(midpoint), "order"),
    FlowFault(
        "divergence of the wrong sign",
        "flow",
        "ode_likelihood",
        likelihood(lambda found: found._replace(volume=-found.volume)),
        "flow",
    ),
    FlowFault(
        "prior of the wrong sign",
        "flow",
        "ode_likelihood",
        likelihood(lambda found: found._replace(prior=-found.prior)),
        "flow",
    ),
    FlowFault(
        "rounding left out of the likelihood",
        "flow",
        "ode_likelihood",
        likelihood(lambda found: found._replace(reconstruction=found.reconstruction + 0.01)),
        "flow",
    ),
    FlowFault(
        "half of the coordinates in the divergence", "flow", "ode_likelihood", {"_probes": first_coordinates}, "flow"
    ),
    FlowFault("probes that are not of unit variance", "flow", "divergence", {"_probes": biased_probes}, "flow"),
    FlowFault("weight of the proposal missing", "objective", "weight", {"_draw": unweighted}, "fitted"),
    FlowFault("times of another proposal", "objective", "proposal", {"_draw": uniform_noise}, "fitted"),
    FlowFault("log-SNR of the fit off by 5 %", "schedule", "proposal", {"fit": shifted_fit}, "fitted"),
    FlowFault(
        "embeddings of different lengths rounded by their product",
        "kernel",
        "rounding",
        {"table": lambda self: self.embedding},
        "kernel",
    ),
    FlowFault(
        "evidence of twice the noise",
        "kernel",
        "optimum",
        {
            "translate": lambda self, outputs, x, sigma: NormalizedGaussian.translate(
                self, {"logits": 0.5 * outputs["logits"]}, x, sigma
            )
        },
        "objective",
    ),
]
