"""Registry of components, which are found by their entry points and imported on first use. Imports no torch.

Entry points in the group ``sedd_graph.components`` have names such as ``attention.v1``. A blueprint selects a component
by ``attention`` (the highest installed version) or ``attention.v1``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from typing import Any

from sedd_graph.component import renamed
from sedd_graph.component.contract import Contract, no_algebra, no_signature
from sedd_graph.component.declared import Declared
from sedd_graph.errors import EnvironmentFault, UserError, suggest

__all__ = ["GROUP", "Entry", "PluginWarning", "Registry", "discover", "installed"]

GROUP = "sedd_graph.components"
"""Entry-point group in which installed distributions register components."""

_ENTRY = re.compile(r"([a-z][a-z0-9_]*)\.v([1-9][0-9]{0,3})")


class PluginWarning(UserWarning):
    """Warning about an installed component that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Registered component that may not be imported yet: its name, version, distribution and import function."""

    name: str
    version: int
    distribution: str
    """Name and version of the Python distribution that registers the component."""
    load: Callable[[], Any]
    """Function that imports and returns the component class."""

    @property
    def op(self) -> str:
        """Name with its version, such as ``attention.v1``."""
        return f"{self.name}.v{self.version}"


class Registry:
    """Mapping from names and versions to components. ``|`` joins two registries; iteration yields sorted entries.

    :func:`discover` returns the registry of the installed components; :meth:`of` makes a registry from classes.

    Args:
        entries: The registered components.

    Raises:
        EnvironmentFault: Two entries have the same name and version.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[tuple[str, int], Entry] = {}
        self._contracts: dict[str, Contract] = {}
        self._classes: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._warned: set[str] = set()
        for entry in entries:
            other = self._entries.setdefault((entry.name, entry.version), entry)
            if other != entry:
                raise EnvironmentFault(
                    f"component {entry.op!r} is registered twice, by {other.distribution} and by "
                    f"{entry.distribution}; uninstall one or ask its author for another name"
                )

    @classmethod
    def of(cls, classes: Mapping[str, Any], *, distribution: str = "here") -> Registry:
        """Return a registry of the given classes.

        Args:
            classes: Component classes by name, such as ``scale`` (version 1) or ``scale.v2``.
            distribution: Origin of the classes, for error messages and listings of components. (The origin of an
                installed component is the name and version of its Python distribution.)

        Raises:
            UserError: A name is not of the form ``scale`` or ``scale.v2``.
        """
        entries = []
        for name, component in classes.items():
            match = _ENTRY.fullmatch(name if ".v" in name else f"{name}.v1")
            if match is None:
                raise UserError(f"component name {name!r} is not like 'attention' or 'attention.v1'")
            entries.append(Entry(match[1], int(match[2]), distribution, partial(_itself, component)))
        return cls(entries)

    def __or__(self, other: Registry) -> Registry:
        return Registry([*self._entries.values(), *other._entries.values()])

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda e: (e.name, e.version)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all registered components, sorted, each once and without its version suffix."""
        return tuple(sorted({name for name, _ in self._entries}))

    def entry(self, op: str) -> Entry:
        """Return the registered entry of a component, without importing the component.

        Args:
            op: Name of the component: ``attention`` (the highest version) or ``attention.v1``.

        Raises:
            UserError: No component has this name or version; the message suggests the new name of a renamed component,
                or the nearest name.
        """
        match = _ENTRY.fullmatch(op)
        name = match[1] if match else op
        versions = sorted(v for n, v in self._entries if n == name)
        if not versions and name in renamed.OPS:
            raise UserError(f"op {name!r} is now called {renamed.OPS[name]!r}")
        if not versions:
            raise UserError(f"unknown op {op!r}{suggest(name, self.names)}; `sedd-graph components` lists them")
        version = int(match[2]) if match else versions[-1]
        if version not in versions:
            known = ", ".join(f"{name}.v{v}" for v in versions)
            raise UserError(f"op {name!r} has no version {version}; installed: {known}")
        return self._entries[name, version]

    def component(self, op: str) -> Any:
        """Import and return the class of a component.

        Args:
            op: Name of the component: ``attention`` (the highest version) or ``attention.v1``.

        Raises:
            UserError: No component has this name or version.
            EnvironmentFault: The component cannot be imported.
        """
        entry = self.entry(op)
        if entry.op not in self._classes and entry.op not in self._faults:
            try:
                loaded = entry.load()
                if not (inspect.isclass(loaded) and issubclass(loaded, Declared) and hasattr(loaded, "kind")):
                    raise TypeError(f"{loaded!r} is not a Component class with a kind and a Config")
                self._classes[entry.op] = loaded
            except Exception as error:  # third-party code may raise anything at import
                self._faults[entry.op] = f"{type(error).__name__}: {error}"
        if entry.op in self._faults:
            fault = self._faults[entry.op]
            raise EnvironmentFault(f"component {entry.op!r} of {entry.distribution} cannot be loaded: {fault}")
        return self._classes[entry.op]

    def op_of(self, cls: type) -> str | None:
        """Return the name with version, such as ``attention.v1``, of the component whose class is ``cls``.

        Components that are already imported are searched first. If ``cls`` is not among them, all components of the
        registry are imported.

        Returns:
            The name with version; None if no component of the registry has this class.
        """
        if cls not in self._classes.values():
            self.contracts()
        return next((op for op, loaded in self._classes.items() if loaded is cls), None)

    def contract(self, op: str) -> Contract:
        """Import a component and return its contract: name, version, kind, Config class, ports and algebra.

        Blueprints are checked against contracts, without running the components. Argument and exceptions are as in
        :meth:`component`.
        """
        entry = self.entry(op)
        if entry.op not in self._contracts:
            cls = self.component(op)
            self._contracts[entry.op] = Contract(
                name=entry.name,
                version=entry.version,
                kind=cls.kind,
                config=cls.Config,
                signature=getattr(cls, "signature", no_signature),
                algebra=getattr(cls, "algebra", no_algebra),
                summary=(inspect.getdoc(cls) or "").split("\n")[0],
                positionwise=getattr(cls, "positionwise", False),
                distribution=entry.distribution,
            )
        return self._contracts[entry.op]

    def location(self, op: str) -> tuple[str, int]:
        """Return the source file and line number of a component's class; ``("", 0)`` if the source is not available.

        Argument and exceptions are as in :meth:`component`.
        """
        cls = self.component(op)
        try:
            return inspect.getsourcefile(cls) or "", inspect.getsourcelines(cls)[1]
        except (OSError, TypeError):
            return "", 0

    def contracts(self) -> list[Contract]:
        """Import all components, and return the contract (name, version, kind, ports and so on) of each.

        A component that cannot be imported is omitted. A :class:`PluginWarning` reports it the first time.
        """
        found = []
        for entry in self:
            try:
                found.append(self.contract(entry.op))
            except EnvironmentFault as error:
                if entry.op not in self._warned:
                    self._warned.add(entry.op)
                    warnings.warn(str(error), PluginWarning, stacklevel=2)
        return found


def _itself(component: Any) -> Any:
    return component


def _title(distribution: importlib.metadata.Distribution | None) -> str:
    return "unknown" if distribution is None else f"{distribution.metadata['Name']} {distribution.metadata['Version']}"


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> tuple[Registry, list[str]]:
    entries, left_out = _read_entry_points()
    return Registry(entries), left_out


def installed(*, warn: bool = False) -> Registry:
    """Return the registry of all installed components, cached for each value of ``sys.path``.

    An entry point whose name is not of the form ``attention.v1`` is omitted.

    Args:
        warn: True to issue a :class:`PluginWarning` for each omitted entry point; False to omit them silently.

    Raises:
        EnvironmentFault: Two distributions register the same name and version.
    """
    registry, left_out = _installed(tuple(sys.path))
    if warn:
        _warn(left_out)
    return registry


def discover() -> Registry:
    """Return the registry of all installed components, found by entry point and not imported yet.

    An entry point whose name has no version is omitted with a :class:`PluginWarning`.

    Raises:
        EnvironmentFault: Two distributions register the same name and version.
    """
    entries, left_out = _read_entry_points()
    _warn(left_out)
    return Registry(entries)


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, PluginWarning, stacklevel=3)


def _read_entry_points() -> tuple[list[Entry], list[str]]:
    """Return the entries of all components, and messages about the entry points that are left out."""
    entries, left_out, read = list[Entry](), list[str](), dict[int, str]()
    for point in importlib.metadata.entry_points(group=GROUP):
        match = _ENTRY.fullmatch(point.name)
        # all entry points of a distribution share one object, which parses its metadata at every access
        if id(point.dist) not in read:
            read[id(point.dist)] = _title(point.dist)
        distribution = read[id(point.dist)]
        if match is None:
            left_out.append(f"{distribution}: entry point {point.name!r} is not named like 'attention.v1'; left out")
        else:
            entries.append(Entry(match[1], int(match[2]), distribution, point.load))
    return entries, left_out
