"""``sedd-graph eval RUN --samples``: samples that lie in a run folder, held beside held-out text, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.mauve import SCALING, SEED, mauve, package
from sedd_graph.evaluation.quality import documents, judged, variety
from sedd_graph.evaluation.record import QUALITY, table
from sedd_graph.runs.open import Run, open_run
from sedd_graph.store.arrays import stores
from sedd_graph.store.files import JsonLines

__all__ = ["judge_run"]

FEW = 1000
"""Samples below which MAUVE's clusters are said to be too few (arXiv 2102.01454 takes 5,000)."""

Ids = npt.NDArray[np.int64]
Say = Callable[[str], None]


def judge_run(
    path: Path, *, samples: Path | None, judge: Path | None, with_mauve: bool, device: torch.device, say: Say
) -> dict[str, Any]:
    """Describe ``samples`` (default: the run's newest) and as many held-out rows, print both, and append the record to
    ``quality.jsonl``. Returns the record. Raises :class:`UserError`."""
    if with_mauve and judge is None:
        raise UserError("--mauve compares what a judge makes of the texts: give --judge FOLDER")
    if with_mauve:
        package()  # its absence is said before the judge has read for minutes
    run = open_run(path, device=torch.device("cpu"), compile="off", weights="fresh")
    if run.tokenizer is None:
        raise UserError(f"there is no tokenizer in {path}: tokens cannot become text")
    store, rows, sampling = _samples(run, samples)
    reader = open_judge(judge, device=device) if judge is not None else None
    held, note = _held_out(run, len(rows), rows.shape[1])
    if note is not None:
        say(f"warning     no held-out text beside the samples: {note}")
    sides = {"samples": rows} | ({} if held is None else {"reference": held[: len(rows)]})
    found = _compared(sides, held, run.tokenizer, reader, with_mauve=with_mauve)
    if with_mauve and len(rows) < FEW:
        say(f"warning     MAUVE of {len(rows)} samples is noise and bias in good part; {FEW:,} and more are needed")
    record = {
        "store": store.name,
        **found,
        "judge": None if reader is None else reader.facts(),
        "protocol": {
            "sampling": sampling,
            "length": rows.shape[1],
            "reference": "held-out rows of the same length, spread evenly" if held is not None else None,
            "units": "entropy in nats per token; rep and distinct of words",
            "hardware": describe_hardware(device),
            "versions": {name: _version(name) for name in ("sedd_graph", "torch", "transformers", "mauve-text")},
            **({"mauve": {"scaling": SCALING, "seed": SEED, "features": "last hidden state"}} if with_mauve else {}),
        },
    }
    records = JsonLines(path / QUALITY)
    records.append(record)
    records.close()
    say(table(record))
    say(f"kept in {path / QUALITY}")
    return record


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _samples(run: Run, path: Path | None) -> tuple[Path, Ids, dict[str, Any]]:
    """Where they lie, tokens [row, position], and how they were drawn."""
    if path is None:
        store = next(iter(stores(run.path, "samples")), None)
    else:
        store = run.path / path if (run.path / path).exists() else path
    if store is None:
        raise UserError(f"{run.path} holds no samples; draw some: sedd-graph sample {run.path} --batch 256")
    if not (store / "zarr.json").is_file():
        raise UserError(f"{store} is not a zarr group of samples")
    group = zarr.open_group(str(store), mode="r")
    tokens = group.get("tokens")
    if not isinstance(tokens, zarr.Array) or tokens.ndim != 2 or not all(tokens.shape):
        raise UserError(f"{store} holds no rows of tokens")
    facts = dict(group.attrs)
    if facts.get("blueprint") != run.digest:
        raise UserError(f"{store} was not drawn from {run.path}: its tokens are those of another blueprint")
    sampler = run.plan.sampling()
    told = {k: v for k, v in facts.items() if k not in ("prompt", "mask", "pad", "end")}
    return store, np.asarray(tokens[:], dtype=np.int64), {**sampler, **told, "infilled": "prompt" in facts}


def _held_out(run: Run, count: int, length: int) -> tuple[Ids | None, str | None]:
    """Rows [row, position] of the samples' length: ``count``, spread evenly, and then as many again from between them where
    there are so many. Or why there are none."""
    config = run.report.data
    if "data" not in run.report.loaded.sections or not isinstance(config, DataConfig):
        return None, "the blueprint has no 'data' section"
    try:
        wanted = config.model_copy(update={"length": length})
        data: Dataset = open_data(wanted, root=run.root, tokenizer=run.tokenizer)
    except SeddGraphError as error:
        return None, str(error)
    if (config.rows == "stream" or length == config.length) and (changed := run.changed(data)) is not None:
        return None, changed
    there = data.heldout.count
    double = there >= 2 * count
    chosen = np.linspace(0, there - 1, 2 * count if double else min(count, there)).astype(np.int64)
    if double:
        chosen = np.concatenate([chosen[::2], chosen[1::2]])
    return data.heldout.take(chosen, 0).tokens, None


def _compared(
    sides: Mapping[str, Ids], held: Ids | None, tokenizer: Tokenizer, reader: Judge | None, *, with_mauve: bool
) -> dict[str, dict[str, float] | None]:
    """The numbers of each side; MAUVE of the samples, and of other held-out rows, against the reference."""
    found: dict[str, dict[str, float] | None] = {"samples": None, "reference": None}
    features = {}
    for name, rows in sides.items():
        numbers = variety(rows, tokenizer)
        if reader is not None:
            reading = reader.read(documents(rows, tokenizer), features=with_mauve)
            numbers |= judged(reading)
            features[name] = reading
        found[name] = numbers
    if reader is not None and with_mauve and held is not None:
        if len(other := held[len(sides["reference"]) :]):
            features["other"] = reader.read(documents(other, tokenizer), features=True)
        whole = {name: r.features[r.windows > 0] for name, r in features.items() if r.features is not None}
        for name, beside in (("samples", "samples"), ("reference", "other")):
            numbers_of, p = found[name], whole.get(beside)
            if numbers_of is not None and p is not None:
                numbers_of |= mauve(p, whole["reference"])
    return found
