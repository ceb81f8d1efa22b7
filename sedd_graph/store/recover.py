"""Recovery of the saved activations of one output port in ``activations.zarr`` when a run resumes.

A record is the activation of the port at one training step. After a power cut or other damage, chunks or metadata of
the zarr arrays may be missing, empty or changed. Records in damaged chunks are reported and replaced by NaN, damaged
metadata is rewritten from a copy, and intact records up to the step from which the run resumes are retained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import default_buffer_prototype

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.arrays import empty, extend
from sedd_graph.store.durable import METADATA, DurableStore
from sedd_graph.store.files import MISSING, read_json, remove, write_json
from sedd_graph.store.manifest import DamagedError, hash_text

__all__ = ["STEPS", "copy_of", "recover"]

STEPS = 1024
"""Records per chunk of the array of steps."""
GROUP = {"attributes": {}, "node_type": "group", "zarr_format": 3}
"""Metadata of a group."""
Steps = npt.NDArray[np.int64]
Say = Callable[[str], None]


def _metadata(array: zarr.Array[Any]) -> dict[str, Any]:
    """Return the content of an array's ``zarr.json``."""
    found: dict[str, Any] = json.loads(array.metadata.to_buffer_dict(default_buffer_prototype())[METADATA].to_bytes())
    return found


def _text(metadata: dict[str, Any]) -> str:
    """Return metadata without the number of records, as text."""
    return json.dumps({**metadata, "shape": metadata["shape"][1:]}, sort_keys=True)


def copy_of(value: zarr.Array[Any]) -> dict[str, Any]:
    """Return a copy of the zarr metadata of ``value``, from which :func:`recover` can restore damaged metadata.

    The copy is stored in the attributes of the array ``step`` beside ``value``.

    Args:
        value: Saved activations of a port, [record, b, ...], b rows of the batch.

    Returns:
        The attributes ``value``, the metadata as JSON text without the number of records, and ``xxh3_128``, the hash of
        that text.
    """
    text = _text(_metadata(value))
    return {"value": text, "xxh3_128": hash_text(text)}


def recover(path: Path, name: str, *, every: int, rows: int, step: int, say: Say) -> None:
    """Recover the saved activations of a port up to a training step, and delete later ones, which the run saves again.

    A record is the activation of the port at one training step.

    Args:
        path: The folder ``activations.zarr``.
        name: Path of the port's zarr group in that folder, such as ``trunk/0/x``.
        every: Training steps between two records.
        rows: Records per chunk of the array of activations.
        step: Training step from which the run resumes.
        say: Function that prints a line for the user.

    Raises:
        DamagedError: The metadata of the array of activations and the copy of it are both damaged, so that the shape of
            a record is unknown.
        OSError: A file cannot be read, such as for too many open files. Nothing is taken for damaged.
    """
    folder = path / name
    parents = [parent for parent in folder.parents if parent.is_relative_to(path)]
    for part in (*folder.rglob("*.partial"), *(p for parent in parents for p in parent.glob("*.partial"))):
        part.unlink(missing_ok=True)  # of a process that was killed
    due = np.arange(every, step + 1, every, dtype=np.int64)
    if not len(due):
        for array in ("step", "value"):
            remove(folder / array)
    if not (folder / "step").exists() and not (folder / "value").exists():
        if len(due):
            say(f"warning     {folder}: the records of steps {due[0]} to {due[-1]} are missing")
        return
    _recover_groups(path, folder, say)
    steps, copy = _read_steps(folder, every)
    value = _recover_value(folder, copy, rows, say)
    found = due if steps is None else steps[steps <= step]
    if len(found) < len(due) <= value.shape[0] and np.array_equal(found, due[: len(found)]):
        steps, found = None, due  # records are counted in both arrays, and only one count is too small
    if steps is None:
        say(f"warning     {folder / 'step'} is damaged and was rewritten")
    elif len(found) < len(due):
        say(f"warning     {folder}: {len(due) - len(found)} of the {len(due)} records up to step {step} are missing")
    if steps is None or copy is None or len(found) < len(steps):
        _write_steps(path, name, value, found)
    _set_count(folder / "value", value, len(found))
    _fill_damaged(path, name, found, rows, say)


def _recover_groups(path: Path, folder: Path, say: Say) -> None:
    """Rewrite the metadata of the groups from ``path`` to ``folder`` where they are damaged: they hold nothing else."""
    for group in (folder, *folder.parents):
        try:
            found = read_json(group / METADATA)
        except UserError:
            found = None
        if found != GROUP:
            say(f"warning     {group / METADATA} is damaged and was rewritten")
            remove(group / METADATA)
            write_json(group / METADATA, GROUP)
        if group == path:
            return


def _open(folder: Path) -> zarr.Array[Any] | None:
    """Return an array; None if its metadata are missing or damaged."""
    try:
        read_json(folder / METADATA)
        return zarr.open_array(DurableStore(folder), mode="r+", zarr_format=3)
    except MISSING:
        return None
    except (OSError, EnvironmentFault):  # a fault of the machine, not of the file
        raise
    except Exception:  # zarr raises many classes for metadata that are not its own
        return None


def _read_steps(folder: Path, every: int) -> tuple[Steps | None, dict[str, Any] | None]:
    """Return the steps of the records, and the copy of the metadata of ``value``; None for what is damaged."""
    array = _open(folder / "step")
    if array is None:
        return None, None
    text, steps = array.attrs.get("value"), None
    copy = json.loads(text) if isinstance(text, str) and array.attrs.get("xxh3_128") == hash_text(text) else None
    if array.dtype == np.int64 and array.ndim == 1 and array.chunks == (STEPS,) and _chunks(folder / "step", array):
        try:
            steps = np.asarray(array[:], dtype=np.int64)
        except OSError:
            raise
        except Exception:  # decompression and checksum raise different classes
            steps = None
    if steps is not None and len(steps) and (steps[0] < every or (steps % every).any() or (np.diff(steps) <= 0).any()):
        steps = None
    return steps, copy


def _chunks(folder: Path, array: zarr.Array[Any]) -> bool:
    """Return whether there are as many chunks as the shape of an array says."""
    wanted = -(-array.shape[0] // array.chunks[0])
    return not wanted or ((folder / "c").is_dir() and sum(1 for _ in (folder / "c").iterdir()) >= wanted)


def _recover_value(folder: Path, copy: dict[str, Any] | None, rows: int, say: Say) -> zarr.Array[Any]:
    """Return the array of records, whose metadata are rewritten from their copy if they differ from it."""
    value = _open(folder / "value")
    if copy is None:
        if value is None or value.chunks[0] != rows:
            raise DamagedError(
                f"{folder / 'value' / METADATA} is damaged, and so is its copy in {folder / 'step' / METADATA}: move "
                "activations.zarr away; records then begin at the step from which the run resumes"
            )
        return value
    if value is None or _text(_metadata(value)) != _text({**copy, "shape": [0, *copy["shape"]]}):
        count = len(list((folder / "value" / "c").glob("*"))) * rows if value is None else value.shape[0]
        say(f"warning     {folder / 'value' / METADATA} is damaged and was rewritten")
        remove(folder / "value" / METADATA)
        write_json(folder / "value" / METADATA, {**copy, "shape": [count, *copy["shape"]]})
        value = zarr.open_array(DurableStore(folder / "value"), mode="r+", zarr_format=3)
    return value


def _write_steps(path: Path, name: str, value: zarr.Array[Any], steps: Steps) -> None:
    """Replace the array of steps."""
    group = zarr.open_group(DurableStore(path / name), mode="r+", zarr_format=3)
    remove(path / name / "step")
    extend(empty(group, "step", steps, rows=STEPS, attributes=copy_of(value)), 0, steps)


def _set_count(folder: Path, array: zarr.Array[Any], count: int) -> None:
    """Set the number of records, then delete the chunks after them: zarr deletes first, and a kill would show zeros."""
    if array.shape[0] != count:
        write_json(folder / METADATA, {**_metadata(array), "shape": [count, *array.shape[1:]]})
    for chunk in (folder / "c").glob("*"):
        if not chunk.name.isdecimal() or int(chunk.name) >= -(-count // array.chunks[0]):
            remove(chunk)


def _fill_damaged(path: Path, name: str, steps: Steps, rows: int, say: Say) -> None:
    """Replace the records in damaged and missing chunks by NaN."""
    folder = path / name / "value"
    array = zarr.open_array(DurableStore(folder), mode="r+", zarr_format=3)
    for start in range(0, len(steps), rows):
        chunk = slice(start, min(start + rows, len(steps)))
        file = folder / array.metadata.encode_chunk_key((start // rows, *(0 for _ in array.shape[1:])))
        try:
            whole = file.is_file() and array[chunk] is not None
        except OSError:
            raise
        except Exception:  # decompression and checksum raise different classes
            whole = False
        if not whole:
            remove(file)
            array[chunk] = np.nan
            lost = f"{steps[chunk.start]} to {steps[chunk.stop - 1]}"
            say(f"warning     {file} is damaged or missing: the records of steps {lost} are lost, and are now NaN")
