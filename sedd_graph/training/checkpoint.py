"""Checkpoints: safetensors and JSON only, written to a temporary name and renamed, so that they are whole or absent.

torch's distributed checkpoint keeps its metadata as a pickle; a checkpoint is untrusted input here, so the optimizer's
state is kept as plain tensors by name instead (docs/explanation/decisions.md).
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
    """Everything that training needs to resume. ``state`` is JSON; the rest are tensors by name."""

    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizers: dict[str, Tensor]
    state: dict[str, Any]


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return every tensor and number of the optimizers' state as a tensor named ``<optimizer>/<parameter>/<key>``."""
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
    """Restore what :func:`pack_optimizers` returned. Raises :class:`UserError` where it does not fit."""
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
    """Write ``folder/step-00000100`` whole, then delete all but the newest ``keep``. Returns its path."""
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
            if final.exists():  # the same step of the same run, reached again
                final.rename(folder / f".{final.name}.{secrets.token_hex(4)}.part")
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    for old in [*_all(folder)[:-keep], *folder.glob(".step-*.part")]:  # those in parts: of a process that was killed
        shutil.rmtree(old, ignore_errors=True)
    return final


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``, or None."""
    found = _all(folder)
    return found[-1] if found else None


def start_point(run: Path, *, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, or None for a run that has none.

    Raises :class:`UserError` where the run has one and is not to be resumed, or the other way round.
    """
    newest = latest_checkpoint(run / "checkpoints")
    if newest is not None and not resume:
        raise UserError(f"{run} has been trained already: add --resume to go on, or build a new run")
    if newest is None and resume:
        raise UserError(f"there is no checkpoint under {run / 'checkpoints'} to resume from")
    return newest


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises :class:`UserError` where a part is missing or broken."""
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
    """Load by name; every name and shape must fit. Raises :class:`UserError` naming what does not."""
    own = model.state_dict()
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        parts = [("missing", missing), ("unknown", extra)]
        text = "; ".join(
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for what, names in parts if names
        )
        text += "; ".join(f" {k}: {list(weights[k].shape)}, not {list(own[k].shape)}" for k in sorted(shapes)[:5])
        raise UserError(f"{where} does not fit this model: {text.strip()}")
    model.load_state_dict(weights)
