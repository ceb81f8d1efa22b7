"""Export of a run folder's newest weights, with the lock file and tokenizer, to a new folder."""

from __future__ import annotations

from pathlib import Path

import torch

from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK
from sedd_graph.runs.open import open_run

__all__ = ["export_run"]


def export_run(path: Path, out: Path, *, device: torch.device) -> str:
    """Write the newest weights of a run folder, its lock file and its tokenizer to another folder.

    :func:`sedd_graph.build` opens that folder.

    Args:
        path: The run folder.
        out: The folder to write, which is created if it does not exist.
        device: Device on which the network is constructed.

    Returns:
        Path, relative to the run folder, of the file that the weights come from; ``fresh`` if the run is not trained.

    Raises:
        UserError: ``path`` is not a run folder, or ``out`` is a file or already contains a lock file.
    """
    if (out / LOCK).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already; choose another folder")
    run = open_run(path, device=device, compile="off")
    run.engine.save(out)
    return run.weights
