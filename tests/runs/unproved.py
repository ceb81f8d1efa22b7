"""Run folders of shipped blueprints with small networks, which are not proved, so that they are made in a second."""

from pathlib import Path

import torch

from sedd_graph.data.config import DataConfig
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.runs.check import LOCK, check, lock_text
from sedd_graph.runs.open import Run, open_run, read_data

__all__ = ["SIZES", "built", "folder_of"]

SIZES = ["params.dim=16", "params.depth=1", "params.heads=2"]


def folder_of(folder: Path, name: str, *overrides: str) -> Path:
    """Write the run folder of a shipped blueprint, without weights."""
    report = check(name, [*SIZES, *overrides])
    assert isinstance(report.data, DataConfig)
    folder.mkdir(parents=True)
    (folder / LOCK).write_text(lock_text(report))
    made = read_data(report, root=folder).tokenizer
    assert made is not None
    (folder / TOKENIZER).write_text(made.to_json())
    return folder


def built(folder: Path, name: str, *overrides: str) -> Run:
    """Return the run of a shipped blueprint with random weights, also in layers that begin with zeros."""
    run = open_run(folder_of(folder, name, *overrides), device="cpu", compile="off")
    with torch.no_grad():
        for parameter in run.engine.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    run.engine.save(folder)
    return open_run(folder, device="cpu", compile="off")
