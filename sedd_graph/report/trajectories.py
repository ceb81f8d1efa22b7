"""Films of the trajectories in a zarr store of samples or of an edit. Stores may come from anyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.errors import UserError
from sedd_graph.report.film import BYTES, POSITIONS, ROWS, UNKNOWN, Symbols, Track, film_data
from sedd_graph.report.samples import facts_of
from sedd_graph.store.arrays import array_of, open_stored, read_array, stores

__all__ = ["Films", "edited", "films_of", "newest", "shortened"]

READ = 2**26
"""Largest number of tokens that are read of a store; of a larger trajectory, fewer rows are."""


class Films(NamedTuple):
    """Films of a zarr store, which play side by side.

    Attributes:
        store: Name of the store.
        films: The films, each as :func:`~sedd_graph.report.film.film_data` returns it.
        facts: How the samples were drawn, as text.
    """

    store: str
    films: list[dict[str, Any]]
    facts: str


def newest(run: Path, tokenizer: Tokenizer, *, rows: int = ROWS, limit: int = BYTES) -> Films | None:
    """Return the film of the most recent samples that were stored with a trajectory; None if there are none.

    Args:
        run: The run folder.
        tokenizer: Tokenizer of the run.
        rows: Largest number of rows.
        limit: Largest number of bytes of the film.
    """
    for store in [*stores(run, "samples"), *stores(run, "infilled")]:
        if "trajectory" in open_stored(store):
            return films_of(store, tokenizer, rows=rows, limit=limit)
    return None


def edited(run: Path, tokenizer: Tokenizer, *, limit: int = BYTES) -> Films | None:
    """Return the films of the most recent edit: the roads to the original and to the edited text; None without an edit."""
    for store in stores(run, "edited")[:1]:
        return films_of(store, tokenizer, limit=limit)
    return None


def films_of(path: Path, tokenizer: Tokenizer, *, rows: int = ROWS, limit: int = BYTES) -> Films:
    """Return the films of a store: one of samples with a trajectory, two of an edit.

    Args:
        path: The zarr group.
        tokenizer: Decodes the stored token ids.
        rows: Largest number of rows.
        limit: Largest number of bytes of all films.

    Raises:
        UserError: The store has no trajectory, or one of another shape.
        DamagedError: It is damaged.
    """
    group = open_stored(path)
    facts, symbols = facts_of(group, path), _symbols(group, tokenizer)
    if "trajectory" in group:
        return Films(path.name, [film_data(_tracks(group, rows, path), symbols, limit=limit)], facts)
    roads = [name for name in ("original", "edited") if name in group]
    if not roads:
        raise UserError(
            f"{path} has no trajectory: draw samples with one by `sedd-graph sample {path.parent} --trajectory`"
        )
    films = []
    for name in roads:
        tokens = _part(group, name, 2, path)
        films.append(film_data([Track("text 1", tokens)], symbols, label=name, limit=limit // len(roads)))
    return Films(path.name, films, facts)


def _symbols(group: zarr.Group, tokenizer: Tokenizer) -> Symbols:
    mask, start, pad = (group.attrs.get(name) for name in ("mask", "start", "pad"))
    return Symbols(tokenizer, *(value if isinstance(value, int) else None for value in (mask, start, pad)))


def _part(group: zarr.Group, name: str, axes: int, path: Path, *, rows: int | None = None) -> Any:
    array = array_of(group, name)
    if array.ndim != axes or 0 in array.shape or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}/{name} has shape {array.shape} of {array.dtype}, not {axes} axes of integers")
    return read_array(group, name, columns=rows).astype(np.int64)


def _tracks(group: zarr.Group, rows: int, path: Path) -> list[Track]:
    """Return the trajectories of the first rows, and the confidences where they were stored."""
    shape = array_of(group, "trajectory").shape
    per_row = max(1, shape[0] * (shape[2] if len(shape) == 3 else 1))
    rows = max(1, min(rows, READ // per_row))
    tokens = _part(group, "trajectory", 3, path, rows=rows)
    sure = None
    if "confidence" in group:
        sure = _part(group, "confidence", 3, path, rows=rows)
        if sure.shape != tokens.shape:
            raise UserError(f"{path}: confidence {sure.shape} is not of the shape of trajectory {tokens.shape}")
        sure = sure.clip(0, UNKNOWN).astype(np.uint8)
    return [
        Track(f"{row + 1} of {shape[1]}", tokens[:, row], None if sure is None else sure[:, row])
        for row in range(tokens.shape[1])
    ]


def shortened(path: Path, film: dict[str, Any]) -> list[str]:
    """Return what a film leaves out of the trajectory of a store, as sentences; none if it is whole."""
    group = open_stored(path)
    if "trajectory" not in group:
        return []
    steps, rows, width = array_of(group, "trajectory").shape
    found = []
    if len(film["steps"]) < steps:
        found.append(f"{len(film['steps'])} of {steps} steps")
    if len(film["rows"]) < rows:
        found.append(f"the first {len(film['rows'])} of {rows} rows")
    if width > POSITIONS:
        found.append(f"the first {POSITIONS:,} of {width:,} tokens")
    return found
