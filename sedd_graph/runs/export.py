"""Export of a run folder's newest weights to a new folder, in our own format or in that of the transformers library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK, check
from sedd_graph.runs.open import Run, make_engine, open_run
from sedd_graph.store.run_folder import write_folder
from sedd_graph.training.adapters import merge

__all__ = ["Exported", "Format", "export_run"]

Format = Literal["sedd_graph", "transformers"]
"""Format of an export: a folder that :func:`sedd_graph.build` opens, or one that the transformers library opens."""


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        weights: Path, relative to the run folder, of the file that the weights come from; ``fresh`` if the run is not
            trained.
        left_out: Reason why a sampler or a condition on text is not exported, by its name.
        difference: Largest difference between the logits of the export and of the run; None if they were not compared,
            as without the transformers library.
    """

    weights: str
    left_out: Mapping[str, str] = {}
    difference: float | None = None


def export_run(path: Path, out: Path, *, device: torch.device, format: Format = "sedd_graph") -> Exported:
    """Write the newest weights of a run folder, its lock file and its tokenizer to another folder.

    Args:
        path: The run folder.
        out: The folder to write, which is created if it does not exist.
        device: Device on which the network is constructed.
        format: ``sedd_graph``: a folder that :func:`sedd_graph.build` opens. ``transformers``: a folder with Python code
            that the transformers library opens where sedd_graph is not installed.

    Raises:
        UserError: ``path`` is not a run folder, ``out`` is a file or is not empty, or parts of the model cannot be
            exported.
    """
    if (out / LOCK).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already; choose another folder")
    run = open_run(path, device=device, compile="off")
    if run.report.train.adapters:
        run = _merged(run)
    if format == "sedd_graph":
        run.engine.save(out)
        return Exported(run.weights)
    from sedd_graph.runs.plain.folder import export_transformers

    write, code, compared = export_transformers(run)
    write_folder(out, write)
    return Exported(run.weights, code.left_out, compared[-1])


def _merged(run: Run) -> Run:
    """Return a run whose adapters are merged into the weights, and whose blueprint has none."""
    report = check(run.path / LOCK, ["train.adapters=[]"])
    engine = make_engine(report, device=run.engine.device, compile="off", tokenizer=run.tokenizer)
    merge(run.engine.model)
    engine.model.load_state_dict(run.engine.model.state_dict())
    return dataclasses.replace(run, report=report, engine=engine)
