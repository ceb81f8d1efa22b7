"""Names of files in a blueprint: confined to the project's folder, and glob patterns that look at a bounded number.

A blueprint may come from anyone. Without this, ``files: [/etc/shadow]`` would train on a file of the machine, and
``/usr/**/*.x`` would walk through all of it.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sedd_graph.errors import UserError

__all__ = ["MAX_ENTRIES", "allow_outside", "confined", "matching", "outside_allowed"]

MAX_ENTRIES = 1_000_000
"""Largest number of files and folders that all patterns of one call look at together."""
MAX_FOLDERS = 64
"""Largest number of folders, one within the other, that ``**`` enters."""

_outside: ContextVar[bool] = ContextVar("allow_outside", default=False)


@contextmanager
def allow_outside(allowed: bool = True) -> Iterator[None]:
    """Context manager within which the names in a blueprint may lead out of the project's folder.

    It is the option ``--allow-outside`` of the command line.

    Args:
        allowed: Whether they may.
    """
    token = _outside.set(allowed)
    try:
        yield
    finally:
        _outside.reset(token)


def outside_allowed() -> bool:
    """Return whether :func:`allow_outside` is in effect."""
    return _outside.get()


def confined(name: str | Path, root: Path, *, what: str) -> Path:
    """Return the real path of a file that a blueprint names.

    Args:
        name: Path, relative to ``root`` or absolute. Links are followed, also out of ``root``: they count as where they
            lead.
        root: The project's folder.
        what: Key of the blueprint that holds the name, for the message.

    Raises:
        UserError: The file lies outside ``root``, and :func:`allow_outside` is not in effect; or the name is no path.
    """
    try:
        found, inside = Path(os.path.realpath(root / name)), Path(os.path.realpath(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {str(name)[:200]!r} is no path of a file: {error}") from None
    if not found.is_relative_to(inside) and not outside_allowed():
        to = "" if str(found) == str(name) else f", which is {found},"
        raise UserError(
            f"{what}: {str(name)[:200]!r}{to} lies outside the project's folder {root}: move it there, or allow "
            "such files with --allow-outside"
        )
    return found


def matching(pattern: str, root: Path, *, what: str, looked: list[int]) -> list[Path]:
    """Return the real paths of the files that match a name or a glob pattern, sorted by name, without duplicates.

    The syntax is that of the module ``glob``: ``*``, ``?``, ``[...]``, and ``**`` for any number of folders. Names that
    begin with a dot match only a pattern that does.

    Args:
        pattern: File name or pattern, relative to ``root`` or absolute.
        root: The project's folder.
        what: Key of the blueprint that holds the pattern, for the message.
        looked: The number of files and folders looked at so far, in one entry, which this call increases.

    Raises:
        UserError: A match lies outside ``root`` (as for :func:`confined`), or more than :data:`MAX_ENTRIES` files and
            folders are looked at.
    """
    # the name of a file may be a pattern itself, "a[1].txt"; os.path.isfile is false where Path.is_file raises
    if os.path.isfile(root / pattern) or not glob.has_magic(pattern):
        return [confined(pattern, root, what=what)] if os.path.exists(_checked(root / pattern)) else []
    start, parts = _split(pattern)
    base = _checked(root / start)
    if not os.path.isdir(base):
        return []
    confined(start, root, what=what)  # before a folder of others is walked
    walk = _Walk(pattern, what, looked)
    names = sorted({os.path.join(start, name) for name in walk.files(base, parts, frozenset())})
    return list(dict.fromkeys(confined(name, root, what=what) for name in names))


def _checked(path: Path) -> str:
    """Return ``path``, or a name that is no file where it contains a NUL character."""
    return "" if "\0" in str(path) else str(path)


def _split(pattern: str) -> tuple[str, list[str]]:
    """Split a pattern into the folder before its first part with magic, and the parts from there."""
    parts = pattern.replace(os.sep, "/").split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    start = "/".join(parts[:first]) or ("/" if first else "")
    rest = [part for i, part in enumerate(parts[first:], first) if part != "**" or parts[i - 1 : i] != ["**"]]
    return start, rest


class _Walk:
    """Walk through folders for one pattern, which counts what it looks at."""

    def __init__(self, pattern: str, what: str, looked: list[int]) -> None:
        self.pattern, self.what, self.looked = pattern, what, looked

    def files(self, folder: str, parts: list[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Yield the files below ``folder`` that match ``parts``, as names relative to it.

        ``above`` has the device and inode of the folders that ``**`` has entered on the way, so that it follows a link
        to one of them no further.
        """
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield from self.below(folder, rest, above)
        elif not glob.has_magic(head):
            path = os.path.join(folder, head)
            if rest and os.path.isdir(path):
                yield from (os.path.join(head, name) for name in self.files(path, rest, frozenset()))
            elif not rest and os.path.isfile(path):
                yield head
        else:
            fits = re.compile(fnmatch.translate(head)).match
            for entry in self.entries(folder):
                if not fits(entry.name) or (entry.name.startswith(".") and not head.startswith(".")):
                    continue
                if not rest:
                    if _is(entry.is_file):
                        yield entry.name
                elif _is(entry.is_dir):
                    found = self.files(entry.path, rest, frozenset())
                    yield from (os.path.join(entry.name, name) for name in found)

    def below(self, folder: str, rest: list[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Yield the matches of ``**`` followed by ``rest``: in ``folder``, and in every folder below it."""
        if rest:
            yield from self.files(folder, rest, above)
        try:
            found = os.stat(folder)
        except OSError:
            return
        if (found.st_dev, found.st_ino) in above or len(above) >= MAX_FOLDERS:
            return
        above |= {(found.st_dev, found.st_ino)}
        for entry in self.entries(folder):
            if entry.name.startswith("."):
                continue
            if _is(entry.is_dir):
                yield from (os.path.join(entry.name, name) for name in self.below(entry.path, rest, above))
            elif not rest and _is(entry.is_file):
                yield entry.name

    def entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder or ".") as found:
                for entry in found:
                    self.looked[0] += 1
                    if self.looked[0] > MAX_ENTRIES:
                        raise UserError(
                            f"{self.what}: {self.pattern!r} looks at more than {MAX_ENTRIES:,} files and folders: name "
                            "the folder of the files more closely"
                        )
                    yield entry
        except OSError:  # not a folder, or not ours to read
            return


def _is(test: object) -> bool:
    try:
        return bool(test())  # type: ignore[operator]  # bound methods of os.DirEntry
    except OSError:
        return False
