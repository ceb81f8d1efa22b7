"""Exceptions for errors that users can encounter, derived from one base class, and helpers for their messages.

Each class defines the exit code of the command line. This module imports nothing else of the package.
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
    """Base class of the errors that sedd_graph raises. ``exit_code`` is the exit code of the command line."""

    exit_code = 1


class UserError(SeddGraphError):
    """Exception for an error in the user's input, such as a blueprint, an option or a prompt. Exit code 2."""

    exit_code = 2


class EnvironmentFault(SeddGraphError):
    """Exception for a fault of the environment, such as a full disk, broken plugin or missing package. Exit code 1."""

    exit_code = 1


class MissingExtraError(EnvironmentFault):
    """Exception for a missing optional package. The message names the extra that installs the package.

    Args:
        package: Name of the package.
        extra: Extra of ``sedd_graph`` that installs the package.
        purpose: Name of the feature that needs the package; the subject of the message's sentence.
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'sedd_graph[{extra}]'")


class DivergedError(SeddGraphError):
    """Exception for a loss, gradient or weight that became NaN or infinite. Exit code 3."""

    exit_code = 3


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """A problem at a position of a blueprint; its text is ``file:line:col: path: message``.

    Attributes:
        file: Name of the file; for a value set by an override, ``override 'key=value'``.
        line: Line, from 1; 0 if unknown.
        col: Column, from 1; 0 if unknown.
        path: Dotted path of keys, such as ``nodes.head.in``; may be empty.
        message: Description of the problem.
    """

    file: str
    line: int
    col: int
    path: str
    message: str
    environment: bool = False
    """True for a fault of the environment, such as a plugin that fails to load, rather than of the blueprint."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.col}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


MAX_PROBLEMS = 100
"""Maximum number of problems that are collected and shown."""


class BlueprintError(UserError):
    """Exception that holds all problems found in one stage, such as validation or expansion, sorted by file and line.

    ``exit_code`` is 2, or 1 if every problem is a fault of the environment.

    Args:
        problems: The problems; duplicates are removed.
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
    """Join ``names`` with commas, as ``a, b, c``.

    At most 40 names are shown, followed by the number of the remaining ones. Returns ``none`` if there are no names.
    """
    found = list(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more or "none"


def suggest(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the option most similar to ``name``, or an empty string if none is.

    Args:
        name: The unknown name.
        options: Valid names, of which the first 500 are compared.
    """
    near = difflib.get_close_matches(name, [o for o in islice(options, _COMPARED) if o != name], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choices(name: str, options: Iterable[str], *, label: str = "known") -> str:
    """Return text that ends a message about the unknown ``name``: ``" (did you mean 'b'?); known: a, b"``.

    Args:
        name: The unknown name.
        options: Valid names.
        label: Noun before the list of valid names.
    """
    found = list(options)
    near = _near(name, found)
    return f"{suggest(name, near)}; {label}: {_counted(near, len(found))}"


def nearest(name: str, options: Iterable[str]) -> str:
    """Return the ``options`` joined with commas; of more than 20, only the five most similar to ``name``.

    If none is similar, the first five options are returned. The number of omitted options follows the list.
    """
    found = list(options)
    return _counted(_near(name, found), len(found))


def _counted(names: list[str], count: int) -> str:
    return listed(names) + (f" and {count - len(names)} more" if count > len(names) else "")


def _near(name: str, options: list[str]) -> list[str]:
    if len(options) <= _SHORT:
        return options
    return difflib.get_close_matches(name, options[:_COMPARED], n=_NEAREST, cutoff=0.3) or options[:_NEAREST]
