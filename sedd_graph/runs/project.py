"""Check that a run folder does not name an arbitrary folder of the machine as the place of its training data."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import outside_allowed

__all__ = ["require_project"]

_MAX_ENTRIES, _MAX_BYTES = 10_000, 512 * 1024


def require_project(root: Path, run: Path) -> Path:
    """Return the real path of the data folder that a run folder records, if it may be read.

    The folder is checked, since a downloaded run folder may name any folder.

    The data folder is accepted if it is the working directory or lies below it (the working directory not being the
    root of the file system), or if it contains a blueprint, as the folder does in which the run was built.

    Args:
        root: The data folder, relative to the working directory or absolute. One that does not exist is accepted, since
            reading it fails anyway.
        run: The run folder, for the message.

    Raises:
        UserError: The data folder is not accepted, and :func:`~sedd_graph.inputs.confine.allow_outside` is not in
            effect; or ``root`` is not a valid path.
    """
    try:  # the real path is what is read: "/x/.." is the root of the file system, although there is no "/x"
        real = Path(os.path.realpath(root))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run} records that its data lie in {str(root)[:200]!r}, which is no path of a folder: {error}"
        ) from None
    if outside_allowed() or not os.path.exists(real):  # a folder that has moved is reported by what reads it
        return real
    here = Path(os.path.realpath(Path.cwd()))
    if (real.is_relative_to(here) and here != Path(here.anchor)) or _has_blueprint(real):
        return real
    raise UserError(
        f"{run} records that its data lie in {root}, which is no project's folder: no blueprint is in it. If you trust "
        "the run folder, allow it with --allow-outside"
    )


def _has_blueprint(folder: Path) -> bool:
    """Return whether a YAML file with the key ``blueprint`` lies in ``folder``."""
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_MAX_ENTRIES), entries, strict=False):
                if entry.name.endswith((".yaml", ".yml")) and entry.is_file() and entry.stat().st_size <= _MAX_BYTES:
                    text = Path(entry.path).read_bytes().removeprefix(codecs.BOM_UTF8)
                    if any(line.startswith(b"blueprint:") for line in text.splitlines()):
                        return True
    except OSError:
        pass
    return False
