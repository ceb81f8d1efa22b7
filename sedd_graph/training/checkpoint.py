"""Training checkpoints: folders of safetensors and JSON files.

A checkpoint is untrusted input, so it contains no pickles. Its manifest has a hash of each file, and of the run's lock file
and tokenizer (docs/explanation/decisions.md). It holds tensors of three kinds: ``model``, ``optimizer`` and, with
``train.ema``, ``ema``; in a distillation also ``helpers``, the networks beside the student. A kind is one file, such as ``model.safetensors``; or one file for each process that held a shard,
such as ``model-00001-of-00004.safetensors``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.component.strict import Strict
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.durable import rename
from sedd_graph.store.files import MISSING, disk_faults, free_name, reason_of, subfolder, sweep
from sedd_graph.store.manifest import (
    BUILT,
    MANIFEST,
    DamagedError,
    Manifest,
    read_manifest,
    read_typed,
    verify_files,
)

__all__ = ["AVERAGE", "HELPERS", "METRICS", "MODEL", "OPTIMIZER", "STATE", "State", "Window", "checkpoints", "file_name", "files_of", "hidden", "latest_checkpoint", "read_state", "read_tensors", "require_start", "set_aside", "step_of", "sweep_checkpoints"]  # fmt: skip

MODEL, AVERAGE, OPTIMIZER, HELPERS = "model", "ema", "optimizer", "helpers"
"""Kinds of tensors in a checkpoint."""
STATE = "state.json"
"""File name, in a checkpoint, of its :class:`State`."""
METRICS = "metrics.jsonl"
"""File name, in a run folder, of the metrics."""
_NAME = re.compile(r"step-(\d{8,10})", re.ASCII)
_SHARD = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)

Count = Annotated[int, pydantic.Field(ge=0, le=10**10)]
Seconds = Annotated[float, pydantic.Field(ge=0)]


class Window(Strict):
    """Training loss summed since the last log record of the loss, one sum per process, for the next log record."""

    nats: list[float] = [0.0]
    """For each process, the loss summed over its rows of all steps since the last log record, nats."""
    counted: list[float] = [0.0]
    """For each process, the number of tokens (or of coordinates of points) whose loss is summed in ``nats``."""
    logged: Count = 0
    """Optimizer step of the last log record of the loss; 0 if there is none."""
    logged_at: Seconds = 0.0
    """Training time at the last log record of the loss, seconds; 0 if there is none."""

    @pydantic.model_validator(mode="after")
    def _each_process_has_both(self) -> Window:
        if not 0 < len(self.nats) == len(self.counted):
            raise ValueError("nats and counted have different lengths")
        return self


class State(Strict):
    """Content of a checkpoint's ``state.json``: its step and time, counters, and the ``train`` section."""

    step: Count
    """Number of optimizer steps done."""
    seconds: Seconds
    """Training time, seconds."""
    average_count: Count
    """Number of updates of the exponential moving average of the weights; 0 without ``train.ema``."""
    world: Annotated[int, pydantic.Field(ge=1, le=10**6)]
    """Number of processes."""
    window: Window
    """Training loss summed since the last log record of the loss."""
    train: dict[str, pydantic.JsonValue]
    """The ``train`` section of the blueprint."""


def file_name(kind: str, shard: int = 0, shards: int = 1) -> str:
    """Return the name of the file of a kind of tensors, or of the shard with index ``shard`` of them."""
    return f"{kind}.safetensors" if shards == 1 else f"{kind}-{shard + 1:05d}-of-{shards:05d}.safetensors"


def files_of(manifest: Manifest, kind: str, where: Path) -> list[str]:
    """Return the names of the files that hold a kind of tensors, in the order of the shards; none if there are none.

    Args:
        manifest: Manifest of the checkpoint.
        kind: The kind, such as :data:`MODEL`.
        where: The folder of the checkpoint, for the message.

    Raises:
        DamagedError: Shards are missing.
    """
    found = [parts for parts in map(_SHARD.fullmatch, sorted(manifest.files)) if parts and parts[1] == kind]
    if not found:
        return [name for name in [file_name(kind)] if name in manifest.files]
    names = [parts[0] for parts in found]
    expected = [file_name(kind, shard, int(found[0][3])) for shard in range(int(found[0][3]))]
    if names != expected or file_name(kind) in manifest.files:
        raise DamagedError(f"{where / MANIFEST} lists {', '.join(names[:3])} ..., not all shards of {kind}")
    return names


def hidden(path: Path) -> Path:
    """Return a new temporary name beside ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def sweep_checkpoints(folder: Path) -> None:
    """Delete temporary folders: checkpoints that were not fully written, and old ones renamed for deletion.

    Raises:
        UserError: The folder is a link out of the run folder (:func:`sedd_graph.store.files.subfolder`).
    """
    sweep(subfolder(folder.parent, folder.name), ".step-*.part")


def checkpoints(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, oldest first, whether they are whole or damaged."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder, such as 100 for ``step-00000100``."""
    return int(path.name.split("-")[1])


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the path of the newest checkpoint in ``folder``, or None if there is no checkpoint."""
    found = checkpoints(folder)
    return found[-1] if found else None


def require_start(run: Path, *, resume: bool) -> None:
    """Check that a run can be started, or resumed, as requested.

    Args:
        run: The run folder.
        resume: True to resume.

    Raises:
        UserError: ``resume`` is false and the run has a checkpoint, or ``resume`` is true and it has none.
    """
    newest = latest_checkpoint(run / "checkpoints")
    if newest is not None and not resume:
        raise UserError(f"{run} has been trained already: add --resume to continue, or build a new run")
    if newest is None and resume:
        raise UserError(f"there is no checkpoint under {run / 'checkpoints'} to resume from")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing reads or counts it, and return its new path."""
    target = free_name(path.with_name(f"damaged-{path.name}"))
    with disk_faults("the name of a damaged checkpoint", path.parent):
        rename(path, target)
    return target


def read_state(
    path: Path, *, kinds: Sequence[str] = (MODEL, OPTIMIZER), rank: int = 0, size: int = 1
) -> tuple[State, Manifest]:
    """Verify a checkpoint against its manifest, and the run's lock file and tokenizer, and read its ``state.json``.

    Args:
        path: The folder of the checkpoint.
        kinds: Kinds of tensors that must be there. If :data:`OPTIMIZER` is among them, all files are verified; else only
            those of these kinds.
        rank: Rank of this process among those that share the work of verifying.
        size: Number of these processes.

    Returns:
        The state, and the manifest.

    Raises:
        DamagedError: A file is missing or is not what was written, or belongs to another step.
    """
    manifest = read_manifest(path)
    needed = [name for kind in kinds for name in files_of(manifest, kind, path) or [file_name(kind)]]
    names = sorted({*needed, *(manifest.files if OPTIMIZER in kinds else ())} - {STATE})
    verify_files(path, manifest.files, names=[STATE, *names[rank::size]])
    verify_files(path.parent.parent, {name: entry for name, entry in manifest.run.items() if name in BUILT})
    state = read_typed(path / STATE, State)
    if state.step != step_of(path):
        raise DamagedError(f"{path / STATE} is of step {state.step}: the folder's name says {step_of(path)}")
    return state, manifest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: The file.

    Raises:
        DamagedError: The file is missing, or is not a safetensors file.
        EnvironmentFault: The file cannot be read for another reason, such as no memory.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        number, reason = reason_of(error)
        missing = isinstance(error, MISSING)
        if missing and path.is_file():  # what safetensors says whenever it cannot open a file
            raise EnvironmentFault(f"{path} cannot be opened") from None
        if missing or (isinstance(error, SafetensorError) and number is None):
            raise DamagedError(f"{path} cannot be read: {error}") from None
        raise EnvironmentFault(f"{path} cannot be read: {reason}") from None
