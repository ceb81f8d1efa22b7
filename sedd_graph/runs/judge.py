"""Subcommand ``eval --samples``: statistics of a run folder's samples, beside the same statistics of held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.evaluation.judge import Ids, Judge, Reading, open_judge
from sedd_graph.evaluation.mauve import SCALING, SEED, mauve, package
from sedd_graph.evaluation.quality import diversity, documents, judge_statistics, training_vocabulary
from sedd_graph.evaluation.record import QUALITY, Protocol, QualityRecord, format_record
from sedd_graph.evaluation.words import Vocabulary
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.provenance import version_of
from sedd_graph.runs.token_cache import FolderCache
from sedd_graph.store.arrays import open_stored, read_array, stores
from sedd_graph.store.json_lines import JsonLines

__all__ = ["held_out", "judge_run"]

FEW = 1000
"""Number of samples below which a warning says that MAUVE is unreliable (arXiv 2102.01454 uses 5,000)."""


def judge_run(
    path: Path,
    *,
    samples: Path | None,
    judge: Path | None,
    with_mauve: bool,
    device: torch.device,
    say: Callable[[str], None],
    corpus: Path | None = None,
) -> QualityRecord:
    """Compute quality statistics of samples and of an equal number of held-out rows.

    The statistics are entropy and diversity of the text, the share of words that occur in the training text, perplexity
    under a judge (another language model), and MAUVE.
    They are printed, and appended to ``quality.jsonl`` in the run folder.

    Args:
        path: The run folder.
        samples: The zarr group of samples, as a path or a name in the run folder; None takes the newest in the run
            folder.
        judge: Folder of a causal language model (:func:`sedd_graph.evaluation.judge.open_judge`); None computes no
            perplexity.
        with_mauve: True to compute MAUVE from hidden states of the judge, which is then required.
        device: Device of the judge.
        say: Function that prints a line for the user.
        corpus: Folder to which file names of the data are relative, if it has moved since the run was built.

    Returns:
        The statistics of the samples and of the held-out rows, and the settings.

    Raises:
        UserError: There are no such samples, or the judge cannot be read.
        MissingExtraError: An optional package for the judge or MAUVE is not installed.
    """
    if with_mauve and judge is None:
        raise UserError("--mauve compares features of a judge: give --judge FOLDER")
    if with_mauve:
        package()  # if it is missing, raise before the judge reads for minutes
    run = open_run(path, device=torch.device("cpu"), compile="off", weights="fresh", root=corpus)
    tokenizer = run.text_tokenizer()
    store, rows, sampling = _samples(run, samples)
    reader = None if judge is None else open_judge(judge, device=device)
    data, why_not = _data(run, rows.shape[1])
    held = None if data is None else _spread(data, len(rows))
    words = None if data is None else training_vocabulary(data)
    if why_not is not None:
        say(f"warning     no held-out text beside the samples: {why_not}")
    if with_mauve and len(rows) < FEW:
        say(f"warning     MAUVE of {len(rows)} samples has a large bias and variance; {FEW:,} or more are needed")
    found = _statistics(rows, held, words, tokenizer, reader, with_mauve=with_mauve)
    record = QualityRecord(
        store=store.name,
        samples=found["samples"],
        reference=found.get("reference"),
        judge=None if reader is None else reader.facts(),
        protocol=Protocol(
            sampling=sampling,
            length=rows.shape[1],
            reference=None if held is None else "held-out rows of the same length, spread evenly",
            units="entropy in nats per token; rep and distinct of words",
            hardware=describe_hardware(device),
            versions={name: version_of(name) for name in ("sedd_graph", "torch", "transformers", "mauve-text")},
            mauve={"scaling": SCALING, "seed": SEED, "features": "last hidden state"} if with_mauve else None,
        ),
    )
    records = JsonLines(path / QUALITY)
    records.append(dataclasses.asdict(record))
    records.close()
    say(format_record(record))
    say(f"stored in {path / QUALITY}")
    return record


def _samples(run: Run, path: Path | None) -> tuple[Path, Ids, Mapping[str, object]]:
    """Return the zarr group of samples, their tokens, int64 [row, position], and how they were drawn."""
    if path is None:
        store = next(iter(stores(run.path, "samples")), None)
    else:
        store = run.path / path if (run.path / path).exists() else path
    if store is None:
        raise UserError(f"{run.path} holds no samples; draw some: sedd-graph sample {run.path} --batch 256")
    if not (store / "zarr.json").is_file():
        raise UserError(f"{store} is not a zarr group of samples")
    group = open_stored(store)
    tokens = read_array(group, "tokens")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise UserError(f"{store} holds no rows of tokens")
    facts = dict(group.attrs)
    if facts.get("blueprint") != run.digest:
        raise UserError(f"{store} was not drawn from {run.path}: its tokens are those of another blueprint")
    # settings of the sampler, which may differ from the blueprint's; older samples have none
    settings = facts.pop("settings", None)
    attributes = {key: value for key, value in facts.items() if key not in ("prompt", "mask", "pad", "end", "hashes")}
    drawn = settings if isinstance(settings, Mapping) else run.plan.sampling()
    how = {**drawn, **attributes, "infilled": "prompt" in facts}
    return store, tokens.astype(np.int64), how


def held_out(run: Run, count: int, length: int) -> tuple[Ids | None, str | None]:
    """Return held-out rows, int64 [row, position], of ``length`` tokens, or the reason why there are none.

    They are ``count`` rows, spread evenly; then, where the text suffices, as many again from between them.
    """
    data, why_not = _data(run, length)
    return None if data is None else _spread(data, count), why_not


def _data(run: Run, length: int) -> tuple[Dataset | None, str | None]:
    """Return the data set of a run with rows of ``length`` tokens, or the reason why there is none."""
    config = run.report.data
    if "data" not in run.report.loaded.sections or not isinstance(config, DataConfig):
        return None, "the blueprint has no 'data' section"
    try:
        wanted = config.model_copy(update={"length": length})
        cache = FolderCache(run.path) if config.rows == "stream" or length == config.length else None
        data: Dataset = open_data(wanted, root=run.data_root(), tokenizer=run.tokenizer, cache=cache)
    except SeddGraphError as error:
        return None, str(error)
    if (config.rows == "stream" or length == config.length) and (changed := run.changed(data)) is not None:
        return None, changed
    return data, None


def _spread(data: Dataset, count: int) -> Ids:
    """Return ``count`` held-out rows, spread evenly, then as many again where the text suffices, int64 [row, position]."""
    there = data.heldout.count
    double = there >= 2 * count
    chosen = np.linspace(0, there - 1, 2 * count if double else min(count, there)).astype(np.int64)
    if double:
        chosen = np.concatenate([chosen[::2], chosen[1::2]])
    return data.heldout.take(chosen, 0).tokens


def _statistics(
    rows: Ids,
    held: Ids | None,
    words: Vocabulary | None,
    tokenizer: Tokenizer,
    judge: Judge | None,
    *,
    with_mauve: bool,
) -> dict[str, dict[str, float]]:
    """Return the statistics of the ``samples`` and, where there is held-out text, of as many rows of it, the
    ``reference``.

    MAUVE compares features of the samples, and those of other held-out rows, with features of the reference.
    """
    sides = {"samples": rows}
    if held is not None:
        sides["reference"] = held[: len(rows)]
    found, features = {}, {}
    for name, side in sides.items():
        found[name] = diversity(side, tokenizer, words)
        if judge is not None:
            reading = judge.read(documents(side, tokenizer), features=with_mauve)
            found[name] |= judge_statistics(reading)
            features[name] = _features(reading)
    if judge is not None and with_mauve and held is not None:
        if len(other := held[len(rows) :]):
            features["other"] = _features(judge.read(documents(other, tokenizer), features=True))
        for name, compared in (("samples", "samples"), ("reference", "other")):
            p, q = features.get(compared), features["reference"]
            if p is not None and q is not None:
                found[name] |= mauve(p, q)
    return found


def _features(reading: Reading) -> npt.NDArray[np.float32] | None:
    """Return the features of the texts that have any tokens."""
    return None if reading.features is None else reading.features[reading.windows > 0]
