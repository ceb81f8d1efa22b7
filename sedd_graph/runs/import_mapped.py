"""Import of any safetensors weights onto a blueprint: of our own exports, and of others by a table of names."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import read_json
from sedd_graph.runs.check import LOCK, check
from sedd_graph.runs.import_folder import expected_shapes, write_imported
from sedd_graph.runs.plain.folder import OWN_TOKENIZER
from sedd_graph.runs.plain.model_files import exported_names
from sedd_graph.runs.weight_files import read_tensors

__all__ = ["NameMap", "import_exported", "import_mapped", "mapped"]

MAX_LAYERS = 4096
_INDEX = "{i}"


class Rows(pydantic.BaseModel):
    """Some of the rows of a tensor, which is cut into equal parts on its first axis.

    Attributes:
        name: Name of the tensor.
        part: Number of the first part that is taken, from 0.
        parts: Number of parts that are taken.
        of: Number of equal parts that the tensor is cut into.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    name: str
    part: Annotated[int, pydantic.Field(ge=0)]
    parts: Annotated[int, pydantic.Field(ge=1)] = 1
    of: Annotated[int, pydantic.Field(ge=1, le=64)]


class NameMap(pydantic.BaseModel):
    """A table of names, the content of the file of ``--map``.

    Attributes:
        weights: Names in the file of weights by our names. ``{i}`` stands for 0, 1, 2, ... on both sides. A list is
            concatenated on the first axis.
        ignore: Names in the file, with ``*`` for any text, that the model has no use for.
        transpose: Our names whose matrix is transposed, with ``*`` for any text.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    weights: dict[str, str | Rows | list[str | Rows]]
    ignore: list[str] = []
    transpose: list[str] = []

    @classmethod
    def read(cls, path: Path) -> NameMap:
        """Read a YAML or JSON file. Raises :class:`UserError` if it is no table of names."""
        try:
            return cls.model_validate(read_yaml(path).data)
        except pydantic.ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"])) or "the file"
            raise UserError(f"{path}: {where}: {found['msg']}") from None


def mapped(
    table: NameMap, tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], path: Path
) -> dict[str, Tensor]:
    """Return weights by our names.

    Args:
        table: The table of names.
        tensors: Tensors by their names in the file.
        expected: Shape of each tensor of the model by our names.
        path: The file, for messages.

    Raises:
        UserError: A tensor of the model has no weights, or one of the file is neither used nor ignored; the message
            lists them.
    """
    used: set[str] = set()
    weights: dict[str, Tensor] = {}
    problems: list[str] = []
    for ours, theirs in table.weights.items():
        several = _INDEX in ours
        for index in range(MAX_LAYERS) if several else range(1):
            name = ours.replace(_INDEX, str(index))
            if several and name not in expected:
                break
            try:
                made = _taken(theirs, index, tensors, used)
            except UserError as error:
                problems.append(f"{name}: {error}")
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in table.transpose):
                made = made.transpose(0, -1)
            weights[name] = made.float() if made.is_floating_point() else made
    problems += [f"{name} {list(shape)} has no weights" for name, shape in expected.items() if name not in weights]
    problems += [f"{name} is no weight of the model" for name in weights if name not in expected]
    left = [n for n in tensors if n not in used and not any(fnmatch.fnmatchcase(n, p) for p in table.ignore)]
    problems += [f"{name} {list(tensors[name].shape)} of the file is neither used nor ignored" for name in left]
    if problems:
        shown = "\n  ".join(problems[:24])
        more = f"\n  ... and {len(problems) - 24} more" if len(problems) > 24 else ""
        raise UserError(f"{path}: {len(problems)} tensors do not match:\n  {shown}{more}")
    return weights


def _taken(source: Any, index: int, tensors: Mapping[str, Tensor], used: set[str]) -> Tensor:
    """Return the tensor that an entry of the table names."""
    parts = []
    for entry in source if isinstance(source, list) else [source]:
        name = (entry if isinstance(entry, str) else entry.name).replace(_INDEX, str(index))
        if name not in tensors:
            raise UserError(f"the file has no {name!r}")
        used.add(name)
        tensor = tensors[name]
        if isinstance(entry, Rows):
            if entry.part + entry.parts > entry.of or len(tensor) % entry.of:
                raise UserError(f"{name!r} {list(tensor.shape)} has no parts {entry.part} to {entry.part + entry.parts} of {entry.of}")  # fmt: skip
            tensor = torch.cat(tensor.chunk(entry.of)[entry.part : entry.part + entry.parts])
        parts.append(tensor)
    if len(parts) == 1:
        return parts[0]
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise UserError(f"cannot be concatenated: {str(error).splitlines()[0]}") from None


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
    weights = mapped(table, tensors, {k: v for k, v in expected.items() if k not in learned}, path) | learned
    own = path / OWN_TOKENIZER
    tokenizer = own if own.is_file() else path / TOKENIZER
    if tokenizer != own and tokenizer.is_file():
        raise UserError(f"{path} has no {OWN_TOKENIZER}, the tokenizer of the run that it was exported from")
    return write_imported(report, weights, path=path, kind="export", tokenizer=tokenizer, out=out, runs=runs, say=say)


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
