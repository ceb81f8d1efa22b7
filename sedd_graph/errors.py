"""Errors that a user can meet: one root class, and the exit code that each leads to.

This module depends on nothing else of the package; all rooms raise these errors.
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
    """Root of the errors that sedd_graph raises. ``exit_code`` is that of the command line."""

    exit_code = 1


class UserError(SeddGraphError):
    """Error in the user's input, such as a blueprint, an option or a prompt. Exit code 2."""

    exit_code = 2


class EnvironmentFault(SeddGraphError):
    """Fault of the machine, such as a full disk, a broken plugin or a missing package. Exit code 1."""

    exit_code = 1


class MissingExtraError(EnvironmentFault):
    """An optional package is not installed; the message names the extra that installs it.

    Args:
        package: Name of the package.
        extra: Extra of ``sedd_graph`` that installs it.
        purpose: Subject of the message: what the package is needed for.
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'sedd_graph[{extra}]'")


class DivergedError(SeddGraphError):
    """The loss, a gradient or the weights became NaN or infinite. Exit code 3."""

    exit_code = 3


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """A problem at a position of a blueprint, as text ``file:line:col: path: message``.

    Lines and columns count from 1, and are 0 where they are not known; ``path`` is a dotted path of keys.
    """

    file: str
    line: int
    col: int
    path: str
    message: str
    environment: bool = False
    """True for a fault of the environment rather than of the blueprint, such as a plugin that cannot be loaded."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.col}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


MAX_PROBLEMS = 100
"""Most problems that are collected and shown."""


class BlueprintError(UserError):
    """All problems of one stage, sorted by file and line, in ``problems``.

    The exit code is 2, or 1 where every problem is a fault of the environment.
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
    """Join names as ``a, b, c``; of more than 40, the first 40 and the number of the others; ``none`` for none."""
    found = list(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more or "none"


def suggest(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest of ``options``, or an empty string where none is near."""
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
