"""Import of any safetensors weights onto a blueprint: of our own exports, and of others by a table of names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import read_json
from sedd_graph.runs.check import LOCK, Report, check
from sedd_graph.runs.import_folder import expected_shapes, write_imported
from sedd_graph.runs.plain.folder import OWN_TOKENIZER
from sedd_graph.runs.plain.model_files import exported_names
from sedd_graph.runs.weight_files import read_tensors
from sedd_graph.runs.weight_names import NameMap, mapped

__all__ = ["exported_weights", "import_exported", "import_mapped"]


def import_mapped(
    path: Path,
    blueprint: Path,
    table: Path,
    *,
    overrides: Sequence[str],
    out: Path | None,
    runs: Path,
    say: Callable[[str], None],
) -> Path:
    """Write a run folder of a blueprint with weights of any safetensors file or folder, by a table of names.

    Args:
        path: The file, or a folder as downloaded from a model hub.
        blueprint: The blueprint, a file or the name of a shipped one.
        table: File of the table of names (:class:`NameMap`).
        overrides: Changes to the blueprint as ``key=value``.
        out: The run folder, which must be empty or not exist; None creates a run folder in ``runs``.
        runs: Folder in which run folders are created.
        say: Function that prints a line for the user.

    Returns:
        The path of the run folder.

    Raises:
        UserError: The weights do not match the network; the message lists what does not.
    """
    names = NameMap.read(table)
    report = check(blueprint, [*overrides, "data=null", "train=null"])
    weights = mapped(names, read_tensors(path), expected_shapes(report), path)
    tokenizer = path / TOKENIZER if path.is_dir() else path.with_name(TOKENIZER)
    return write_imported(report, weights, path=path, kind="map", tokenizer=tokenizer, out=out, runs=runs, say=say)


def import_exported(path: Path, *, out: Path | None, runs: Path, say: Callable[[str], None]) -> Path:
    """Write a run folder from a folder that ``sedd-graph export --format transformers`` wrote.

    Its Python files are not run.

    Args:
        path: The exported folder.
        out: The run folder, which must be empty or not exist; None creates a run folder in ``runs``.
        runs: Folder in which run folders are created.
        say: Function that prints a line for the user.

    Returns:
        The path of the run folder.

    Raises:
        UserError: The folder is no such export, or its weights do not match its blueprint.
    """
    report, weights = exported_weights(path)
    own = path / OWN_TOKENIZER
    tokenizer = own if own.is_file() else path / TOKENIZER
    if tokenizer != own and tokenizer.is_file():
        raise UserError(f"{path} has no {OWN_TOKENIZER}, the tokenizer of the run that it was exported from")
    return write_imported(report, weights, path=path, kind="export", tokenizer=tokenizer, out=out, runs=runs, say=say)


def exported_weights(path: Path) -> tuple[Report, dict[str, Tensor]]:
    """Return the checked blueprint of an export in the format of transformers, and its weights by our names.

    Raises:
        UserError: The folder is no such export, or its weights do not match its blueprint.
    """
    if not (path / LOCK).is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is no export in the format of transformers: it needs {LOCK} and config.json")
    report = check(path / LOCK, [])
    expected = expected_shapes(report)
    tensors = read_tensors(path)
    names = exported_names(report.graph)
    theirs: dict[str, str] = {}
    for ours in expected:
        part = next((p for p in names if ours.startswith(f"{p}.")), None)
        if part is not None:
            theirs[ours] = names[part] + ours[len(part) :]
    learned = _learned(path, expected)
    table = NameMap(weights=dict(theirs), ignore=_fixed(theirs.values(), names.values(), tensors))
    return report, mapped(table, tensors, {k: v for k, v in expected.items() if k not in learned}, path) | learned


def _fixed(used: Any, parts: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of buffers that an export has in its state dict, and that we compute from the blueprint."""
    prefixes = tuple(f"{part}." for part in parts)
    return [name for name in tensors if name.startswith(prefixes) and name not in set(used) and _is_code(name, parts)]


def _is_code(name: str, parts: Any) -> bool:
    """Return True for a tensor that belongs to a component itself, not to a module within it."""
    return any(re.fullmatch(rf"{re.escape(part)}\.\w+", name) for part in parts)


def _learned(path: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the trained parameters of kernel and schedule, which an export has as numbers in its config."""
    config = read_json(path / "config.json")
    tables = config.get("tables") if isinstance(config, dict) else None
    found: dict[str, Tensor] = {}
    for part, entries in (tables or {}).items() if isinstance(tables, dict) else ():
        for name, values in entries.items() if isinstance(entries, dict) else ():
            key = f"process:{part}.{name}"  # as in KERNEL and SCHEDULE of the engine
            if key in expected:
                found[key] = _tensor(values, path)
    return found


def _tensor(values: Any, path: Path) -> Tensor:
    flat = values
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        flat = list(itertools.chain.from_iterable(flat))
    if not isinstance(flat, list) or not all(isinstance(x, int | float) for x in flat):
        raise UserError(f"{path / 'config.json'}: 'tables' must hold lists of numbers")
    return torch.tensor(values, dtype=torch.float32)
