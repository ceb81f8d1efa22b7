"""Table of component kinds with base class, key in the blueprint, conformance check and colour. Imports no torch.

A component class declares its kind as a class argument (``class Absorb(Kernel, kind="kernel")``). The table names base
classes and checks as strings, which are imported on first use.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

from sedd_graph.component import renamed
from sedd_graph.errors import UserError, suggest

__all__ = ["KINDS", "NODE", "Kind", "kinds_at", "require_kind"]

NODE = "node"
"""Value of :attr:`Kind.place` for components that are nodes of the graph and not the value of a blueprint key."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Kind of component, such as ``attention`` or ``kernel``, with the properties that its components share."""

    name: str
    place: str
    """Dotted blueprint key whose value is a component of this kind, such as ``process.schedule``; :data:`NODE` for
    nodes."""
    base: str
    """Import path of the base class of the components, as ``module:class``."""
    check: str
    """Import path, ``module:function``, of the check that :func:`sedd_graph.testing.conformance.check_component`
    runs."""
    family: str | None = None
    """The only family of diffusion processes or flows (``tokens``, ``strings``, ``vectors`` or ``points``) that uses this
    kind; None if it is not limited to one family."""
    colour: str = "#eeeeee"
    """Fill colour of nodes of this kind in drawings of the graph, as ``#rrggbb``."""

    @property
    def is_node(self) -> bool:
        """True if components of this kind are nodes of the graph."""
        return self.place == NODE

    def base_class(self) -> type:
        """Import and return the base class of the components of this kind."""
        found: type = pkgutil.resolve_name(self.base)
        return found

    def checker(self) -> Callable[..., Any]:
        """Import and return the conformance check of the components of this kind."""
        found: Callable[..., Any] = pkgutil.resolve_name(self.check)
        return found


_COLOURS = {
    "embedding": "#dbeafe",
    "position": "#e0f2fe",
    "time": "#fef3c7",
    "attention": "#fde2e4",
    "feedforward": "#e9d5ff",
    "norm": "#f1f5f9",
    "modulation": "#fef9c3",
    "mixer": "#d1fae5",
    "arithmetic": "#f1f5f9",
    "head": "#ffe4cc",
    "backbone": "#ede9fe",
}
_BASE, _NODE_CHECK = "sedd_graph.component.base:Component", "sedd_graph.testing.nodes:check_node"
_DIFFUSION = "sedd_graph.diffusion"
_TOKENS, _STRINGS, _VECTORS = (f"{_DIFFUSION}.{family}" for family in ("tokens", "strings", "vectors"))
_DATA, _TRAINING = "sedd_graph.data", "sedd_graph.training.interfaces"
_PROCESS, _SECTION = "sedd_graph.testing.processes:check", "sedd_graph.testing.sections:check"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(Kind(name, NODE, _BASE, _NODE_CHECK, colour=colour) for name, colour in _COLOURS.items()),
        Kind("kernel", "process", f"{_TOKENS}.kernel:Kernel", f"{_PROCESS}_kernel", "tokens"),
        Kind("string_kernel", "process", f"{_STRINGS}.kernel:StringKernel", f"{_PROCESS}_strings", "strings"),
        Kind("vector_kernel", "process", f"{_VECTORS}.kernel:VectorKernel", f"{_PROCESS}_vectors", "vectors"),
        Kind("schedule", "process.schedule", f"{_DIFFUSION}.schedule:Schedule", f"{_PROCESS}_schedule"),
        Kind("objective", "objective", f"{_TOKENS}.objective:Objective", f"{_PROCESS}_objective", "tokens"),
        Kind("likelihood", "objective", f"{_DIFFUSION}.likelihood:Likelihood", f"{_PROCESS}_likelihood", "points"),
        Kind("string_objective", "objective", f"{_STRINGS}.kernel:StringObjective", f"{_PROCESS}_strings", "strings"),
        Kind(
            "vector_objective", "objective", f"{_VECTORS}.objective:VectorObjective", f"{_PROCESS}_vectors", "vectors"
        ),
        Kind("sampler", "sample", f"{_TOKENS}.sampler:Sampler", f"{_PROCESS}_sampler", "tokens"),
        Kind("string_sampler", "sample", f"{_STRINGS}.sampler:StringSampler", f"{_PROCESS}_strings", "strings"),
        Kind("vector_sampler", "sample", f"{_VECTORS}.sampler:VectorSampler", f"{_PROCESS}_vectors", "vectors"),
        Kind(
            "classifier",
            "sample.classifier",
            f"{_TOKENS}.classifier:NoisyClassifier",
            f"{_PROCESS}_classifier",
            "tokens",
        ),
        Kind(
            "vector_classifier",
            "sample.classifier",
            f"{_VECTORS}.classifier:VectorClassifier",
            f"{_PROCESS}_vector_classifier",
            "vectors",
        ),
        Kind("distillation", "distill", f"{_DIFFUSION}.distillation:Distillation", f"{_PROCESS}_distillation"),
        Kind("corpus", "data.corpus", f"{_DATA}.sources:Corpus", f"{_SECTION}_corpus"),
        Kind("points", "data.points", f"{_DATA}.sources:PointSource", f"{_SECTION}_points", "points"),
        Kind("tokenizer", "data.tokenizer", f"{_DATA}.tokenizer:TokenizerFactory", f"{_SECTION}_tokenizer"),
        Kind("optimizer", "train.optimizer", f"{_TRAINING}:OptimizerFactory", f"{_SECTION}_optimizer"),
        Kind("adapter", "train.adapters", f"{_TRAINING}:Adapter", f"{_SECTION}_adapter"),
        Kind("lr_schedule", "train.schedule", f"{_TRAINING}:LRSchedule", f"{_SECTION}_lr_schedule"),
        Kind("tracker", "train.trackers", f"{_TRAINING}:Tracker", f"{_SECTION}_tracker"),
    )
}
"""All kinds by name: first the kinds of graph nodes, then the others in the order of their blueprint keys."""


def kinds_at(place: str) -> tuple[str, ...]:
    """Return the names of the kinds whose components may be the value of the dotted blueprint key ``place``."""
    return tuple(kind.name for kind in KINDS.values() if kind.place == place)


def require_kind(name: str) -> Kind:
    """Return the kind called ``name``.

    Raises:
        UserError: There is no such kind; the message suggests the new name of a renamed kind, or the nearest name.
    """
    if name in renamed.KINDS:
        raise UserError(f"kind {name!r} is now called {renamed.KINDS[name]!r}")
    if name not in KINDS:
        raise UserError(f"unknown kind {name!r}{suggest(name, KINDS)}; one of {', '.join(KINDS)}")
    return KINDS[name]
