"""Training checkpoints, folders of safetensors and JSON files that are written atomically and durably.

A checkpoint is untrusted input, so it contains no pickles (torch's distributed checkpoint pickles its metadata). Its
manifest has a hash of each file, and of the run's lock file and tokenizer (docs/explanation/decisions.md).
"""

from __future__ import annotations

import dataclasses
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
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.durable import make_folder, rename, sync_tree
from sedd_graph.store.files import MISSING, disk_faults, free_name, reason_of, remove, subfolder, sweep, write_json
from sedd_graph.store.manifest import (
    BUILT,
    DamagedError,
    Entry,
    read_manifest,
    read_typed,
    verify_files,
    write_manifest,
)

__all__ = ["AVERAGE", "METRICS", "MODEL", "OPTIMIZER", "Checkpoint", "State", "Window", "checkpoints", "latest_checkpoint", "read_checkpoint", "read_state", "read_tensors", "require_start", "set_aside", "step_of", "sweep_checkpoints", "write_checkpoint"]  # fmt: skip

MODEL, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
"""File names in a checkpoint."""
METRICS = "metrics.jsonl"
"""File name, in a run folder, of the metrics."""
_NAME = re.compile(r"step-(\d{8,10})", re.ASCII)

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


@dataclasses.dataclass
class Checkpoint:
    """State of a training run after some step, from which training can be resumed."""

    model: dict[str, Tensor]
    """Parameters and buffers of the network by name."""
    average: dict[str, Tensor] | None
    """Exponential moving average of the parameters, and the buffers, by name; None without ``train.ema``."""
    optimizers: dict[str, Tensor]
    """State of the optimizers as tensors by name (:func:`sedd_graph.training.optimizer_state.pack_optimizers`)."""
    state: State
    """Content of ``state.json``."""
    metrics: Entry | None = None
    """Size and hash of ``metrics.jsonl`` when the checkpoint was written; None if there was no such file."""


def write_checkpoint(run: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint atomically and durably, then delete all but the newest checkpoints.

    Args:
        run: The run folder; checkpoints are in its folder ``checkpoints``.
        checkpoint: The state to write.
        keep: Number of newest checkpoints that are retained.

    Returns:
        The path of the checkpoint, such as ``checkpoints/step-00000100``.

    Raises:
        EnvironmentFault: The disk is full or cannot be written.
        UserError: ``checkpoints`` is a link out of the run folder (:func:`sedd_graph.store.files.subfolder`).
    """
    folder = subfolder(run, "checkpoints")
    final = folder / f"step-{checkpoint.state.step:08d}"
    part = _hidden(final)
    tensors = {MODEL: checkpoint.model, OPTIMIZER: checkpoint.optimizers}
    if checkpoint.average is not None:
        tensors[AVERAGE] = checkpoint.average
    with disk_faults("a checkpoint", folder):
        try:
            make_folder(part)
            for name, named in tensors.items():
                save_tensors(named, part / name)
            write_json(part / STATE, checkpoint.state.model_dump(mode="json"))
            write_manifest(part, [*tensors, STATE], run={name: run / name for name in (*BUILT, METRICS)})
            sync_tree(part)
            if final.exists():  # something else under this name: a checkpoint from which this run has not started
                rename(final, _hidden(final))
            rename(part, final)
            for old in checkpoints(folder)[:-keep]:
                rename(old, _hidden(old))  # so that a kill leaves no half checkpoint under a checkpoint's name
        finally:
            remove(part)
            sweep_checkpoints(folder)
    return final


def _hidden(path: Path) -> Path:
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


def read_state(path: Path, *, verify: Sequence[str] | None = None) -> tuple[State, dict[str, Entry]]:
    """Verify a checkpoint against its manifest, and the run's lock file and tokenizer, and read its ``state.json``.

    Args:
        path: The folder of the checkpoint.
        verify: Names of the files to verify in addition to ``state.json``; None for all.

    Returns:
        The state; and the sizes and hashes that the manifest lists for files of the run folder, by file name.

    Raises:
        DamagedError: A file is missing or is not what was written, or belongs to another step.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest.files, names=[*verify, STATE] if verify else {*manifest.files, MODEL, OPTIMIZER, STATE})
    verify_files(path.parent.parent, {name: entry for name, entry in manifest.run.items() if name in BUILT})
    state = read_typed(path / STATE, State)
    if state.step != step_of(path):
        raise DamagedError(f"{path / STATE} is of step {state.step}: the folder's name says {step_of(path)}")
    return state, manifest.run


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and read the checkpoint at ``path``.

    Raises:
        DamagedError: A file is missing or is not what was written.
    """
    state, others = read_state(path)
    average = path / AVERAGE
    return Checkpoint(
        model=read_tensors(path / MODEL),
        average=read_tensors(average) if average.exists() else None,
        optimizers=read_tensors(path / OPTIMIZER),
        state=state,
        metrics=others.get(METRICS),
    )


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
