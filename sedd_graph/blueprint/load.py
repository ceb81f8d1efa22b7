"""Reader of a blueprint file and its includes: parsing, overrides, interpolation and validation."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydantic

from sedd_graph.blueprint.interpolate import InterpolationFault, resolve, resolve_params
from sedd_graph.blueprint.location import Loaded, Location, Refused
from sedd_graph.blueprint.overrides import apply_overrides
from sedd_graph.blueprint.schema import Blueprint, Library
from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import BlueprintError, Problem, suggest

__all__ = ["Loaded", "Sections", "load", "packaged_blueprints"]

MAX_FILES, MAX_INCLUDE_DEPTH = 64, 8
PACKAGE_PREFIX = "sedd_graph:"
"""Prefix under ``use`` of paths inside the installed package, as in ``use: {dit: sedd_graph:blocks/dit.yaml}``. Without
it, a path is relative to the including file."""

_ROOT_RESOLVED = frozenset(Blueprint.model_fields) - {
    "blueprint",
    "name",
    "description",
    "use",
    "params",
    "blocks",
    "nodes",
}

Sections = Mapping[str, Sequence[type[pydantic.BaseModel]]]
"""Candidate pydantic models by section name (``data``, ``train``, ``store``).

A section is validated by the last of its models whose required keys are all present, or by the first if there is
none."""


def load(path: str | Path, overrides: Sequence[str] = (), *, sections: Sections | None = None) -> Loaded:
    """Read a blueprint and the files that it includes, and return the validated content.

    Args:
        path: Path of the blueprint.
        overrides: Texts ``key=value``, such as ``train.steps=100``, applied before validation.
        sections: List of candidate pydantic models for each of the sections ``data``, ``train`` and ``store``, by
            section name. A section is validated by the last of its models whose required keys it has, or else by the
            first. A section that is not a key here is not validated, and is missing in :attr:`Loaded.sections`. None:
            no section is validated.

    Raises:
        BlueprintError: Holds every problem that was found.
    """
    return _Reader(Path(path)).blueprint(overrides, sections or {})


def packaged_blueprints() -> Path:
    """Return the folder of the blueprints that are installed with the package."""
    return Path(str(importlib.resources.files("sedd_graph_blueprints"))).resolve()


def _fitting(models: Sequence[type[pydantic.BaseModel]], section: Mapping[str, Any]) -> type[pydantic.BaseModel]:
    required = [{n for n, f in m.model_fields.items() if f.is_required()} for m in models]
    return next((m for m, keys in zip(models[::-1], required[::-1], strict=True) if keys <= section.keys()), models[0])


class _Reader:
    """Reads one blueprint and its libraries, each file once, and gathers their problems."""

    def __init__(self, path: Path) -> None:
        self.path, self.project = path, Path(os.path.realpath(path)).parent  # resolve() raises for loops
        self.cache: dict[Path, Loaded] = {}
        self.problems: list[Problem] = []

    def blueprint(self, overrides: Sequence[str], sections: Sections) -> Loaded:
        loaded = Loaded(read_yaml(self.path))
        at = Location(loaded, (), self.problems)
        if not isinstance(loaded.document.data, dict):
            at.refuse("a blueprint is a mapping of keys")
            raise BlueprintError(self.problems)
        apply_overrides(loaded.document, overrides)
        data = self._interpolated(at, loaded.document.data)
        for key, models in sections.items():
            if isinstance(data.get(key), dict):
                section = (at / key).validate(_fitting(models, data[key]), data[key])
                if section is not None:
                    loaded.sections[key] = section
        if self._validated(at, Blueprint, data):
            self._include(loaded, (self.path.resolve(),))
        if self.problems:
            raise BlueprintError(self.problems)
        return loaded

    def _interpolated(self, at: Location, data: dict[str, Any]) -> dict[str, Any]:
        params = {} if data.get("params") is None else data["params"]
        if not isinstance(params, dict) or not all(isinstance(v, str | int | float) for v in params.values()):
            return data  # the schema reports it
        out = dict(data)
        with suppress(Refused), (at / "params").reporting(InterpolationFault):
            at.loaded.params = params = resolve_params(params)
            if "params" in data:
                out["params"] = params
            for key in data:
                if key in _ROOT_RESOLVED:
                    with suppress(Refused), (at / key).reporting(InterpolationFault):
                        out[key] = resolve(data[key], params)
        return out

    def _validated(self, at: Location, model: type[Library], data: dict[str, Any]) -> bool:
        version = data.get("blueprint")
        if isinstance(version, int) and version > 1:
            (at / "blueprint").refuse(f"version {version} is newer than this sedd_graph reads (1): upgrade sedd_graph")
            data = data | {"blueprint": 1}
        library = at.validate(model, data)
        if library is not None:
            at.loaded.library = library
        return library is not None

    def _include(self, loaded: Loaded, chain: tuple[Path, ...]) -> None:
        """Read what ``loaded``, the last file of ``chain``, includes."""
        for alias, text in loaded.library.use.items():
            with suppress(Refused):
                at = Location(loaded, ("use", alias), self.problems)
                loaded.libraries[alias] = self._library(at, self._target(at, text), chain)

    def _library(self, at: Location, target: Path, chain: tuple[Path, ...]) -> Loaded:
        """Return the library ``target``, included at ``at``. Raises :class:`Refused`."""
        if target in chain:
            names = " -> ".join(p.name for p in (*chain[chain.index(target) :], target))
            raise at.refuse(f"includes form a cycle: {names}")
        if len(chain) >= MAX_INCLUDE_DEPTH:
            raise at.refuse(f"includes nested deeper than {MAX_INCLUDE_DEPTH}")
        if target not in self.cache:
            if len(self.cache) >= MAX_FILES:
                raise at.refuse(f"more than {MAX_FILES} files")
            self.cache[target] = self._read(target)
            self._include(self.cache[target], (*chain, target))
        return self.cache[target]

    def _target(self, at: Location, text: str) -> Path:
        """Return the file that ``text`` names under ``use``. Raises :class:`Refused`."""
        if text.startswith(PACKAGE_PREFIX):
            base = allowed = packaged_blueprints()
            relative = text[len(PACKAGE_PREFIX) :]
        else:
            # A file may include its neighbours within the project, and a packaged file those within the package.
            base, relative = Path(at.loaded.file).parent, text
            allowed = self.project if at.loaded.root.is_relative_to(self.project) else packaged_blueprints()
        if Path(relative).is_absolute() or "\\" in relative or "\0" in relative:
            raise at.refuse(f"{text!r}: a path relative to this file is needed")
        try:
            target = (base / relative).resolve()
            target.exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise at.refuse(f"{text[:80]!r} cannot be a file: {str(error)[:80]}") from None
        if not target.is_relative_to(allowed):
            raise at.refuse(f"{text!r} lies outside the project folder")
        if not target.is_file():
            near = suggest(target.name, [p.name for p in target.parent.glob("*.yaml")])
            raise at.refuse(f"{text!r}: no such file{near}")
        return target

    def _read(self, target: Path) -> Loaded:
        """Read a library without what it includes. Raises :class:`Refused`."""
        # named as it is reached from the blueprint's own folder, without the '..' of includes within includes
        inside = target.is_relative_to(self.project)
        shown = self.path.parent / target.relative_to(self.project) if inside else target
        try:
            loaded = Loaded(read_yaml(target, name=str(shown)))
        except BlueprintError as error:
            self.problems += error.problems
            raise Refused from None
        at, data = Location(loaded, (), self.problems), loaded.document.data
        if not isinstance(data, dict):
            raise at.refuse("a library is a mapping of keys")
        # a whole blueprint can serve as a library: only its blocks are used
        if not self._validated(at, Blueprint if "nodes" in data else Library, data):
            raise Refused
        return loaded
