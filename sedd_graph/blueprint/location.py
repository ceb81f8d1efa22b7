"""A loaded blueprint file (:class:`Loaded`) and a path inside it at which problems are reported (:class:`Location`)."""

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
    """A validated blueprint file, with the files that it includes.

    References ``${params.x}`` are already replaced by values, except within ``nodes`` and ``blocks``. Those are
    replaced later, when :func:`sedd_graph.graph.expand.expand` builds the graph. Within the file's ``nodes``,
    ``params.x`` is a parameter of the file. Within a block it is a parameter of the block, whose value depends on the
    node that uses the block.
    """

    document: Document
    library: Library = dataclasses.field(default_factory=lambda: Library(blueprint=1))
    """The validated content: a :class:`Blueprint` for the loaded blueprint; for an included file that has only blocks,
    a :class:`Library`."""
    params: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    """Values of the parameters declared at the root of the file, by name."""
    libraries: dict[str, Loaded] = dataclasses.field(default_factory=dict)
    """The included files by their alias under ``use``."""
    sections: dict[str, pydantic.BaseModel] = dataclasses.field(default_factory=dict)
    """Validated sections ``data``, ``train`` and ``store`` by name, as instances of the models passed to ``load``."""

    @property
    def file(self) -> str:
        """Name of the file, as shown in messages."""
        return self.document.file

    @property
    def blueprint(self) -> Blueprint:
        """The validated content as a :class:`Blueprint`. Raises :class:`UserError` if the file contains only blocks."""
        if not isinstance(self.library, Blueprint):
            raise UserError(f"{self.file}: a library of blocks, not a whole blueprint: it has no nodes")
        return self.library

    @property
    def root(self) -> Path:
        """Folder against which the relative paths in this file are resolved."""
        return Path(self.file).resolve().parent

    def section(self, model: type[_Model]) -> _Model | None:
        """Return the section that is an instance of ``model``, or None if the blueprint has no such section."""
        return next((found for found in self.sections.values() if isinstance(found, model)), None)

    def problem(self, path: DataPath, message: str) -> Problem:
        """Return a :class:`Problem` with ``message`` at the position of ``path`` within this file."""
        return Problem(*self.document.position(path), dotted(path), message)


class Refused(Exception):
    """Exception that stops the reading of one element of a blueprint (a node, a type, an included file).

    The problem was recorded before. The exception is caught within sedd_graph, so that reading continues with the other
    elements; users get a :class:`BlueprintError` with all problems.
    """


@dataclasses.dataclass(frozen=True)
class Location:
    """Path of keys inside a blueprint file, such as ``location / "nodes" / "head"``, at which problems are reported.

    All locations derived from one another append to the same list ``problems``.
    """

    loaded: Loaded
    path: DataPath = ()
    problems: list[Problem] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __truediv__(self, part: str | int | DataPath) -> Location:
        deeper = part if isinstance(part, tuple) else (part,)
        return Location(self.loaded, (*self.path, *deeper), self.problems)

    @property
    def position(self) -> Position:
        """File, line and column of this location."""
        return self.loaded.document.position(self.path)

    def refuse(self, message: str, *, environment: bool = False) -> Refused:
        """Record a problem at this location and return an exception.

        Args:
            message: Text of the problem.
            environment: True for a fault of the environment, such as a plugin that fails to load, rather than of the
                blueprint.

        Returns:
            A :class:`Refused` exception, for the caller to raise if it cannot continue.

        Raises:
            BlueprintError: The number of problems reached ``MAX_PROBLEMS``; the error holds all of them.
        """
        self.problems.append(dataclasses.replace(self.loaded.problem(self.path, message), environment=environment))
        if len(self.problems) >= MAX_PROBLEMS:
            raise BlueprintError(self.problems)
        return Refused(message)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Return a context manager that raises :class:`Refused` on exit if a problem was recorded in its body.

        The problem may be at any location that shares the list ``problems``.
        """
        before = len(self.problems)
        yield
        if len(self.problems) > before:
            raise Refused

    @contextmanager
    def reporting(self, error: type[Exception]) -> Iterator[None]:
        """Return a context manager that converts exceptions of type ``error`` in its body to :class:`Refused`.

        The message of the exception is recorded as a problem at this location. If the exception has an attribute
        ``faults`` (as :class:`InterpolationFault` does), a list of pairs (path relative to this location, message), one
        problem is recorded at each path instead.
        """
        try:
            yield
        except error as found:
            for path, message in getattr(found, "faults", [((), str(found))]):
                (self / path).refuse(message)
            raise Refused from None

    def validate(self, model: type[_Model], data: object) -> _Model | None:
        """Validate ``data``, the content at this location, and return an instance of ``model``.

        If ``data`` is invalid, the problems are recorded and None is returned.
        """
        try:
            return model.model_validate(data)
        except pydantic.ValidationError as error:
            for path, message in findings(error, model, data):
                (self / path).refuse(message)
            return None
