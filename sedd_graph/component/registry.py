"""The registry of components: found by entry point without importing, loaded when used, read as a :class:`Contract`.

Group ``sedd_graph.components``; an entry point is named ``attention.v1`` and a blueprint says ``attention`` (the
highest version) or ``attention.v1``. This file imports no torch; loading a component does.
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
"""The group of entry points by which components are found."""

_ENTRY = re.compile(r"([a-z][a-z0-9_]*)\.v([1-9][0-9]{0,3})")


class PluginWarning(UserWarning):
    """A component that is installed but cannot be used."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered name, not loaded yet."""

    name: str
    version: int
    distribution: str
    load: Callable[[], Any]

    @property
    def op(self) -> str:
        return f"{self.name}.v{self.version}"


class Registry:
    """The installed components by name and version. Tests make one of classes with :meth:`of`."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[tuple[str, int], Entry] = {}
        self._contracts: dict[str, Contract] = {}
        self._classes: dict[str, Any] = {}
        self._broken: dict[str, str] = {}
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
        """Return a registry of classes by name (``scale`` or ``scale.v2``)."""
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
        return tuple(sorted({name for name, _ in self._entries}))

    def entry(self, op: str) -> Entry:
        """Return the entry of ``attention`` or ``attention.v1``. Raises :class:`UserError` with the new or the nearest name."""
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
        """Import and return the class of ``op``.

        Raises :class:`UserError` for an unknown name, :class:`EnvironmentFault` for a plugin that cannot be imported.
        """
        entry = self.entry(op)
        if entry.op in self._classes:
            return self._classes[entry.op]
        if entry.op not in self._broken:
            try:
                loaded = entry.load()
                if not (inspect.isclass(loaded) and issubclass(loaded, Declared) and hasattr(loaded, "kind")):
                    raise TypeError(f"{loaded!r} is not a Component class with a kind and a Config")
                self._classes[entry.op] = loaded
                return loaded
            except Exception as error:  # third-party code may raise anything at import
                self._broken[entry.op] = f"{type(error).__name__}: {error}"
        raise EnvironmentFault(
            f"component {entry.op!r} of {entry.distribution} cannot be loaded: {self._broken[entry.op]}"
        )

    def op_of(self, cls: type) -> str | None:
        """Return the pinned name under which the loaded class ``cls`` is registered; None where it is not."""
        return next((op for op, loaded in self._classes.items() if loaded is cls), None)

    def contract(self, op: str) -> Contract:
        """Return the contract of ``op``. Raises as :meth:`component` does."""
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

    def place(self, op: str) -> tuple[str, int]:
        """Return file and line of the class of ``op``, or "" and 0. Raises as :meth:`component` does."""
        cls = self.component(op)
        try:
            return inspect.getsourcefile(cls) or "", inspect.getsourcelines(cls)[1]
        except (OSError, TypeError):
            return "", 0

    def contracts(self) -> list[Contract]:
        """Return the contracts of all components that load; a broken plugin warns once (:class:`PluginWarning`)."""
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
    if distribution is None:
        return "unknown"
    metadata = distribution.metadata
    return f"{metadata['Name']} {metadata['Version']}"


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> Registry:
    return discover()


def installed() -> Registry:
    """Return :func:`discover`'s registry, read once for each ``sys.path``: for code that no registry is passed to."""
    return _installed(tuple(sys.path))


def discover() -> Registry:
    """Find all installed components without importing them. A badly named entry point warns and is left out."""
    entries, read = [], dict[int, str]()
    for point in importlib.metadata.entry_points(group=GROUP):
        match = _ENTRY.fullmatch(point.name)
        # all entry points of a distribution share one object, which parses its metadata at every access
        if id(point.dist) not in read:
            read[id(point.dist)] = _title(point.dist)
        distribution = read[id(point.dist)]
        if match is None:
            warnings.warn(
                f"{distribution}: entry point {point.name!r} is not named like 'attention.v1'; left out",
                PluginWarning,
                stacklevel=2,
            )
            continue
        entries.append(Entry(match[1], int(match[2]), distribution, point.load))
    return Registry(entries)
