"""Start of a run from existing weights: ``--from``, the table of what matched, and the files that record it.

The run folder holds the weights of step 0 in ``model.safetensors``, so that neither ``train`` nor ``--resume`` reads their
source again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.blueprint.load import packaged_blueprints
from sedd_graph.data.config import DataConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.construct import build_shapes
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError, suggest
from sedd_graph.graph.model import Op
from sedd_graph.runs.check import Report
from sedd_graph.runs.open import WEIGHTS
from sedd_graph.runs.weight_names import Entry, NameMap, Status, compare, hits
from sedd_graph.runs.weight_source import WeightSource, open_source
from sedd_graph.store.files import write_json
from sedd_graph.training.adapters import load_plain, plain_tensors
from sedd_graph.training.weights import check_finite

__all__ = ["START", "Start", "read_start", "shipped_maps"]

START = "weights.json"
"""File name, in a run folder, of the table of the weights that the run starts from."""
OWN = "own names"
SHOWN = 12
"""Largest number of names that are printed for each status."""
_TABLES = ("embedding", "head")
"""Kinds of components with a parameter of one row for each state."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights that a run starts from.

    Attributes:
        source: Where they come from.
        map: The table of names: the name of a shipped one, a file, or :data:`OWN`.
        entries: What became of each tensor.
        weights: Weights of the model by our names; of an embedding or a head perhaps with fewer rows.
    """

    source: WeightSource
    map: str
    entries: Sequence[Entry]
    weights: Mapping[str, Tensor]

    def __str__(self) -> str:
        counts = Counter(entry.status for entry in self.entries)
        values = sum(w.numel() for w in self.weights.values())
        taken = counts["matched"] + counts["rows"]
        read = len({name for entry in self.entries for name in entry.source})
        lines = [
            f"weights     {taken} of {taken + counts['new']} tensors, {values:,} values, by {self.map} from {read} tensors "
            f"of {self.source.path}; {counts['left']} left over"
        ]
        titles: dict[Status, str] = {
            "rows": "in part",
            "new": "new",
            "left": "left over",
            "refused": "refused",
        }
        for status, title in titles.items():
            found = [entry for entry in self.entries if entry.status == status]
            for entry in found[:SHOWN]:
                note = f": {entry.note}" if entry.note else ""
                lines.append(f"  {title:<10}{entry.name} {list(entry.shape)}{note}")
            if len(found) > SHOWN:
                lines.append(f"  {title:<10}... and {len(found) - SHOWN} more")
        return "\n".join(lines)

    def facts(self) -> dict[str, object]:
        """Return what ``run.json`` records: where the weights come from, their digests, and counts by status."""
        counts = Counter(entry.status for entry in self.entries)
        return {
            "from": self.source.path.name,
            "kind": self.source.kind,
            "map": self.map,
            "sha256": dict(self.source.sha256),
            **{status: counts[status] for status in ("matched", "rows", "new", "left")},
        }

    def tokenizer(self, report: Report) -> Tokenizer | None:
        """Return the tokenizer of the weights if ``data.tokenizer`` of the blueprint asks for it, else None."""
        data = report.data
        return self.source.tokenizer if isinstance(data, DataConfig) and data.tokenizer.of_weights else None

    def other_tokenizer(self, used: Tokenizer | None) -> str | None:
        """Return a warning if the tokenizer of the run is not that of the weights."""
        own = self.source.tokenizer
        if own is None or used is None or own.to_json() == used.to_json():
            return None
        return (
            f"the tokenizer is not that of {self.source.path}, under which its embeddings have a meaning: "
            "data.tokenizer=pretrained takes that"
        )

    def load(self, engine: Engine) -> dict[str, Tensor]:
        """Load the weights into an engine that is newly made, and return all weights of step 0 by plain names.

        Tensors that are new keep their initial values; new rows of embeddings and heads are the mean of the others.
        """
        whole = {name: value.detach().cpu().clone() for name, value in plain_tensors(engine.model).items()}
        for name, value in self.weights.items():
            target = whole[name]
            if target.shape == value.shape:
                target.copy_(value)
            else:
                target[: len(value)] = value
                target[len(value) :] = value.mean(0)
        load_plain(engine.model, whole, where=str(self.source.path))
        return whole

    def write(self, run: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of step 0 and the table to a run folder."""
        save_tensors({name: value.contiguous() for name, value in weights.items()}, run / WEIGHTS)
        write_json(run / START, {**self.facts(), "tensors": [dataclasses.asdict(entry) for entry in self.entries]})


def shipped_maps() -> dict[str, Path]:
    """Return the tables of names that are installed with the package, by name."""
    return {path.stem: path for path in sorted((packaged_blueprints() / "maps").glob("*.yaml"))}


def read_start(report: Report, path: Path, table: str | None, say: Callable[[str], None]) -> Start:
    """Read the weights that a run starts from, compare them with the model by name, and print the table.

    Args:
        report: Result of checking the blueprint.
        path: Where the weights are, see :func:`sedd_graph.runs.weight_source.open_source`.
        table: A file with a table of names, or the name of a shipped one. None: our names, or those of the shipped table
            that matches most tensors.
        say: Function that prints a line for the user.

    Raises:
        UserError: Nothing matches, a tensor has another shape, or values are not finite.
    """
    source = open_source(path)
    expected = _expected(report)
    own = NameMap(weights={name: name for name in expected})
    tables = {OWN: own} | {name: NameMap.read(file) for name, file in shipped_maps().items()}
    if table is not None:
        tables = {table: tables[table] if table in tables else NameMap.read(_map_file(table))}
    name = max(tables, key=lambda name: hits(tables[name], source.tensors.keys(), expected.keys()))
    weights, entries = compare(tables[name], source.tensors, expected, _state_tables(report, expected))
    start = Start(source, name, entries, weights)
    refused = [entry for entry in entries if entry.status == "refused"]
    if not weights and not refused:
        theirs, ours = (", ".join(sorted(names)[:4]) for names in (source.tensors, expected))
        raise UserError(
            f"{path}: no tensor has a name of the model by {', '.join(tables)}; it has {theirs} ..., the model {ours} ...: "
            "write a table of names for --map"
        )
    say(str(start))
    if refused:
        first = refused[0]
        raise UserError(
            f"{path}: {len(refused)} of {len(entries)} tensors do not fit the model, such as {first.name} {list(first.shape)} "
            f"({first.note}): change the sizes of the blueprint, or leave these names out of a table for --map, and they are "
            "drawn anew"
        )
    check_finite(weights, where=str(path))
    return start


def _map_file(table: str) -> Path:
    path = Path(table)
    if not path.is_file():
        raise UserError(f"--map {table}: neither a file nor a shipped table{suggest(table, shipped_maps())}; shipped: {', '.join(shipped_maps())}")  # fmt: skip
    return path


def _expected(report: Report) -> dict[str, Tensor]:
    """Return the tensors of a model by name, on the meta device, with those of learned parts of the process."""
    from sedd_graph.engine.process import Setup
    from sedd_graph.families.table import process_class

    found = dict(build_shapes(report.graph, report.registry).state_dict())
    setup = Setup(registry=report.registry, graph=report.graph, device=torch.device("cpu"))
    for part, module in process_class(report.plan.family)(report.plan, setup).learned().items():
        found |= {f"{part}.{name}": tensor.to("meta") for name, tensor in module.state_dict().items()}
    return found


def _state_tables(report: Report, expected: Mapping[str, Tensor]) -> set[str]:
    """Return the names of those parameters of embeddings and heads that have one row for each state."""
    ops = ((path, step.body) for path, step in report.graph.root.walk())
    paths = tuple(f"{path}." for path, op in ops if isinstance(op, Op) and op.contract.kind in _TABLES)
    return {n for n, t in expected.items() if n.startswith(paths) and t.dim() and t.shape[0] == report.plan.states}
