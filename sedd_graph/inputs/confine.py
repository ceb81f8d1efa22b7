"""Resolution of the file names and glob patterns in a blueprint, which may name only files in the project's folder.

The project's folder is normally the one that contains the blueprint; :func:`allow_outside` lifts the restriction. A
blueprint may come from anyone: without the restriction, ``files: [/etc/shadow]`` would train on a private file of the
machine. Patterns may visit only a bounded number of files and folders (:data:`MAX_ENTRIES`), so that ``/usr/**/*.x``
cannot walk through a whole disk.
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

__all__ = ["MAX_ENTRIES", "allow_outside", "confined", "matching", "outside_allowed", "require_inside"]

MAX_ENTRIES = 1_000_000
"""Largest number of files and folders that all patterns of one call look at together."""
MAX_FOLDERS = 64
"""Largest number of folders, one within the other, that ``**`` enters."""

_outside: ContextVar[bool] = ContextVar("allow_outside", default=False)


@contextmanager
def allow_outside(allowed: bool = True) -> Iterator[None]:
    """Return a context manager within which file names in a blueprint may name files outside the project's folder.

    The option ``--allow-outside`` of the command line uses it.

    Args:
        allowed: True to allow such files, False to refuse them.
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
        name: Path, relative to ``root`` or absolute. Symbolic links are resolved first, so that a link in
            ``root`` to a file elsewhere counts as outside.
        root: The project's folder.
        what: Key of the blueprint that holds the name, for the message.

    Raises:
        UserError: The file lies outside ``root``, and :func:`allow_outside` is not in effect; or ``name`` is not a
            valid path.
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


def require_inside(folder: Path, name: str, *, deep: bool = False) -> None:
    """Check that a file or folder of a run folder, before it is written or deleted, is no link to a place outside.

    A run folder may come from anyone: without the check, a link named ``metrics.jsonl`` would change a file elsewhere.

    Args:
        folder: The run folder.
        name: Name in the run folder, which may exist or not.
        deep: True to check all links in the folder ``name``, too.

    Raises:
        UserError: A link leads outside the run folder, and :func:`allow_outside` is not in effect.
    """
    if outside_allowed():
        return
    inside = os.path.realpath(folder)
    paths = [os.path.join(folder, name)]
    if deep:
        for parent, folders, files in os.walk(paths[0]):  # enters no link
            entries = (os.path.join(parent, entry) for entry in (*folders, *files))
            paths += [entry for entry in entries if os.path.islink(entry)]
    for path in paths:
        found = os.path.realpath(path)
        if not Path(found).is_relative_to(inside):
            raise UserError(
                f"{path} leads to {found}, outside the run folder: what is there would be changed. If you have linked "
                "it, allow it with --allow-outside"
            )


def matching(pattern: str, root: Path, *, what: str, looked: list[int]) -> list[Path]:
    """Return the real paths of the files that match a name or a glob pattern, sorted by name, without duplicates.

    The syntax is that of the module ``glob``: ``*``, ``?``, ``[...]``, and ``**`` for any number of folders. Names that
    begin with a dot match only a pattern that does.

    Args:
        pattern: File name or pattern, relative to ``root`` or absolute.
        root: The project's folder.
        what: Key of the blueprint that holds the pattern, for the message.
        looked: List of one number, the files and folders visited so far by all patterns. This call adds its own to it,
            so pass the same list for each pattern; start with ``[0]``.

    Raises:
        UserError: A match lies outside ``root`` (as for :func:`confined`), or more than :data:`MAX_ENTRIES` files and
            folders are visited.
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
