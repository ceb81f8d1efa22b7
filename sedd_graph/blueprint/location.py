"""A blueprint file that has been read (:class:`Loaded`), and one part of it where problems are reported (:class:`Location`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pydantic

from sedd_graph.blueprint.problems import dotted, findings
from sedd_graph.blueprint.schema import Blueprint, Library, Scalar
from sedd_graph.blueprint.yaml import DataPath, Document, Position
from sedd_graph.errors import MAX_PROBLEMS, BlueprintError, Problem, UserError

__all__ = ["Loaded", "Location", "Refused"]

_Model = TypeVar("_Model", bound=pydantic.BaseModel)


@dataclasses.dataclass
class Loaded:
    """One file and the files that it includes, validated.

    Everything at the root of the file is interpolated except ``nodes`` and ``blocks``, whose ``${params.x}`` refer to the
    parameters of the block that they belong to.
    """

    document: Document
    library: Library = dataclasses.field(default_factory=lambda: Library(blueprint=1))
    """The validated content; a :class:`Blueprint` where the file has nodes."""
    params: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    """The root's parameters."""
    libraries: dict[str, Loaded] = dataclasses.field(default_factory=dict)
    """The included files, by their alias under ``use``."""
    sections: dict[str, pydantic.BaseModel] = dataclasses.field(default_factory=dict)
    """The validated ``data``, ``train`` and ``store``: instances of the models that were passed to ``load``."""

    @property
    def file(self) -> str:
        """Name of the file in messages."""
        return self.document.file

    @property
    def blueprint(self) -> Blueprint:
        """The content of a whole blueprint. Raises :class:`UserError` for a file that only holds blocks."""
        if not isinstance(self.library, Blueprint):
            raise UserError(f"{self.file}: a library of blocks, not a whole blueprint: it has no nodes")
        return self.library

    @property
    def root(self) -> Path:
        """Folder that the relative paths in this blueprint start from."""
        return Path(self.file).resolve().parent

    def section(self, model: type[_Model]) -> _Model | None:
        """Return the section that was validated as ``model``; None where the blueprint has none."""
        return next((found for found in self.sections.values() if isinstance(found, model)), None)

    def problem(self, path: DataPath, message: str) -> Problem:
        """Return a problem at ``path`` within this file."""
        return Problem(*self.document.position(path), dotted(path), message)


class Refused(Exception):
    """Raised to skip the rest of a part of the blueprint after a problem in it was reported; always caught."""


@dataclasses.dataclass(frozen=True)
class Location:
    """One part of a file, such as ``location / "nodes" / "head"``. All locations of one stage share ``problems``."""

    loaded: Loaded
    path: DataPath = ()
    problems: list[Problem] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __truediv__(self, part: str | int | DataPath) -> Location:
        deeper = part if isinstance(part, tuple) else (part,)
        return Location(self.loaded, (*self.path, *deeper), self.problems)

    @property
    def position(self) -> Position:
        """File, line and column."""
        return self.loaded.document.position(self.path)

    def refuse(self, message: str, *, environment: bool = False) -> Refused:
        """Report a problem at this location.

        Returns:
            An exception, to be raised where what follows cannot be read without this part.

        Raises:
            BlueprintError: The limit of problems is reached; it holds all of them.
        """
        self.problems.append(dataclasses.replace(self.loaded.problem(self.path, message), environment=environment))
        if len(self.problems) >= MAX_PROBLEMS:
            raise BlueprintError(self.problems)
        return Refused(message)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Read several parts inside ``with``; at its end, raise :class:`Refused` if any problem was reported."""
        before = len(self.problems)
        yield
        if len(self.problems) > before:
            raise Refused

    @contextmanager
    def reporting(self, error: type[Exception]) -> Iterator[None]:
        """Report an ``error`` raised inside ``with``, and raise :class:`Refused`.

        The problem is reported at this location. If the error has ``faults``, pairs of a relative path and a message, one is reported
        for each of them.
        """
        try:
            yield
        except error as found:
            for path, message in getattr(found, "faults", [((), str(found))]):
                (self / path).refuse(message)
            raise Refused from None

    def validate(self, model: type[_Model], data: object) -> _Model | None:
        """Return ``data``, read from this location, as an instance of ``model``; None where problems were reported."""
        try:
            return model.model_validate(data)
        except pydantic.ValidationError as error:
            for path, message in findings(error, model, data):
                (self / path).refuse(message)
            return None
