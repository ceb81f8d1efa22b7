"""Weights by name: tables of names, and the comparison of the tensors of a file with those of a model."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import UserError

__all__ = ["Entry", "NameMap", "Rows", "Status", "compare", "hits", "mapped"]

MAX_LAYERS = 4096
MOST_NEW_ROWS = 64
"""Largest number of states, such as a mask, by which a vocabulary may be larger than that of the weights."""
_INDEX = "{i}"

Status = Literal["matched", "rows", "new", "left", "refused"]
"""What became of a tensor: taken, taken in part (the rows that exist), new to the model, left over in the file, or refused."""


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
        weights: Names in the file of weights by our names. ``{i}`` stands for 0, 1, 2, ... on both sides, and ``*`` at
            the end of both for any text. A list is concatenated on the first axis.
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

    def expanded(self, expected: Collection[str]) -> Iterator[tuple[str, list[str | Rows]]]:
        """Yield our names, and the entries that each is concatenated from; of patterns those that the model has.

        Args:
            expected: The names of the model's tensors.
        """
        for ours, theirs in self.weights.items():
            entries = theirs if isinstance(theirs, list) else [theirs]
            if ours.endswith("*"):
                for name in expected:
                    if name.startswith(ours[:-1]):
                        yield name, [_renamed(entry, "*", name[len(ours) - 1 :]) for entry in entries]
                continue
            for index in range(MAX_LAYERS) if _INDEX in ours else range(1):
                name = ours.replace(_INDEX, str(index))
                if name != ours and name not in expected:
                    break
                yield name, [_renamed(entry, _INDEX, str(index)) for entry in entries]

    def ignores(self, name: str) -> bool:
        """Return whether the model has no use for a tensor of the file."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)


def _renamed(entry: str | Rows, old: str, new: str) -> str | Rows:
    if isinstance(entry, Rows):
        return entry.model_copy(update={"name": entry.name.replace(old, new)})
    return entry.replace(old, new)


def _names(entries: Sequence[str | Rows]) -> list[str]:
    return [entry if isinstance(entry, str) else entry.name for entry in entries]


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
    for name, entries in table.expanded(expected):
        used |= tensors.keys() & set(_names(entries))
        try:
            made = _taken(table, name, entries, tensors)
        except UserError as error:
            problems.append(f"{name}: {error}")
            continue
        weights[name] = made.float() if made.is_floating_point() else made
    problems += [f"{name} {list(shape)} has no weights" for name, shape in expected.items() if name not in weights]
    problems += [f"{name} is no weight of the model" for name in weights if name not in expected]
    left = [n for n in tensors if n not in used and not table.ignores(n)]
    problems += [f"{name} {list(tensors[name].shape)} of the file is neither used nor ignored" for name in left]
    if problems:
        shown = "\n  ".join(problems[:24])
        more = f"\n  ... and {len(problems) - 24} more" if len(problems) > 24 else ""
        raise UserError(f"{path}: {len(problems)} tensors do not match:\n  {shown}{more}")
    return weights


def _taken(table: NameMap, ours: str, entries: Sequence[str | Rows], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that an entry of the table names."""
    parts = []
    for entry, name in zip(entries, _names(entries), strict=True):
        if name not in tensors:
            raise UserError(f"the file has no {name!r}")
        tensor = tensors[name]
        if isinstance(entry, Rows):
            if entry.part + entry.parts > entry.of or tensor.dim() == 0 or len(tensor) % entry.of:
                raise UserError(f"{name!r} {list(tensor.shape)} has no parts {entry.part} to {entry.part + entry.parts} of {entry.of}")  # fmt: skip
            tensor = torch.cat(tensor.chunk(entry.of)[entry.part : entry.part + entry.parts])
        parts.append(tensor)
    try:
        made = parts[0] if len(parts) == 1 else torch.cat(parts)
    except RuntimeError as error:
        raise UserError(f"cannot be concatenated: {str(error).splitlines()[0]}") from None
    if any(fnmatch.fnmatchcase(ours, pattern) for pattern in table.transpose):
        made = made.transpose(0, -1)
    return made


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one tensor of a model, or of one that a file has and the model has not.

    Attributes:
        name: Our name; of a tensor that is left over, its name in the file.
        status: See :data:`Status`.
        shape: Shape of the model's tensor, or of the one that is left over.
        source: Names in the file.
        note: What is to be known beside the status.
    """

    name: str
    status: Status
    shape: tuple[int, ...]
    source: tuple[str, ...] = ()
    note: str = ""


def hits(table: NameMap, tensors: Collection[str], expected: Collection[str]) -> int:
    """Return how many tensors of a model a table finds in a file, by their names."""
    return sum(
        name in expected and all(n in tensors for n in _names(entries)) for name, entries in table.expanded(expected)
    )


def compare(
    table: NameMap, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], tables: Collection[str]
) -> tuple[dict[str, Tensor], list[Entry]]:
    """Return the weights of a model that a file has, by our names, and what became of each tensor.

    Args:
        table: The table of names.
        tensors: Tensors by their names in the file.
        expected: Tensors of the model's shapes and dtypes by our names, such as ``meta`` tensors.
        tables: Names of the model's tensors with one row for each state, of embeddings and heads: where the model has a
            few states more, such as a mask, those rows are taken that exist, and the weights have fewer rows than the
            model.
    """
    weights: dict[str, Tensor] = {}
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for name, entries in table.expanded(expected):
        if name not in expected:
            continue
        source, target = tuple(_names(entries)), expected[name]
        shape = tuple(target.shape)
        if not any(n in tensors for n in source):
            continue
        used |= set(source)
        try:
            made = _taken(table, name, entries, tensors)
        except UserError as error:
            found[name] = Entry(name, "refused", shape, source, str(error))
            continue
        theirs = tuple(made.shape)
        if theirs == shape:
            found[name] = Entry(name, "matched", shape, source)
        elif name in tables and theirs[1:] == shape[1:] and 0 < shape[0] - theirs[0] <= MOST_NEW_ROWS and theirs[0]:
            note = f"{theirs[0]:,} rows; {shape[0] - theirs[0]} new, the mean of the others"
            found[name] = Entry(name, "rows", shape, source, note)
        else:
            found[name] = Entry(name, "refused", shape, source, f"{list(theirs)} in the file")
            continue
        if made.is_floating_point() != target.is_floating_point():
            found[name] = Entry(name, "refused", shape, source, f"{made.dtype} in the file, not {target.dtype}")
            continue
        weights[name] = made.to(target.dtype)
    every = [found.get(name, Entry(name, "new", tuple(t.shape))) for name, t in expected.items()]
    left = [n for n in tensors if n not in used and not table.ignores(n)]
    return weights, [*every, *(Entry(n, "left", tuple(tensors[n].shape)) for n in left)]
