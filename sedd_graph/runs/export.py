"""Export of a run folder: its newest weights with the lock file and tokenizer that they need, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK
from sedd_graph.runs.open import open_run

__all__ = ["export_run"]


def export_run(path: Path, out: Path, *, device: torch.device) -> str:
    """Write the newest weights of the run folder ``path`` to ``out``, which :func:`sedd_graph.build` opens.

    Returns:
        The file of the run folder that the weights come from.

    Raises:
        UserError: ``path`` is not a run folder, or ``out`` holds a run or is a file.
    """
    if (out / LOCK).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already; choose another folder")
    run = open_run(path, device=device, compile="off")
    run.engine.save(out)
    return run.weights
