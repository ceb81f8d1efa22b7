"""Paths, records and narrowed types that the benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import Evaluation, evaluate
from sedd_graph.families.tokens import TokenProcess
from sedd_graph.runs.check import Report
from sedd_graph.runs.open import read_data

__all__ = ["BLUEPRINTS", "RESULTS", "append_record", "bound", "data_config", "text_data", "token_process"]

BLUEPRINTS = Path(__file__).resolve().parent.parent / "blueprints"
RESULTS = Path(__file__).resolve().parent / "results"


def append_record(name: str, record: Mapping[str, object]) -> None:
    """Append one line to ``benchmarks/results/NAME.jsonl``."""
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def data_config(report: Report) -> DataConfig:
    """Return the data section of a blueprint for text."""
    if not isinstance(report.data, DataConfig):
        raise SystemExit(f"{report.name} is not for text")
    return report.data


def text_data(report: Report, *, root: Path) -> Dataset:
    """Return the rows of a blueprint for text; names of files start from ``root``."""
    data = read_data(report, root=root)
    if not isinstance(data, Dataset):
        raise SystemExit(f"{report.name} is not for text")
    return data


def bound(engine: Engine, data: Dataset, *, rows: int, batches: int | None, draws: int) -> Evaluation:
    """Return the bound over held-out rows of text, with the same noise in every benchmark."""
    found = evaluate(engine, data, rows=rows, batches=batches, draws=draws, seed=1)
    if not isinstance(found, Evaluation):
        raise SystemExit("the model is evaluated by exact likelihood, not by a bound")
    return found


def token_process(engine: Engine) -> TokenProcess:
    """Return the process of a model of rows of tokens."""
    if not isinstance(engine.process, TokenProcess):
        raise SystemExit(f"{engine} does not generate rows of tokens")
    return engine.process
