"""Creation of run folders: written under a temporary name beside their place, then renamed.

A build that is killed therefore leaves no run folder that lacks files, only a hidden folder ``.<name>.<hex>.part``. The
next build of the same blueprint deletes it.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from pathlib import Path

from sedd_graph.errors import UserError
from sedd_graph.store.durable import publish, sync_folder, sync_tree
from sedd_graph.store.files import disk_faults, numbered, part_folder, remove
from sedd_graph.store.manifest import MANIFEST

__all__ = ["new_run", "require_empty", "require_utf8", "write_folder"]

_STAMPED = f"{'[0-9]' * 8}T{'[0-9]' * 6}Z-*"
"""Glob pattern of the names of run folders that :func:`new_run` creates."""
_PART = re.compile(r"\.run\.[0-9a-f]+\.part")
"""Names of the temporary folders within a folder that is filled."""


def new_run(root: Path, name: str, digest: str, write: Callable[[Path], None]) -> Path:
    """Create a run folder ``root/name/<UTC time>-<digest>`` with all its files.

    Args:
        root: Folder of all run folders.
        name: Name of the blueprint.
        digest: Hash of the lock file, of which the first eight digits are used.
        write: Function that writes the files to the folder whose path it is given.

    Returns:
        The path of the run folder. If the name is taken, a number is added (``...-2``).

    Raises:
        UserError: The path is invalid, such as a folder inside a file.
        EnvironmentFault: The disk cannot be written. No run folder is left.
    """
    require_utf8(root)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = root / name / f"{stamp}-{digest[:8]}"
    with disk_faults("a folder", path.parent), part_folder(path, abandoned=f".{_STAMPED}.part") as part:
        write(part)
        return publish(part, numbered(path))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Create the folder ``path``, which must be empty or not exist, with all its files.

    An empty folder that cannot be replaced (the working directory, a mount point, a folder whose parent cannot be
    written) is filled instead, with the manifest as the last of its files.

    Args:
        path: The folder; links are followed.
        write: Function that writes the files to the folder whose path it is given.

    Raises:
        UserError: The path is invalid, or the folder is not empty.
        EnvironmentFault: The disk cannot be written. The folder is left as it was.
    """
    path = Path(os.path.realpath(path))
    require_utf8(path)
    require_empty(path)
    if path.is_dir() and (not _replaceable(path) or any(path.iterdir())):
        _fill(path, write)
        return
    with disk_faults("a folder", path.parent), part_folder(path) as part:
        write(part)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # Windows renames no folder over another
        try:
            publish(part, [path])
        except FileExistsError:
            raise UserError(f"{path} exists and is not empty") from None


def _replaceable(path: Path) -> bool:
    """Return whether an empty folder, given by its real path, may be deleted, and another renamed to its place."""
    return path != Path(os.path.realpath(".")) and not path.is_mount() and os.access(path.parent, os.W_OK | os.X_OK)


def _fill(path: Path, write: Callable[[Path], None]) -> None:
    """Write the files to a temporary folder within the empty folder ``path``, then move them out of it."""
    with disk_faults("a folder", path), part_folder(path / "run") as part:
        write(part)
        sync_tree(part)
        require_empty(path)
        moved: list[Path] = []
        try:
            for file in sorted(part.iterdir(), key=lambda file: file.name == MANIFEST):
                file.rename(path / file.name)
                moved.append(path / file.name)
            sync_folder(path)
        except BaseException:
            for file in moved:
                remove(file)
            raise


def require_empty(path: Path) -> None:
    """Raise :class:`UserError` if ``path`` exists and is not an empty folder, temporary files of this module aside."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder")
    with disk_faults("a folder", path):
        if path.is_dir() and any(_PART.fullmatch(file.name) is None for file in path.iterdir()):
            raise UserError(f"{path} exists and is not empty")


def require_utf8(path: Path) -> None:
    """Raise :class:`UserError` if ``path`` is not UTF-8: weights could be written there, but not read again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: this path is not UTF-8, which files of weights need: rename the folder") from None
