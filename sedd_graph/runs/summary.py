"""Summary of a run folder in a few numbers, and the search for run folders.

Everything is read from small files, without the network. Missing or damaged files count as empty.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.store.files import as_object, json_object

__all__ = [
    "LOCK",
    "Summary",
    "find_runs",
    "flatten",
    "last_record",
    "require_run",
    "settings",
    "summarise",
    "unversioned",
]

LOCK = "blueprint.lock.yaml"
"""File name of the resolved blueprint, which every run folder has."""
DEPTH = 4
"""Number of levels of folders below the one that is searched."""
TAIL = 2**18
"""Bytes at the end of ``metrics.jsonl`` in which the last records are looked for."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run folder in a few numbers; None where a number is not known.

    Attributes:
        path: The run folder.
        name: Name of the blueprint.
        created: Time of the build, ISO 8601 in UTC.
        step: Number of training steps done.
        steps: Number of training steps declared.
        parameters: Number of parameters of the network.
        process: Component of the forward process.
        objective: Component of the objective.
        bits: Held-out bits per character (for flows, per dimension): of ``evaluation.json``, else the last of training.
        error: Standard error of :attr:`bits`.
        unit: ``character`` or ``dimension``.
        settings: Values of the resolved blueprint by dotted key.
    """

    path: Path
    name: str
    created: str | None
    step: int | None
    steps: int | None
    parameters: int | None
    process: str | None
    objective: str | None
    bits: float | None
    error: float | None
    unit: str
    settings: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values, without the settings."""
        found = {**dataclasses.asdict(self), "path": str(self.path)}
        del found["settings"]
        return found


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run folders in ``root`` and its subfolders, in the order of their paths. Hidden folders and links are skipped."""

    def search(folder: Path, depth: int) -> Iterator[Path]:
        if (folder / LOCK).is_file():
            yield folder
            return
        try:
            with os.scandir(folder) as found:
                inner = sorted(e.name for e in found if not e.name.startswith(".") and e.is_dir(follow_symlinks=False))
        except OSError:
            return
        for name in inner if depth else ():
            yield from search(folder / name, depth - 1)

    return search(root, DEPTH)


def require_run(path: Path) -> Path:
    """Return ``path``.

    Raises:
        UserError: It is not a run folder.
    """
    if not (path / LOCK).is_file():
        raise UserError(f"{path} is not a run folder: it has no {LOCK}")
    return path


def settings(run: Path) -> dict[str, Any]:
    """Return the values of the resolved blueprint of a run folder by dotted key; lists count as values."""
    try:
        return flatten(read_yaml(run / LOCK).data)
    except SeddGraphError:
        return {}


def flatten(data: Any) -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; lists and empty mappings count as values."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found[prefix] = value

    walk("", as_object(data))
    return found


def last_record(run: Path, key: str) -> dict[str, Any]:
    """Return the last record of ``metrics.jsonl`` that has a number under ``key``; empty if none of the last ones has."""
    path = run / "metrics.jsonl"
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL))
            lines = stream.read(TAIL).split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = as_object(json.loads(line))
        except ValueError:
            continue
        if _number(record.get(key)) is not None:
            return record
    return {}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def unversioned(value: object) -> str | None:
    """Return the name of a component without its version, such as ``absorb`` for ``absorb.v1``; None for no text."""
    return re.sub(r"\.v[0-9]+$", "", value) if isinstance(value, str) else None


def _result(run: Path) -> tuple[float | None, float | None, str]:
    """Return the held-out bits per unit, their standard error, and the unit."""
    evaluation = json_object(run / "evaluation.json")
    for unit in ("character", "dimension"):
        if (bits := _number(evaluation.get(f"bits_per_{unit}"))) is not None:
            return bits, _number(evaluation.get("bits_standard_error")), unit
        for prefix in ("final_", "heldout_"):
            record = last_record(run, f"{prefix}bits_per_{unit}")
            if record:
                return record[f"{prefix}bits_per_{unit}"], _number(record.get(f"{prefix}bits_standard_error")), unit
    return None, None, "character"


def summarise(run: Path) -> Summary:
    """Return the summary of a run folder."""
    own = settings(run)
    certificate, facts = json_object(run / "certificate.json"), json_object(run / "run.json")
    bits, error, unit = _result(run)
    return Summary(
        path=run,
        name=_text(own.get("name")) or run.name,
        created=_text(facts.get("created")),
        step=_whole(last_record(run, "step").get("step")),
        steps=_whole(own.get("train.steps")),
        parameters=_whole(as_object(certificate.get("measure")).get("parameters")),
        process=unversioned(own.get("process.op")),
        objective=unversioned(own.get("objective.op")),
        bits=bits,
        error=error,
        unit=unit,
        settings=own,
    )
