"""Arrays of the zarr v3 stores ``activations.zarr`` and ``samples.zarr``, which can be read while a run writes them.

Arrays grow along their first axis. A chunk is written before the shape of the array is extended, so that readers see
only complete rows, even after the writer was killed. Chunks are written one at a time, since zarr would write several
in parallel and continue with the others after a failure. Each chunk ends with its CRC-32C, which zarr verifies when it
reads the chunk, and chunks of zeros are written, too, so that a missing chunk is not taken for zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from sedd_graph.errors import UserError
from sedd_graph.inputs.files import size_text
from sedd_graph.store.durable import publish
from sedd_graph.store.files import disk_faults, numbered, part_folder
from sedd_graph.store.manifest import DamagedError, entry_of, hash_text

__all__ = ["array_of", "empty", "extend", "open_stored", "read_array", "stores", "write_samples"]

Array = npt.NDArray[Any]
CHUNK = 2**18
"""Array elements per chunk of samples: 2 MiB of int64 tokens."""
MAX_BYTES, MAX_CHUNK, MAX_CHUNKS = 2 * 2**30, 256 * 2**20, 2**20
"""Limits on what is read of one array: bytes, bytes of a chunk, and number of chunks."""


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a zarr group.

    Args:
        group: The zarr group.
        name: Name of the array in the group.

    Raises:
        UserError: The group contains something other than an array under this name.
    """
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise UserError(f"{group.store_path}: {name} is not an array")
    return found


def _hashes(path: Path, attributes: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the attributes of a group and of the metadata of arrays in it."""
    found = {name: entry_of(path / name / "zarr.json").xxh3_128 for name in names}
    return {**found, "attributes": hash_text(json.dumps(attributes, sort_keys=True))}


def open_stored(path: Path) -> zarr.Group:
    """Open a zarr group of samples for reading.

    Raises:
        DamagedError: Its metadata are not those that were written.
    """
    try:
        group = zarr.open_group(str(path), mode="r", zarr_format=3)
        attributes = dict(group.attrs)
        hashes = attributes.pop("hashes", None)
        if not isinstance(hashes, dict | None):
            raise TypeError("hashes is not a mapping")
        names = [name for name in hashes or () if name != "attributes"]
    except Exception as error:  # zarr raises many classes for metadata that are not its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedError(f"{path / 'zarr.json'} is damaged: {first}") from None
    if hashes is not None and (found := _hashes(path, attributes, names)) != hashes:
        name = next((name for name in names if found[name] != hashes[name]), ".")
        raise DamagedError(f"{path / name / 'zarr.json'} is not the file that was written")
    return group


def read_array(
    group: zarr.Group, name: str, *, rows: int | None = None, columns: int | None = None, start: int = 0
) -> Array:
    """Return the values of an array of a zarr group, which may come from anyone; only the chunks needed are read.

    Args:
        group: The zarr group.
        name: Name of the array in the group.
        rows: Number of rows to read; None for all from the first one to read.
        columns: Number of entries of the second axis to read, from the first; None for all.
        start: Index of the first row to read.

    Raises:
        DamagedError: A chunk is missing or damaged. The message names the array.
        UserError: The group contains no array under this name, or the size that its metadata declare, of what is to be
            read or of a chunk, exceeds a limit (:data:`MAX_BYTES`, :data:`MAX_CHUNK`, :data:`MAX_CHUNKS`).
    """
    where = f"{group.store_path}/{name}".removeprefix("file://")
    try:
        array = array_of(group, name)
    except KeyError:
        raise UserError(f"{where} does not exist") from None
    except (ValueError, TypeError, OSError) as error:
        raise DamagedError(f"{where}/zarr.json is damaged: {str(error).splitlines()[0]}") from None
    ranges = [range(size) for size in array.shape]
    for axis, part in enumerate((slice(start, None if rows is None else start + rows), slice(columns))[: array.ndim]):
        ranges[axis] = ranges[axis][part]
    select = tuple(slice(found.start, found.stop) for found in ranges)
    try:
        keys = _chunk_keys(array, ranges, where)
        missing = sum(not sync((array.store_path / key).exists()) for key in keys)
        if missing:
            raise DamagedError(f"{where}: {missing} chunks are missing")
        return np.asarray(array[select])
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        raise DamagedError(f"{where} is damaged: {str(error).splitlines()[0]}") from None


def _chunk_keys(array: zarr.Array[Any], part: Sequence[range], where: str) -> Iterator[str]:
    """Return the keys of the chunks of a part of an array, a range of each axis, if they are not too large."""
    sizes = [max(1, size) for size in array.shards or array.chunks]
    chunks = [range(r.start // size, -(-r.stop // size) if r else 0) for r, size in zip(part, sizes, strict=True)]
    for what, declared, limit in (
        ("what is to be read", math.prod(map(len, part)) * array.dtype.itemsize, MAX_BYTES),
        ("a chunk", math.prod(sizes) * array.dtype.itemsize, MAX_CHUNK),
    ):
        if declared > limit:
            raise UserError(f"{where}: {what} has {size_text(declared)}, as declared; the limit is {size_text(limit)}")
    if (count := math.prod(map(len, chunks))) > MAX_CHUNKS:
        raise UserError(f"{where}: {count:,} chunks are to be read; the limit is {MAX_CHUNKS:,}")
    return map(array.metadata.encode_chunk_key, itertools.product(*chunks))


def extend(array: zarr.Array[Any], count: int, data: Array) -> None:
    """Write ``data`` after the first ``count`` rows, then extend the array, so that readers see only whole rows."""
    shape = (count + len(data), *array.shape[1:])
    metadata: Any = dataclasses.replace(array.metadata, shape=shape)
    wider = zarr.Array(zarr.AsyncArray(metadata, array.store_path, config={"write_empty_chunks": True}))
    rows = array.chunks[0]
    for start in range(count - count % rows, shape[0], rows):
        first, last = max(start, count), min(start + rows, shape[0])
        wider[first:last] = data[first - count : last - count]
    array.resize(shape)


def stores(folder: Path, stem: str) -> list[Path]:
    """Return the paths of the zarr groups ``stem.zarr``, ``stem-2.zarr``, ... in a folder, newest first.

    Args:
        folder: The folder, such as a run folder.
        stem: Name of the groups without number and suffix, such as ``samples``.
    """
    found = []
    for path in folder.glob(f"{stem}*.zarr"):
        number = re.fullmatch(rf"{stem}(?:-(\d+))?\.zarr", path.name)
        if number and (path / "zarr.json").is_file():
            found.append((int(number[1] or 1), path))
    return [path for _, path in sorted(found, reverse=True)]


def write_samples(
    path: Path,
    arrays: Mapping[str, Array],
    *,
    text: Sequence[str] | None = None,
    trajectory: npt.NDArray[np.int32] | None = None,
    confidence: npt.NDArray[np.uint8] | None = None,
    attributes: Mapping[str, Any],
    numbers: bool = True,
) -> Path:
    """Write a batch of samples to a new zarr group, atomically and durably.

    Args:
        path: Path of the group, such as ``samples.zarr``; if it exists, a number is added (``samples-2.zarr``).
        arrays: Arrays [row, ...] by name. For text: ``tokens`` int64 [row, position], and ``lengths`` int64 [row],
            the number of tokens of each row's text. For points: ``x`` float32 [row, ...], and ``nats`` float64 [row],
            -log p, if the process computes it.
        text: Text of each row; None for samples that are not text.
        trajectory: Tokens at the start (index 0) and after each sampler step, int32 [step, row, position]; None to
            store none.
        confidence: Probability that the model gave each token of ``trajectory`` when it was drawn, times 254, rounded, and 255 where
            it is not known, uint8 [step, row, position]; None to store none.
        attributes: Attributes of the group as JSON values, such as sampler, seed and revision. The attribute ``hashes``
            is added: hashes of these and of the arrays' metadata.
        numbers: False to raise an error if the path exists, instead of adding a number to it.

    Returns:
        The path of the new group.

    Raises:
        UserError: The path is invalid, such as a folder inside a file; or it exists, and ``numbers`` is False.
        EnvironmentFault: The disk cannot be written.
    """
    if not numbers and path.exists():
        raise UserError(f"{path} exists already; choose another name")
    with disk_faults(path.name, path.parent), part_folder(path) as part:
        root = zarr.open_group(str(part), mode="a", zarr_format=3)  # "w" would replace the folder, which holds a lock
        for name, data in arrays.items():
            extend(empty(root, name, data, rows=max(1, CHUNK // max(1, math.prod(data.shape[1:])))), 0, data)
        for name, steps in (("trajectory", trajectory), ("confidence", confidence)):
            if steps is not None:  # a file for each step could be a million files
                rows = max(1, CHUNK // max(1, math.prod(steps.shape[1:])))
                extend(empty(root, name, steps, rows=rows), 0, steps)
        if text is not None:
            with warnings.catch_warnings():
                # zarr warns that strings of variable length are not in the v3 specification yet
                warnings.simplefilter("ignore")
                strings = root.create_array(
                    "text",
                    shape=(len(text),),
                    chunks=(max(1, len(text)),),
                    dtype=str,
                    compressors=[ZstdCodec(), Crc32cCodec()],
                    config={"write_empty_chunks": True},
                )
                strings[:] = np.asarray(list(text), dtype=object)
        written = json.loads(json.dumps(dict(attributes)))  # as a reader gets it, with lists for tuples
        root.attrs.update({**written, "hashes": _hashes(part, written, sorted(root.array_keys()))})
        return publish(part, numbered(path) if numbers else [path])


def empty(
    group: zarr.Group, name: str, like: Array, *, rows: int, attributes: dict[str, Any] | None = None
) -> zarr.Array[Any]:
    """Create an empty array in a zarr group, and replace an existing array of that name.

    Args:
        group: The zarr group.
        name: Name of the array.
        like: An array with the dtype and the shape [row, ...] of the new one, which has 0 rows at first.
        rows: Number of rows per chunk.
        attributes: Attributes of the new array; None for none.
    """
    row = like.shape[1:]
    return group.create_array(
        name,
        shape=(0, *row),
        chunks=(rows, *row),
        dtype=like.dtype,
        compressors=[ZstdCodec(), Crc32cCodec()],
        attributes=attributes,
        overwrite=True,
    )
