"""A blueprint file and all it includes, read, overridden, interpolated at the root, and validated: a :class:`Loaded`."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from sedd_graph.blueprint.interpolate import InterpolationFault, resolve, resolve_params
from sedd_graph.blueprint.overrides import apply_overrides
from sedd_graph.blueprint.problems import dotted, model_problems
from sedd_graph.blueprint.schema import Blueprint, Library
from sedd_graph.blueprint.yaml import Document, read_yaml
from sedd_graph.errors import BlueprintError, Problem, suggest

__all__ = ["Loaded", "Sections", "load", "packaged_blueprints"]

MAX_FILES, MAX_INCLUDE_DEPTH = 64, 8
PACKAGE_PREFIX = "sedd_graph:"
"""``use: {dit: sedd_graph:blocks/dit.yaml}`` takes the file that the installed package carries."""

_ROOT_RESOLVED = ("axes", "inputs", "outputs", "process", "objective", "sample", "data", "train", "store")

Sections = Mapping[str, Sequence[type[pydantic.BaseModel]]]
"""Of each section, the models that it may follow: the last whose required keys are all there, or the first."""


@dataclasses.dataclass
class Loaded:
    """One file, validated. ``libraries`` maps an alias of ``use`` to the file it names.

    In ``blueprint``, everything at the root is interpolated but ``nodes`` and ``blocks``, whose ``${params.x}`` mean
    the parameters of whichever block they end up in. ``sections`` holds the validated ``data``, ``train`` and ``store``.
    """

    file: str
    blueprint: Library
    params: dict[str, Any]
    libraries: dict[str, Loaded]
    document: Document
    origins: dict[tuple[str | int, ...], str]
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that relative paths of this blueprint start from."""
        return Path(self.file).resolve().parent

    def position(self, path: tuple[str | int, ...]) -> tuple[str, int, int]:
        """File, line and column of ``path`` (or of what surrounds it); an override answers for what it set."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]], 0, 0
        return (self.file, *self.document.position(path))

    def problem(self, path: tuple[str | int, ...], message: str) -> Problem:
        return Problem(*self.position(path), dotted(path), message)


def load(path: str | Path, overrides: Sequence[str] = (), *, sections: Sections | None = None) -> Loaded:
    """Read ``path`` and what it includes. ``sections`` gives the models of ``data``, ``train`` and ``store``.

    Raises :class:`BlueprintError` with every problem found.
    """
    return _Reader(Path(path)).main(overrides, sections or {})


def packaged_blueprints() -> Path:
    """The folder of blueprints that the installed package carries."""
    return Path(str(importlib.resources.files("sedd_graph_blueprints"))).resolve()


def _fitting(models: Sequence[type[pydantic.BaseModel]], section: Mapping[str, Any]) -> type[pydantic.BaseModel]:
    """The last of ``models`` whose required keys are all there, or the first."""
    required = [{n for n, f in m.model_fields.items() if f.is_required()} for m in models]
    return next((m for m, keys in zip(models[::-1], required[::-1], strict=True) if keys <= section.keys()), models[0])


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.project = path.resolve().parent
        self.cache: dict[Path, Loaded] = {}
        self.problems: list[Problem] = []

    def main(self, overrides: Sequence[str], sections: Sections) -> Loaded:
        document = read_yaml(self.path)
        if not isinstance(document.data, dict):
            raise BlueprintError(
                [Problem(document.file, *document.position(()), "", "a blueprint is a mapping of keys")]
            )
        data = document.data
        origins = apply_overrides(data, overrides) if overrides else {}
        loaded = Loaded(document.file, Library(blueprint=1), {}, {}, document, origins)
        data, loaded.params = self._interpolated(loaded, data)
        for key, models in sections.items():
            if isinstance(data.get(key), dict):
                model = _fitting(models, data[key])
                try:
                    loaded.sections[key] = model.model_validate(data[key])
                except pydantic.ValidationError as error:
                    self.problems += model_problems(error, model, loaded.position, (key,), data[key])
        self._version(loaded, data)
        blueprint = self._validated(loaded, Blueprint, data)
        if blueprint is not None:
            loaded.blueprint = blueprint
            self._include(loaded, (self.path.resolve(),))
        if self.problems:
            raise BlueprintError(self.problems)
        return loaded

    def _interpolated(self, loaded: Loaded, data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        params, out = data.get("params"), dict(data)
        if params is not None and not (
            isinstance(params, dict) and all(isinstance(v, str | int | float) for v in params.values())
        ):
            return out, {}  # the schema says so with a place
        try:
            params = resolve_params(params or {})
        except InterpolationFault as fault:
            self.problems += [loaded.problem(("params", *p), m) for p, m in fault.faults]
            return out, {}
        for key in _ROOT_RESOLVED:
            if key in data:
                try:
                    out[key] = resolve(data[key], params)
                except InterpolationFault as fault:
                    self.problems += [loaded.problem((key, *p), m) for p, m in fault.faults]
        if "params" in data:
            out["params"] = params
        return out, params

    def _version(self, loaded: Loaded, data: dict[str, Any]) -> None:
        version = data.get("blueprint")
        if isinstance(version, int) and not isinstance(version, bool) and version > 1:
            self.problems.append(
                loaded.problem(
                    ("blueprint",), f"version {version} is newer than this sedd_graph reads (1): upgrade sedd_graph"
                )
            )
            data["blueprint"] = 1

    def _validated(self, loaded: Loaded, model: type[Any], data: Any) -> Any:
        try:
            return model.model_validate(data)
        except pydantic.ValidationError as error:
            self.problems += model_problems(error, model, loaded.position, (), data)
            return None

    def _include(self, loaded: Loaded, chain: tuple[Path, ...]) -> None:
        for alias, text in loaded.blueprint.use.items():
            at = ("use", alias)
            target = self._target(loaded, at, text)
            if target is None:
                continue
            if target in chain:
                names = " -> ".join(p.name for p in (*chain[chain.index(target) :], target))
                self.problems.append(loaded.problem(at, f"files include each other in a circle: {names}"))
            elif len(chain) >= MAX_INCLUDE_DEPTH:
                self.problems.append(loaded.problem(at, f"includes nested deeper than {MAX_INCLUDE_DEPTH}"))
            elif target in self.cache:
                loaded.libraries[alias] = self.cache[target]
            elif len(self.cache) >= MAX_FILES:
                self.problems.append(loaded.problem(at, f"more than {MAX_FILES} files"))
            else:
                library = self._library(target)
                if library is not None:
                    self.cache[target] = loaded.libraries[alias] = library
                    self._include(library, (*chain, target))

    def _target(self, loaded: Loaded, at: tuple[str | int, ...], text: str) -> Path | None:
        if text.startswith(PACKAGE_PREFIX):
            base = allowed = packaged_blueprints()
            relative = text[len(PACKAGE_PREFIX) :]
        else:
            # A file may include its neighbours within the project, and a packaged file those within the package.
            base, relative = Path(loaded.file).parent, text
            allowed = self.project if loaded.root.is_relative_to(self.project) else packaged_blueprints()
        if Path(relative).is_absolute() or "\\" in relative or "\0" in relative:
            self.problems.append(loaded.problem(at, f"{text!r}: a path relative to this file is needed"))
            return None
        try:
            target = (base / relative).resolve()
            target.exists()
        except (OSError, RuntimeError, ValueError) as error:
            self.problems.append(loaded.problem(at, f"{text[:80]!r} cannot be a file: {str(error)[:80]}"))
            return None
        if not target.is_relative_to(allowed):
            self.problems.append(loaded.problem(at, f"{text!r} lies outside the project folder"))
            return None
        if not target.is_file():
            near = (
                suggest(target.name, [p.name for p in target.parent.glob("*.yaml")]) if target.parent.is_dir() else ""
            )
            self.problems.append(loaded.problem(at, f"{text!r}: no such file{near}"))
            return None
        return target

    def _library(self, target: Path) -> Loaded | None:
        # as it is reached from the blueprint's own folder, without the '..' of includes within includes
        inside = target.is_relative_to(self.project)
        shown = self.path.parent / target.relative_to(self.project) if inside else target
        try:
            document = read_yaml(target, name=str(shown))
        except BlueprintError as error:
            self.problems += error.problems
            return None
        loaded = Loaded(str(shown), Library(blueprint=1), {}, {}, document, {})
        if not isinstance(document.data, dict):
            self.problems.append(loaded.problem((), "a library is a mapping of keys"))
            return None
        data = dict(document.data)
        self._version(loaded, data)
        # A whole blueprint may be used as a library: only its blocks are taken.
        model = Blueprint if "nodes" in data else Library
        library = self._validated(loaded, model, data)
        if library is None:
            return None
        loaded.blueprint = library
        return loaded
