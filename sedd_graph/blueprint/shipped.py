"""Blueprints installed with the package (in ``sedd_graph_blueprints``): listed, found by name, and read as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sedd_graph.blueprint.load import Loaded, load, packaged_blueprints
from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import UserError, suggest

__all__ = ["find_blueprint", "shipped_blueprints", "shipped_files"]

_SCHEMA = re.compile(r"\A# yaml-language-server: .*\n")


def _path(name: str) -> Path:
    return packaged_blueprints() / f"{name}.yaml"


def _names() -> list[str]:
    return sorted(path.stem for path in packaged_blueprints().glob("*.yaml"))


def shipped_blueprints() -> dict[str, str]:
    """Return the description of each installed blueprint, by name."""
    return {name: str(read_yaml(_path(name)).data.get("description", "")) for name in _names()}


def find_blueprint(path: str | Path) -> Path:
    """Return the path of a blueprint, given its path or the name of an installed blueprint.

    An existing path takes precedence over a name. An argument that is neither is returned as a path, so that reading it
    reports the missing file.

    Raises:
        UserError: ``path`` seems to be a misspelt name: no such file exists, it has no folder and no suffix, and an
            installed blueprint has a similar name. The message suggests that name.
    """
    found, names = Path(path), _names()
    if found.exists() or len(found.parts) != 1 or found.suffix:
        return found
    if str(found) in names:
        return _path(str(found))
    if near := suggest(str(found), names):
        raise UserError(f"{found}: neither a file nor a shipped blueprint{near}")
    return found


def shipped_files(name: str) -> dict[str, str]:
    """Return the text of an installed blueprint and of every block file that it includes, by path.

    The paths, such as ``blocks/dit.yaml``, are relative to the folder of the installed blueprints. The
    ``yaml-language-server`` comment, which refers to the JSON Schema in the repository, is removed.

    Raises:
        UserError: No blueprint of this name is installed.
    """
    names = _names()
    if name not in names:
        raise UserError(f"no shipped blueprint {name!r}{suggest(name, names)}; `sedd-graph init` lists them")
    files = [Path(loaded.file) for loaded in _included(load(_path(name)))]
    return {
        file.relative_to(packaged_blueprints()).as_posix(): _SCHEMA.sub("", file.read_text(encoding="utf-8"))
        for file in files
    }


def _included(loaded: Loaded) -> Iterator[Loaded]:
    yield loaded
    for library in loaded.libraries.values():
        yield from _included(library)
