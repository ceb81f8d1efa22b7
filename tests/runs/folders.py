"""Run folders for tests that need no proof of the process and no trained weights."""

import tempfile
from pathlib import Path

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.runs.check import LOCK, check, lock_text
from sedd_graph.runs.open import read_data

__all__ = ["placed"]


def placed(folder: Path, text: str, *overrides: str) -> Path:
    """A run folder of a blueprint (its text, or its name) without proof and without weights of its own."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "b.yaml").write_text(text)
    report = check(text if text.endswith("tiny") else folder / "b.yaml", overrides)
    (folder / LOCK).write_text(lock_text(report))
    if isinstance(report.data, DataConfig):
        data = read_data(report, root=folder)
        assert isinstance(data, Dataset)
        (folder / TOKENIZER).write_text(data.tokenizer.to_json())
    return folder
