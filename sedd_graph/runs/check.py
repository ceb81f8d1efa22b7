"""``check``: read a blueprint, type its graph, derive its inverses, and check its process. Nothing is allocated."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from sedd_graph.blueprint.load import Loaded, load
from sedd_graph.blueprint.lock import lock
from sedd_graph.blueprint.shipped import find_blueprint
from sedd_graph.component.registry import Registry, discover
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import Plan, read_plan
from sedd_graph.graph.draw import to_tree
from sedd_graph.graph.expand import expand
from sedd_graph.graph.model import Graph
from sedd_graph.inverse.claims import Derived, derive, require_claims
from sedd_graph.store.config import StoreConfig
from sedd_graph.training.config import TrainConfig

if TYPE_CHECKING:
    from sedd_graph.engine.process import DataFacts

__all__ = ["LOCK", "SECTIONS", "Report", "check", "digest", "inverses", "lock_text", "schema_text"]

LOCK = "blueprint.lock.yaml"
"""The file of a run folder that it is built from."""
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "data": (DataConfig, PointsConfig),
    "train": (TrainConfig,),
    "store": (StoreConfig,),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``check`` found: the typed graph, the process or flow, how many parameters it will have, and the inverses that
    its blocks claim to have. ``str()`` is readable."""

    loaded: Loaded
    graph: Graph
    plan: Plan | None
    registry: Registry
    parameters: int
    derived: tuple[Derived, ...] = ()

    @property
    def name(self) -> str:
        return self.graph.name

    @property
    def data(self) -> DataConfig | PointsConfig:
        return self.loaded.section(PointsConfig) or self.loaded.section(DataConfig) or DataConfig()

    @property
    def train(self) -> TrainConfig:
        return self.loaded.section(TrainConfig) or TrainConfig()

    @property
    def store(self) -> StoreConfig:
        return self.loaded.section(StoreConfig) or StoreConfig()

    def __str__(self) -> str:
        lines = [to_tree(self.graph), "", f"parameters  {self.parameters:,}"]
        if self.plan is not None:
            lines.append(f"process     {self.plan.describe()}")
        lines += [f"{'undone' if not i else '':<10}  {one}" for i, one in enumerate(self.derived)]
        return "\n".join(lines)


def _graph(path: str | Path, overrides: Sequence[str]) -> tuple[Loaded, Registry, Graph, dict[str, int]]:
    """The expanded graph, and batch and length where the blueprint says so."""
    if isinstance(overrides, str):
        raise UserError(f"overrides are a list of strings, such as [{overrides!r}], not one string")
    loaded = load(find_blueprint(path), overrides, sections=SECTIONS)
    registry = discover()
    data = loaded.section(PointsConfig) or loaded.section(DataConfig) or DataConfig()
    sizes = {"batch": (loaded.section(TrainConfig) or TrainConfig()).batch, "length": data.length}
    return loaded, registry, expand(loaded, registry), sizes


def inverses(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Graph, tuple[Derived, ...]]:
    """The graph, and for each block that claims to be invertible its inverse or the reason why there is none.

    Raises :class:`sedd_graph.errors.BlueprintError` where there is no graph.
    """
    _, _, graph, sizes = _graph(path, overrides)
    return graph, derive(graph, sizes)


def check(path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """Read a blueprint, expand and type its graph, derive the inverses it claims, and check its process.

    No parameter is allocated.

    Raises :class:`sedd_graph.errors.BlueprintError` with every problem of the first stage that has any.
    """
    loaded, registry, graph, sizes = _graph(path, overrides)
    derived = require_claims(graph, sizes)
    plan = read_plan(loaded, graph, registry)
    import torch

    from sedd_graph.engine.construct import count_shapes
    from sedd_graph.families.table import make_process

    try:
        process = make_process(plan, graph, registry, device=torch.device("cpu"))
        problems = [Problem("", 0, 0, key, text) for key, text in process.check_data(_data_facts(loaded))]
        if problems:
            raise BlueprintError(problems)
    except BlueprintError as error:
        # combinations that cannot work are about keys of the root
        raise BlueprintError(
            [p if p.line else loaded.problem(tuple(p.path.split(".")), p.message) for p in error.problems]
        ) from None
    return Report(loaded, graph, plan, registry, count_shapes(graph, registry), derived)


def _data_facts(loaded: Loaded) -> DataFacts:
    """The part of the data section that a process must agree with."""
    from sedd_graph.engine.process import DataFacts

    data = loaded.section(DataConfig)
    if data is None:
        return DataFacts(0, None, stream=True, prompts=False, points="data" in loaded.sections)
    return DataFacts(
        data.length, data.tokenizer.size, stream=data.rows == "stream", prompts=data.corpus.prompted, points=False
    )


def lock_text(report: Report) -> str:
    """The lock file of a checked blueprint."""

    def fill(op: str, keys: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        contract = report.registry.contract(op)
        filled = dict(keys)
        for name, field in contract.config.model_fields.items():
            if name not in filled and not field.is_required():
                value = field.get_default(call_default_factory=True)
                if value is not None:
                    filled[name] = to_jsonable_python(value)
        return contract.op, filled

    return lock(report.loaded, fill)


def digest(text: str) -> str:
    """Short name of a lock file's content."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def schema_text() -> str:
    """The JSON Schema of blueprints with every installed component folded in, as stable text."""
    import json

    from sedd_graph.blueprint.json_schema import blueprint_schema

    return json.dumps(blueprint_schema(discover().contracts(), SECTIONS), indent=1, ensure_ascii=False) + "\n"
