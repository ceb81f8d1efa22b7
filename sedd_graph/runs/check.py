"""Check of a blueprint: its typed graph, derived inverses and diffusion process, without allocating parameters."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from sedd_graph.blueprint.load import Loaded, load
from sedd_graph.blueprint.lock import LOCK, lock
from sedd_graph.blueprint.shipped import find_blueprint
from sedd_graph.component.registry import Registry, installed
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import Part, Plan, read_distillation
from sedd_graph.families.table import process_class, read_plan
from sedd_graph.graph.draw import to_tree
from sedd_graph.graph.expand import expand
from sedd_graph.graph.model import Graph
from sedd_graph.inverse.claims import Derived, derive, require_claims
from sedd_graph.store.config import StoreConfig
from sedd_graph.training.config import TrainConfig

if TYPE_CHECKING:
    from sedd_graph.engine.process import Process

__all__ = ["LOCK", "SECTIONS", "Report", "check", "digest", "inverses", "lock_text", "schema_text"]

SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "data": (DataConfig, PointsConfig),
    "train": (TrainConfig,),
    "store": (StoreConfig,),
}
"""Config classes by the name of the blueprint section that they validate. ``data`` has one for text and one for rows of
real numbers."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of checking a blueprint. ``str(report)`` is a summary for the user.

    Attributes:
        loaded: Content of the blueprint file, with line numbers for messages.
        graph: The network as a typed graph.
        plan: The declared diffusion process or flow.
        registry: Registry of the installed components.
        parameters: Number of parameters of the network.
        trained: Number of trained parameters, of adapters and of the process too, and of frozen ones; None if all are
            trained.
        distillation: The distillation objective that the blueprint declares; None if it declares none.
        derived: For each block that is declared invertible, its derived inverse.
    """

    loaded: Loaded
    graph: Graph
    plan: Plan
    registry: Registry
    parameters: int
    derived: tuple[Derived, ...] = ()
    trained: tuple[int, int] | None = None
    distillation: Part | None = None

    @property
    def name(self) -> str:
        """Name of the blueprint."""
        return self.graph.name

    @property
    def data(self) -> DataConfig | PointsConfig:
        """Config of the ``data`` section; the default Config if the blueprint has no such section."""
        return _data(self.loaded) or DataConfig()

    @property
    def train(self) -> TrainConfig:
        """Config of the ``train`` section; the default Config if the blueprint has no such section."""
        return self.loaded.section(TrainConfig) or TrainConfig()

    @property
    def store(self) -> StoreConfig:
        """Config of the ``store`` section; the default Config if the blueprint has no such section."""
        return self.loaded.section(StoreConfig) or StoreConfig()

    def record(self) -> dict[str, Any]:
        """Return what the blueprint declares as JSON values, by key."""
        return {
            "name": self.name,
            "family": self.plan.family,
            "parameters": self.parameters,
            "process": self.plan.describe(),
            "invertible": [str(one) for one in self.derived],
            "blueprint": digest(lock_text(self)),
        }

    def __str__(self) -> str:
        told = "" if self.trained is None else f" ({self.trained[0]:,} trained, {self.trained[1]:,} frozen)"
        lines = [to_tree(self.graph), "", f"parameters  {self.parameters:,}{told}"]
        lines += [f"process     {text}"] if (text := self.plan.describe()) else []
        lines += [f"{'' if i else 'invertible':<10}  {one}" for i, one in enumerate(self.derived)]
        return "\n".join(lines)


def _data(loaded: Loaded) -> DataConfig | PointsConfig | None:
    return loaded.section(DataConfig) or loaded.section(PointsConfig)


def _graph(path: str | Path, overrides: Sequence[str]) -> tuple[Loaded, Registry, Graph, dict[str, int]]:
    """Return the expanded graph of a blueprint, and the sizes of ``batch`` and ``length``."""
    if isinstance(overrides, str):
        raise UserError(f"overrides are a list of strings, such as [{overrides!r}], not one string")
    loaded = load(find_blueprint(path), overrides, sections=SECTIONS)
    registry = installed(warn=True)
    train, data = loaded.section(TrainConfig) or TrainConfig(), _data(loaded) or DataConfig()
    return loaded, registry, expand(loaded, registry), {"batch": train.batch, "length": data.length}


def inverses(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Graph, tuple[Derived, ...]]:
    """Derive the inverse of each block of a blueprint that is declared invertible.

    Args:
        path: A blueprint file, or the name of a blueprint shipped with the package.
        overrides: Changes to the blueprint as ``key=value``, such as ``params.dim=64``.

    Returns:
        The typed graph, and for each block that is declared invertible its inverse, or the reason why no inverse can be
        derived.

    Raises:
        BlueprintError: The blueprint has no valid graph. The exception lists all problems of the first stage (parsing,
            then typing) that finds any.
    """
    _, _, graph, sizes = _graph(path, overrides)
    return graph, derive(graph, sizes)


def check(path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """Check a blueprint: type its graph, derive inverses, and check the diffusion process.

    No parameters are allocated.

    Args:
        path: A blueprint file, or the name of a blueprint shipped with the package.
        overrides: Changes to the blueprint as ``key=value``, such as ``train.steps=100``.

    Returns:
        The typed graph, the derived inverses, the declared process and the number of parameters.

    Raises:
        BlueprintError: The blueprint is not valid. The exception lists all problems of the first stage (parsing,
            typing, inverses, process) that finds any.
    """
    loaded, registry, graph, sizes = _graph(path, overrides)
    derived = require_claims(graph, sizes)
    plan, distillation = read_plan(loaded, graph, registry), read_distillation(loaded, graph, registry)
    import torch

    from sedd_graph.engine.construct import count_shapes
    from sedd_graph.engine.process import Setup

    setup = Setup(registry=registry, graph=graph, device=torch.device("cpu"))
    try:
        process = process_class(plan.family)(plan, setup)
        faults = [] if (data := _data(loaded)) is None else list(process.check_data(data))
        train = loaded.section(TrainConfig)
        if train is not None and train.sample is not None and process.trains and not process.text:
            faults.append(("train.sample", f"samples of {plan.family} are not text: leave train.sample out"))
        if distillation is not None and (lack := distillation_lacks(registry, distillation, process)) is not None:
            faults.append(("distill", lack))
        trained = None if train is None else _trained(train, graph, registry, process, faults)
        if faults:
            raise BlueprintError([Problem("", 0, 0, key, text) for key, text in faults])
    except BlueprintError as error:
        # a process is made without the file: its problems get their lines here
        raise BlueprintError(
            [p if p.line else loaded.problem(tuple(p.path.split(".")), p.message) for p in error.problems]
        ) from None
    return Report(loaded, graph, plan, registry, count_shapes(graph, registry), derived, trained, distillation)


def distillation_lacks(registry: Registry, part: Part, process: Process) -> str | None:
    """Return why a process cannot be distilled by an objective; None if it can."""
    try:
        lack: str | None = registry.component(part.contract.op)(part.config).lacks(process.distillable())
    except UserError as error:
        return str(error)
    return None if lack is None else f"{part.name!r} needs {lack}"


def _trained(
    train: TrainConfig, graph: Graph, registry: Registry, process: Process, faults: list[tuple[str, str]]
) -> tuple[int, int] | None:
    """Return the numbers of trained and of frozen parameters; None if all are trained. Problems are added to ``faults``."""
    if not (train.freeze or train.adapters):
        return None
    from sedd_graph.engine.construct import build_shapes
    from sedd_graph.training.adapters import choose_trained, count_trained

    model = build_shapes(graph, registry)
    for name, module in process.learned().items():
        model.add_module(name, module)
    try:
        choose_trained(model, train)
    except UserError as error:
        key, _, text = str(error).partition(": ")
        faults.append((key, text) if text else ("train.freeze", key))
        return None
    return count_trained(list(model.parameters()))


def lock_text(report: Report) -> str:
    """Return the lock file of a checked blueprint as YAML text.

    The lock file is the blueprint with a version in each component name (``attention.v1``) and all default values
    filled in.
    """

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
    """Return the first 16 hexadecimal digits of the SHA-256 of ``text``. The lock file's digest identifies a build."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def schema_text() -> str:
    """Return the JSON Schema of blueprints as deterministic text, with the Configs of all installed components."""
    import json

    from sedd_graph.blueprint.json_schema import blueprint_schema

    return json.dumps(blueprint_schema(installed(warn=True).contracts(), SECTIONS), indent=1, ensure_ascii=False) + "\n"
