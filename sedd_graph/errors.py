"""Every error that a user can meet, under one root, with the exit code it leads to.

Nothing here knows what a blueprint or a tensor is; the layers above raise these.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from itertools import islice

__all__ = [
    "MAX_PROBLEMS",
    "BlueprintError",
    "DivergedError",
    "EnvironmentFault",
    "MissingExtraError",
    "Problem",
    "SeddGraphError",
    "UserError",
    "choices",
    "listed",
    "nearest",
    "suggest",
]


class SeddGraphError(Exception):
    """Root of all errors that sedd_graph raises on purpose. ``exit_code`` is what the command line leaves with."""

    exit_code = 1


class UserError(SeddGraphError):
    """Something the user wrote or asked for is wrong: a blueprint, a flag, a prompt. Exit code 2."""

    exit_code = 2


class EnvironmentFault(SeddGraphError):
    """The machine is at fault, not the user: a full disk, a broken plugin, a missing package. Exit code 1."""

    exit_code = 1


class MissingExtraError(EnvironmentFault):
    """An optional package is absent; the message names the extra that brings it."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'sedd_graph[{extra}]'")


class DivergedError(SeddGraphError):
    """Numbers became NaN or infinite. Exit code 3."""

    exit_code = 3


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong at one place: ``file:line:col: path: message`` (line and column count from 1; 0 = unknown)."""

    file: str
    line: int
    col: int
    path: str
    message: str
    environment: bool = False
    """Whether the machine is at fault rather than the blueprint, as with a plugin that cannot be loaded."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.col}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


MAX_PROBLEMS = 100
"""How many problems are gathered before one stops looking."""


class BlueprintError(UserError):
    """All problems of one stage at once, sorted by file and line. ``problems`` is a tuple of :class:`Problem`.

    Exit code 1 where each of them is a fault of the environment.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        if self.problems and all(p.environment for p in self.problems):
            self.exit_code = EnvironmentFault.exit_code
        shown = [str(p) for p in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) >= MAX_PROBLEMS:
            shown.append(f"... these are the first {MAX_PROBLEMS} problems")
        super().__init__("\n".join(shown))


_COMPARED, _LISTED, _SHORT, _NEAREST = 500, 40, 20, 5


def listed(names: Iterable[str]) -> str:
    """``a, b, c``, or ``none``; of a great many, the first few and how many more there are."""
    found = list(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more or "none"


def suggest(name: str, options: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest of ``options``, or an empty string where none is near."""
    near = difflib.get_close_matches(name, [o for o in islice(options, _COMPARED) if o != name], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choices(name: str, options: Iterable[str], *, label: str = "known") -> str:
    """Return the end of a message about the unknown ``name``: ``" (did you mean 'b'?); known: a, b"``."""
    found = list(options)
    near = _near(name, found)
    return f"{suggest(name, near)}; {label}: {_counted(near, len(found))}"


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``a, b, c``; of more than 20 options only the five nearest to ``name``, or the first where none is near."""
    found = list(options)
    return _counted(_near(name, found), len(found))


def _counted(names: list[str], count: int) -> str:
    return listed(names) + (f" and {count - len(names)} more" if count > len(names) else "")


def _near(name: str, options: list[str]) -> list[str]:
    if len(options) <= _SHORT:
        return options
    return difflib.get_close_matches(name, options[:_COMPARED], n=_NEAREST, cutoff=0.3) or options[:_NEAREST]
