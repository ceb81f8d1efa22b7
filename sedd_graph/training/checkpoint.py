"""Training checkpoints, folders of safetensors and JSON files that are written atomically.

A checkpoint is untrusted input, so it contains no pickles (torch's distributed checkpoint pickles its metadata). The
state of the optimizers is stored as tensors by name (docs/explanation/decisions.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.store.files import disk_faults, read_json

__all__ = ["Checkpoint", "latest_checkpoint", "load_weights", "read_checkpoint", "start_point", "write_checkpoint"]

_NAME = re.compile(r"step-(\d{8,})")
_KEY = re.compile(r"(\d{1,9})/(\d{1,9})/(\w+)", re.ASCII)


@dataclasses.dataclass
class Checkpoint:
    """State of a training run after some step, from which training can be resumed."""

    model: dict[str, Tensor]
    """Parameters and buffers of the network by name."""
    average: dict[str, Tensor] | None
    """Exponential moving average of the parameters, and the buffers, by name; None without ``train.ema``."""
    optimizers: dict[str, Tensor]
    """State of the optimizers as tensors by name, in the format of :func:`pack_optimizers`."""
    state: dict[str, Any]
    """Content of ``state.json``: the step, the training time in seconds, the number of updates of the moving average,
    the number of processes, and the ``train`` section of the blueprint."""


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of the optimizers as CPU tensors by name.

    A name is ``<index of the optimizer>/<index of the parameter>/<key of the state>``, such as ``0/3/exp_avg``.
    """
    packed = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is None:  # such as the momentum of SGD without momentum
                    continue
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                packed[f"{number}/{parameter}/{key}"] = tensor.detach().cpu().contiguous()
    return packed


def unpack_optimizers(optimizers: list[torch.optim.Optimizer], packed: dict[str, Tensor]) -> None:
    """Load optimizer state from tensors.

    Args:
        optimizers: The optimizers, which are changed in place.
        packed: Tensors by name, in the format of :func:`pack_optimizers`.

    Raises:
        UserError: The state is that of another model or of other optimizers.
    """
    named = {name: _KEY.fullmatch(name) for name in packed}
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for name, parts in named.items():
            if parts is None:
                raise UserError(f"the checkpoint's optimizer state has an unknown name: {name!r}")
            if int(parts[1]) == number:
                state.setdefault(int(parts[2]), {})[parts[3]] = packed[name].clone()
        whole = optimizer.state_dict()
        expected = {p for group in whole["param_groups"] for p in group["params"]}
        if state and set(state) != expected:
            raise UserError("the checkpoint's optimizer state is of another model or optimizer")
        optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint atomically, then delete all but the newest checkpoints.

    Args:
        folder: The folder of checkpoints.
        step: Number of optimizer steps done.
        checkpoint: The state to write.
        keep: Number of newest checkpoints that are retained.

    Returns:
        The path of the checkpoint, such as ``folder/step-00000100``.

    Raises:
        EnvironmentFault: The disk is full or cannot be written.
    """
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.{secrets.token_hex(4)}.part"
    with disk_faults("a checkpoint", folder):
        try:
            part.mkdir(parents=True)
            save_tensors(checkpoint.model, part / "model.safetensors")
            if checkpoint.average is not None:
                save_tensors(checkpoint.average, part / "ema.safetensors")
            save_tensors(checkpoint.optimizers, part / "optimizer.safetensors")
            state = json.dumps({**checkpoint.state, "step": step}, indent=2, sort_keys=True)
            (part / "state.json").write_text(state + "\n", encoding="utf-8")
            for file in part.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            if final.exists():  # a resumed run has reached the same step again
                final.rename(folder / f".{final.name}.{secrets.token_hex(4)}.part")
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    for old in [*_all(folder)[:-keep], *folder.glob(".step-*.part")]:  # .part: of a process that was killed
        shutil.rmtree(old, ignore_errors=True)
    return final


def _all(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the path of the newest complete checkpoint in ``folder``, or None if there is no checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def start_point(run: Path, *, resume: bool) -> Path | None:
    """Return the path of the checkpoint from which a run resumes, or None for a run that starts at step 0.

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
    return newest


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint at ``path``. Raises :class:`UserError` if a file is missing or invalid."""
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{path / 'state.json'} is not the state of a checkpoint")
    average = path / "ema.safetensors"
    return Checkpoint(
        model=_tensors(path / "model.safetensors"),
        average=_tensors(average) if average.exists() else None,
        optimizers=_tensors(path / "optimizer.safetensors"),
        state=state,
    )


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Load parameters and buffers into a module by name.

    Args:
        model: The module to load into.
        weights: Parameters and buffers by name, as in a state dict.
        where: Name of the file that they come from, for messages.

    Raises:
        UserError: Names or shapes differ from those of ``model``; the message lists the first five differences of each
            sort.
    """
    own = model.state_dict()
    wrong = []
    for text, names in (("missing", own.keys() - weights.keys()), ("unknown", weights.keys() - own.keys())):
        if names:
            wrong.append(f"{text}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    shapes = sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
    wrong += [f"{k}: {list(weights[k].shape)}, not {list(own[k].shape)}" for k in shapes[:5]]
    if wrong:
        raise UserError(f"{where} does not fit this model: {'; '.join(wrong)}")
    model.load_state_dict(weights)
