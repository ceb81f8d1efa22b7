"""Source of a process on token rows as plain torch code: kernel, schedule, samplers, and the walk from noise to text.

:class:`~sedd_graph.diffusion.tokens.walk.Walk` and the samplers are exported from their own source, without conditions
on text, particles and noise tapes. The same seed therefore gives the same tokens. An attribute is exported if code that
is exported reads one of its name.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from typing import Any

import torch

from sedd_graph.component.base import Component
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.readings import Readings
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Walk
from sedd_graph.runs.plain.class_source import ClassSource, other_classes
from sedd_graph.runs.plain.component_source import ComponentSource
from sedd_graph.runs.plain.names import Names, NotExportable
from sedd_graph.runs.plain.network_source import number_text
from sedd_graph.runs.plain.specialise import dotted

__all__ = ["ProcessSource"]


class _Walk:
    """Constructor of the exported walk."""

    def init(self, denoise, x, free, kernel, schedule, generator, allowed, temperature, top_p, spread, timeless=False):  # type: ignore[no-untyped-def]  # exported without annotations
        """Start from the rows ``x``, int64 [b, l]; only positions in ``free``, bool [b, l], change."""
        self.x, self.free, self.kernel, self.schedule = x, free, kernel, schedule
        self.draws = Draws(generator)
        self.generator, self.timeless = generator, timeless
        self.temperature, self.top_p, self._spread = temperature, top_p, spread
        self.evaluations = self._steps = 0
        self._check = OutputCheck(x.device)
        self._readings = Readings(free, kernel.states, tabular=kernel.tabular)
        self._gap = torch.zeros(2, dtype=torch.float64, device=x.device)
        self._clamped = torch.zeros((), dtype=torch.int64, device=x.device)
        self._cached_x = torch.full_like(x, -1)
        self._denoise, self._allowed, self.told = denoise, allowed, []
        self._on_step = self._grid = self._long = self._cached = self._waiting = self._stale = None
        self._most = self._groups = self._drawn = None
        self._many = True
        self.end_step()  # type: ignore[attr-defined]  # of Walk, of whose export this is the constructor


class ProcessSource:
    """The classes of a process on token rows.

    Args:
        kernel: Forward process.
        schedule: Noise schedule.
        samplers: The samplers to export, by the names under which ``generate`` knows them.
        names: Collects what the classes read at the top of their file.

    Attributes:
        classes: Source of the classes by name.
        left_out: Reason why a sampler is not exported, by its name.
        tensors: Tables of kernel and schedule: nested lists of numbers, by ``kernel`` or ``schedule`` and their name.
        makes: Expressions that construct kernel, schedule and the samplers (by name).

    Raises:
        NotExportable: The kernel or the schedule cannot be exported.
    """

    def __init__(self, kernel: Kernel, schedule: Component, samplers: Mapping[str, Sampler], names: Names) -> None:
        self.kernel, self.schedule = kernel, schedule
        self.classes: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.makes: dict[str, str] = {}
        sources: dict[str, ComponentSource] = {}
        wanted: set[str] = set()
        for name, sampler in samplers.items():
            trial = copy.deepcopy(names)
            try:
                source = self._sampler(name, sampler, trial)
                walk = _walk(trial)
                walk.add(*(n for n in source.read if walk.has_method(n)))
            except NotExportable as error:
                self.left_out[name] = str(error)
                continue
            names.take(trial)
            sources[name] = source
            wanted |= source.read
        self.names = names
        walk = _walk(names)
        wanted |= names.read_by_functions()
        walk.add("__init__", "check_outputs", *sorted(n for n in wanted if walk.has_method(n)))
        wanted |= walk.read
        draws = ClassSource(Draws, names, what="random numbers of samplers")
        draws.add("__init__", *sorted(n for n in wanted if draws.has_method(n)))
        wanted |= draws.read | {"prior", "mask", "states"}
        parts = {"kernel": kernel, "schedule": schedule}
        made = {k: ComponentSource(p, names, what=f"process: {k} {type(p).__name__}") for k, p in parts.items()}
        before: set[str] = set()
        while wanted != before:
            before = set(wanted)
            for part in made.values():
                part.fixed(sorted(wanted - {"Config", "config"}))
                wanted |= part.read
            wanted |= names.read_by_functions()
        for key, part in {**made, **sources}.items():
            self._class(key, part)
        others = other_classes(names, wanted | walk.read | draws.read, done=("Draws",))
        steps = {"Draws": draws.class_source("Draws"), "Walk": walk.class_source("Walk")}
        self.classes = {**others, **steps, **self.classes}

    def _sampler(self, key: str, sampler: Sampler, names: Names) -> ComponentSource:
        bound = {("walk", "kernel"): self.kernel, ("kernel",): self.kernel, ("walk", "schedule"): self.schedule}
        source = ComponentSource(sampler, names, what=f"sample: sampler {key!r}", bound=bound)
        source.add("walk")
        walk = _walk(names)
        walk.add("__init__")
        known = {n.attr for n in ast.walk(walk.methods["__init__"]) if isinstance(n, ast.Attribute)}
        for tree in source.methods.values():
            for node in ast.walk(tree):
                match dotted(node):
                    case ("walk", name) if name not in known and not walk.has_method(name):
                        raise NotExportable(f"{source.what} cannot be exported: exported walks have no {name!r}")
        return source

    def _class(self, key: str, source: ComponentSource) -> None:
        name = type(source.component).__name__
        text = source.class_source(name)
        while name in self.classes and self.classes[name] != text:
            name += "_"
            text = source.class_source(name)
        self.classes[name] = text
        given = [f"{k}={number_text(v)}" for k, v in source.numbers.items()]
        if tensors := source.tensors():
            self.tensors[key] = tensors
            given += [f"**tables[{key!r}]", "device=device"]
        self.makes[key] = f"{name}({', '.join(given)})"


def _walk(names: Names) -> ClassSource:
    return ClassSource(
        Walk,
        names,
        what="the walk of samplers",
        constants={
            ("self", "_matching"): None,
            ("self", "_confidences"): None,
            ("self", "weights"): None,
            ("self", "draws", "in_turn"): Draws.in_turn,
            ("isinstance(self._denoise, StagedDenoise)",): False,
            ("isinstance(denoise, StagedDenoise)",): False,
        },
        methods={"__init__": _Walk.init},
        renamed={("self", "_config", "temperature"): "temperature", ("self", "_config", "top_p"): "top_p"},
    )
