"""The precision in which commands evaluate the network of a run folder."""

from __future__ import annotations

import torch

from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.errors import UserError
from sedd_graph.runs.open import Run

__all__ = ["choose_dtype", "dtype_name"]


def choose_dtype(run: Run, name: str | None = None) -> None:
    """Set the precision in which the network of a run is evaluated and sampled (:attr:`Network.dtype`).

    Args:
        run: The opened run folder.
        name: ``auto`` (bfloat16 by autocast on a GPU that supports it, else float32), ``float32`` or ``bfloat16``; None:
            ``train.evaluate.dtype`` of the blueprint, or ``auto`` if it has no ``train.evaluate``.

    Raises:
        UserError: The model computes in float32 only, and ``name`` is ``bfloat16``.
    """
    if name is None:
        config = run.report.train.evaluate
        name = "auto" if config is None else config.dtype
    network, process = run.engine.network, run.engine.process
    if not process.autocasts and name == "bfloat16":
        raise UserError(f"a process of {process.family} is evaluated in float32, not in bfloat16: leave dtype out")
    network.dtype = pick_dtype(name, network.device) if process.autocasts else torch.float32


def dtype_name(run: Run) -> str:
    """Return the name of the precision of a run's network, such as ``float32``, for records."""
    return str(run.engine.network.dtype).removeprefix("torch.")
