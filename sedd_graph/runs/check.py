"""``check`` and ``build``: the composition root, the one place that knows every room.

The other verbs are in :mod:`sedd_graph.runs.open`; the command line is in :mod:`sedd_graph.cli.main`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from sedd_graph.blueprint.load import Loaded, load
from sedd_graph.blueprint.lock import lock
from sedd_graph.component.registry import Registry, discover
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import ProcessPlan, read_process
from sedd_graph.families.points_plan import FlowPlan, read_flow
from sedd_graph.graph.draw import to_tree
from sedd_graph.graph.expand import expand
from sedd_graph.graph.model import Graph
from sedd_graph.inverse.claims import Derived, derive, prove
from sedd_graph.store.config import StoreConfig
from sedd_graph.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from sedd_graph.engine.engine import CompileMode, Engine

__all__ = ["LOCK", "Report", "build", "check", "digest", "lock_text", "make_engine", "schema_text", "undo"]

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
    plan: ProcessPlan | None
    registry: Registry
    parameters: int
    derived: tuple[Derived, ...] = ()
    flow: FlowPlan | None = None

    @property
    def name(self) -> str:
        return self.graph.name

    @property
    def data(self) -> DataConfig | PointsConfig:
        return self.loaded.sections.get("data") or DataConfig()

    @property
    def train(self) -> TrainConfig:
        return self.loaded.sections.get("train") or TrainConfig()

    @property
    def store(self) -> StoreConfig:
        return self.loaded.sections.get("store") or StoreConfig()

    def __str__(self) -> str:
        lines = [to_tree(self.graph), "", f"parameters  {self.parameters:,}"]
        if self.plan is not None:
            plan = self.plan
            states = f"{plan.states:,} states"
            if plan.edits:
                masked = plan.output == "log_x0"
                states = f"{plan.states - 1 - masked:,} tokens{', the mask' if masked else ''} and the start"
            lines.append(
                f"process     {plan.kernel.contract.name} with {plan.schedule.contract.name}, {states}; "
                f"objective {plan.objective.contract.name}; sampler {plan.sampler.contract.name}"
                + ("" if plan.classifier is None else f", guided by {plan.classifier.contract.name}")
            )
        if self.flow is not None:
            shape = " x ".join(map(str, self.flow.shape))
            lines.append(f"flow        of rows of {shape}; likelihood {self.flow.contract.name}")
        lines += [f"{'undone' if not i else '':<10}  {one}" for i, one in enumerate(self.derived)]
        return "\n".join(lines)


def _graph(path: str | Path, overrides: Sequence[str]) -> tuple[Loaded, Registry, Graph, dict[str, int]]:
    """The expanded graph, and batch and length where the blueprint says so."""
    loaded = load(path, overrides, sections=SECTIONS)
    registry = discover()
    data, train = (loaded.sections.get(key) for key in ("data", "train"))
    sizes = {"batch": (train or TrainConfig()).batch, "length": (data or DataConfig()).length}
    return loaded, registry, expand(loaded, registry), sizes


def undo(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Graph, tuple[Derived, ...]]:
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
    derived = prove(graph, sizes)
    flow = read_flow(loaded, graph, registry)
    plan = None if flow is not None else read_process(loaded, graph, registry)
    if flow is None and isinstance(loaded.sections.get("data"), PointsConfig):
        message = "points are for flows: give an objective of kind likelihood, such as exact_likelihood"
        raise BlueprintError([loaded.problem(("data", "points"), message)])
    from sedd_graph.engine.construct import count_shapes
    from sedd_graph.families.strings import make_string_process
    from sedd_graph.families.tokens import hold_inputs, make_process

    try:
        if plan is not None and plan.edits:
            edits = make_string_process(plan, registry)
            _fits_data(loaded, edits.kernel.data_tokens, None)
            _fits_strings(loaded, spares=edits.kernel.spares, one_length=edits.objective.one_length)
        elif plan is not None:
            process = make_process(plan, registry)
            hold_inputs(process, graph)
            _fits_data(loaded, process.kernel.data_tokens, process.objective.block)
    except BlueprintError as error:
        # combinations that cannot work are about keys of the root
        raise BlueprintError(
            [p if p.line else loaded.problem(tuple(p.path.split(".")), p.message) for p in error.problems]
        ) from None
    return Report(loaded, graph, plan, registry, count_shapes(graph, registry), derived, flow)


def _fits_data(loaded: Loaded, tokens: int, block: int | None) -> None:
    """A tokenizer whose size is known from its config must have as many tokens as the graph; rows are whole blocks."""
    data = loaded.sections.get("data")
    if data is not None and block is not None and data.length % block:
        message = f"rows of {data.length} tokens are no whole number of blocks of {block} (objective.block)"
        raise BlueprintError([Problem("", 0, 0, "data.length", message)])
    known = None if data is None else data.tokenizer.size
    if known is not None and known != tokens:
        message = f"the tokenizer has {known:,} tokens, but the graph is built for {tokens:,} (states less the mask)"
        raise BlueprintError([Problem("", 0, 0, "data.tokenizer", message)])


def _fits_strings(loaded: Loaded, *, spares: bool, one_length: bool) -> None:
    """Rows as a process that changes lengths can take them."""
    data = loaded.sections.get("data")
    if one_length and data is not None and data.rows != "stream":
        message = "the objective is for strings of one known length: take rows: stream, or the objective dise"
        raise BlueprintError([Problem("", 0, 0, "data.rows", message)])
    if not spares and data is not None and data.corpus.prompted:
        message = "this kernel spares no token, so there can be no prompt: leave it out, or take the kernel delete"
        raise BlueprintError([Problem("", 0, 0, "data.corpus.prompt", message)])


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


def make_engine(
    report: Report,
    *,
    device: torch.device,
    compile: CompileMode = "auto",
    forbidden: Sequence[int] = (),
    pieces: Callable[[], Sequence[bytes | None]] | None = None,
    companions: Mapping[str, str] | None = None,
) -> Engine:
    """An engine with fresh weights. ``companions`` are further files that ``Engine.save`` writes beside the weights."""
    from sedd_graph.engine.engine import Engine
    from sedd_graph.store.files import write_text

    files = {LOCK: lock_text(report), **(companions or {})}

    def on_save(folder: Path) -> None:
        for name, text in files.items():
            write_text(folder / name, text)

    if report.flow is not None:
        from sedd_graph.families.points import FlowEngine

        return FlowEngine(
            report.graph, report.registry, report.flow, device=device, on_save=on_save, seed=report.train.seed
        )
    if report.plan is not None and report.plan.edits:
        from sedd_graph.families.strings import StringEngine

        return StringEngine(
            report.graph,
            report.registry,
            report.plan,
            device=device,
            compile=compile,
            forbidden=forbidden,
            on_save=on_save,
            seed=report.train.seed,
        )
    return Engine(
        report.graph,
        report.registry,
        report.plan,
        device=device,
        compile=compile,
        forbidden=forbidden,
        pieces=pieces,
        on_save=on_save,
        seed=report.train.seed,
    )


def build(
    path_or_run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | torch.device | None = None,
    compile: CompileMode = "auto",
) -> Engine:
    """An :class:`Engine` from a blueprint (fresh weights), or from a run folder (its newest weights, averaged if it has them).

    ``device`` is picked by hardware where it is not given. Raises :class:`sedd_graph.errors.SeddGraphError`.
    """
    from sedd_graph.engine.hardware import pick_device

    place, where = Path(path_or_run_dir), pick_device(device)
    if not place.is_dir():
        return make_engine(check(place, overrides), device=where, compile=compile)
    if not (place / LOCK).is_file():
        raise UserError(f"{place} is not a run folder: there is no {LOCK} in it")
    from sedd_graph.runs.open import open_run

    return open_run(place, overrides=overrides, device=where, compile=compile).engine


def schema_text() -> str:
    """The JSON Schema of blueprints with every installed component folded in, as stable text."""
    import json

    from sedd_graph.blueprint.json_schema import blueprint_schema

    return json.dumps(blueprint_schema(discover().contracts(), SECTIONS), indent=1, ensure_ascii=False) + "\n"
