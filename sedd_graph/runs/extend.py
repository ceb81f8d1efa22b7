"""Extension of a run: resuming with more steps or time, or other settings that leave the graph and the losses' meaning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK, check
from sedd_graph.store.changes import read_changes
from sedd_graph.training.config import TrainConfig

__all__ = ["extended"]

_FREE = ("steps", "budget_s", "schedule", "accumulate", "parallel", "evaluate", "sample", "checkpoint", "log_every")
"""Keys of ``train`` that may change when a run is resumed."""


def extended(path: Path, overrides: Sequence[str], *, step: int) -> tuple[list[str], bool]:
    """Return the overrides with which a run is resumed, those of earlier changes first, and whether they are new.

    Args:
        path: The run folder.
        overrides: Overrides of the command line, such as ``train.steps=3000``.
        step: Step of the newest checkpoint; 0 if there is none.

    Raises:
        UserError: An override changes what may not change, or there are fewer steps than have been done.
        DamagedError: The record of earlier changes is damaged.
    """
    _require_free(overrides)
    earlier = [override for change in read_changes(path) for override in change.overrides]
    _require_free(earlier)
    every = [*earlier, *overrides]
    if not overrides:
        return every, False
    after: TrainConfig = check(path / LOCK, every).train
    if after.steps < step:
        raise UserError(
            f"train.steps={after.steps}: the run has done {step:,} steps already; a run can only be extended"
        )
    return every, after.model_dump() != check(path / LOCK, earlier).train.model_dump()


def _require_free(overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0].strip()
        if not any(f"{name}.".startswith(f"train.{key}.") for key in _FREE):
            raise UserError(
                f"{override}: the blueprint of a run folder is locked; only {', '.join(f'train.{key}' for key in _FREE)} "
                "may change when a run is resumed. Give other overrides to `sedd-graph build`"
            )
