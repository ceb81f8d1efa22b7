"""``eval``: the held-out bound of a run folder, with its protocol."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.evaluation.bound import Result, evaluate
from sedd_graph.runs.build import Say
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.provenance import revision
from sedd_graph.store.files import read_json, write_json

__all__ = ["evaluate_opened", "evaluate_run"]


def evaluate_opened(
    run: Run, data: Dataset | PointData, say: Say, *, batches: int | None = None, draws: int | None = None
) -> Result:
    """Bound -log p of the held-out rows, print it, and keep the record of the fullest evaluation."""
    config, objective = run.report.train, run.plan.objective_op  # a graph without a process has no bound
    draws = draws or (config.evaluate.draws if config.evaluate else 1)
    rows = min(64, config.batch)
    found = evaluate(run.engine, data, rows=rows, batches=batches, draws=draws, seed=config.seed)
    say(f"held-out {found}")
    if (caveat := run.engine.process.caveat) is not None:
        say(f"note        {caveat}")
    text = {}
    if isinstance(data, Dataset):
        say(
            f"unigram entropy of the same text: {data.heldout_entropy_bits:.4f} bits per character "
            f"({data.unigram_bits:.4f} under the training text's frequencies)"
        )
        text = {"unigram_bits": data.unigram_bits, "heldout_entropy_bits": data.heldout_entropy_bits}
    path = run.path / "evaluation.json"
    before = read_json(path) if path.is_file() else {}
    fuller = max(before.get("sequences", 0), before.get("rows", 0)) if isinstance(before, dict) else 0
    if fuller > found.count:
        say(f"not kept: evaluation.json is of {fuller} sequences, this only of {found.count}")
        return found
    protocol = {
        **_protocol(run, data),
        "rows_at_a_time": rows,
        "batches": batches,
        "draws": draws,
        "seed": config.seed,
        "dtype": "float32",
        "hardware": describe_hardware(run.engine.device),
        "revision": revision(),
    }
    record = {**dataclasses.asdict(found), **text, "weights": run.weights, "objective": objective}
    write_json(path, {**record, "protocol": protocol})
    return found


def _protocol(run: Run, data: Dataset | PointData) -> dict[str, Any]:
    """What a held-out number is of: the data and how rows are made of it, the noise that it is an expectation over."""
    rows = {"corpus": data.fingerprint(), "length": data.width}
    if isinstance(data, Dataset):
        rows |= {"rows": data.config.rows, "holdout": data.config.holdout}
    return {**run.plan.record(), "data": rows, "blueprint": run.digest}


def evaluate_run(
    path: Path, *, device: torch.device, batches: int | None, draws: int, weights: str, say: Say
) -> Result:
    """The held-out bound of a run folder's newest weights."""
    run = open_run(path, device=device, compile="off", weights=weights)
    say(f"weights     {run.weights}")
    data = run.data()
    if (changed := run.changed(data)) is not None:
        say(f"warning     {changed}: the bound is one on the new text")
    return evaluate_opened(run, data, say, batches=batches, draws=draws)
