"""Patterns of names of parameters. Imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from sedd_graph.errors import UserError, suggest

__all__ = ["chosen"]


def chosen(patterns: Iterable[str], names: Collection[str], *, key: str) -> set[str]:
    """Return the names that patterns match.

    ``*`` stands for any text, and a pattern matches all that lies below it: ``trunk.0`` is ``trunk.0`` and ``trunk.0.*``.

    Args:
        patterns: The patterns.
        names: Names of the parameters.
        key: Key of the blueprint that holds the patterns, for the message.

    Raises:
        UserError: A pattern matches no name; the message lists near ones.
    """
    found: set[str] = set()
    for pattern in patterns:
        hit = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")}
        if not hit:
            parts = {name.rsplit(".", depth)[0] for name in names for depth in range(1, 4) if name.count(".") >= depth}
            near = suggest(pattern, sorted({*names, *parts}))
            tops = sorted({name.partition(".")[0] for name in names})
            raise UserError(
                f"{key}: {pattern!r} matches no parameter{near}; parameters begin with {', '.join(tops[:12])}, and "
                "`sedd-graph show` lists them"
            )
        found |= hit
    return found
