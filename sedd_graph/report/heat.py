"""Heat maps of saved activations, small enough for a page: pooled, quantised to a byte, a few records of each port."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sedd_graph.store.arrays import array_of, read_array

__all__ = ["heat_maps"]

PORTS, RECORDS, HEIGHT, WIDTH, BYTES = 24, 24, 64, 96, 180_000
"""Largest numbers of ports, of records of a port, of rows and columns of a map, and of bytes of all maps."""
LARGEST = 2**24
"""Largest number of values of a record that are read; ports with larger records are left out."""
MISSING = 255
"""A value that is not finite; others are 127 plus 127 times the value over the port's limit."""


def heat_maps(run: Path) -> list[dict[str, Any]]:
    """Return heat maps of ``activations.zarr`` of a run folder as JSON data, one for each saved port.

    A map shows the first row of the batch: positions from top to bottom, features from left to right. Of a port without
    positions, it shows the rows of the batch. Values are means over the pixels' shares.

    Returns:
        Objects of ``name``: path of the port; ``steps``: training step of each record; ``height`` and ``width`` of a map;
        ``limit``: the value that the strongest colour stands for, a 99.5th percentile; ``axes``: the numbers of positions (or
        rows) and of features, and which of both; and ``values``: base64 of bytes [record, height, width].
    """
    if not (run / "activations.zarr" / "zarr.json").is_file():
        return []
    group = zarr.open_group(str(run / "activations.zarr"), mode="r")
    paths = [
        path[:-5]
        for path, member in sorted(group.members(max_depth=None))
        if isinstance(member, zarr.Array) and path.endswith("/step") and f"{path[:-5]}/value" in group
    ][:PORTS]
    return [made for path in paths if (made := _port(group, path, BYTES // max(1, len(paths)))) is not None]


def _port(group: zarr.Group, path: str, room: int) -> dict[str, Any] | None:
    """Return the maps of one port, as many as have ``room`` bytes; None without records that can be drawn."""
    steps, array = read_array(group, f"{path}/step"), array_of(group, f"{path}/value")
    axes = array.shape[2:]
    size = int(np.prod(axes)) if len(axes) > 1 else int(np.prod(array.shape[1:]))
    if not len(steps) or array.ndim < 2 or not 0 < size <= LARGEST or not np.issubdtype(array.dtype, np.floating):
        return None

    def read(record: int) -> npt.NDArray[np.float64]:
        found = read_array(group, f"{path}/value", start=record, rows=1, columns=1 if len(axes) > 1 else None)[0]
        found = found[0] if len(axes) > 1 else found
        return _pooled(np.asarray(found, dtype=np.float64).reshape(len(found), -1))

    tall, first = axes[0] if len(axes) > 1 else array.shape[1], read(0)
    count = max(1, min(RECORDS, len(steps), 3 * room // (4 * first.size)))
    chosen = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(np.int64)).tolist()
    maps = np.stack([read(record) for record in chosen])
    finite = np.abs(maps[np.isfinite(maps)])
    limit = float(np.quantile(finite, 0.995)) if finite.size else 0.0
    scaled = np.clip(maps / (limit or 1.0), -1, 1) * 127 + 127
    coded = np.where(np.isfinite(maps), np.nan_to_num(scaled).round(), MISSING).astype(np.uint8)
    return {
        "name": path,
        "steps": steps[chosen].tolist(),
        "height": maps.shape[1],
        "width": maps.shape[2],
        "limit": limit,
        "axes": [int(tall), int(size // tall), "position" if len(axes) > 1 else "row"],
        "values": base64.b64encode(coded.tobytes()).decode(),
    }


def _pooled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return means of a matrix over at most :data:`HEIGHT` x :data:`WIDTH` cells of nearly equal size."""
    for axis, most in enumerate((HEIGHT, WIDTH)):
        size = values.shape[axis]
        edges = np.unique(np.linspace(0, size, min(size, most), endpoint=False).astype(np.int64))
        values = np.add.reduceat(values, edges, axis=axis)
        values /= np.expand_dims(np.diff([*edges.tolist(), size]), 1 - axis)
    return values
