"""Changes of the ``sample`` section of a run after training: another sampler, and other values of its keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pydantic

from sedd_graph.blueprint.load import load
from sedd_graph.component.registry import installed
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.runs.check import LOCK, SECTIONS
from sedd_graph.runs.open import Run

__all__ = ["sample_overrides", "sampler_settings", "samplers", "with_sampler"]


def sample_overrides(run: Path, sampler: str | None, settings: Sequence[str]) -> list[str]:
    """Return the overrides of a run's blueprint for a sampler and settings of its ``sample`` section.

    Args:
        run: The run folder.
        sampler: Name of another sampler, such as ``confidence``; None for the run's own. Keys of the section that the
            Config of the sampler has, too, keep their values.
        settings: Texts ``key=value`` of keys of the section, such as ``temperature=0.7``.

    Raises:
        UserError: The run has no ``sample`` section, or there is no such sampler.
    """
    found = list[str]()
    if sampler is not None:
        if not (run / LOCK).is_file():
            raise UserError(f"{run} is not a run folder: there is no {LOCK} in it")
        old = load(run / LOCK, (), sections=SECTIONS).blueprint.sample
        contract = installed(warn=True).contract(sampler)
        held = {} if old is None else old.model_dump(mode="json", exclude_unset=True)
        kept = {key: value for key, value in held.items() if key in {*contract.config.model_fields, "classifier"}}
        found.append(f"sample={json.dumps({**kept, 'op': sampler})}")
    return [*found, *(f"sample.{text}" for text in settings)]


def with_sampler(run: Run, name: str) -> Run:
    """Return an opened run with another sampler, whose Config has the keys of the run's own that fit.

    The network is shared; trained parts of the process, such as a learned schedule, have the values of the run.

    Args:
        run: The opened run folder.
        name: Name of the sampler, such as ``confidence``.

    Raises:
        UserError: There is no such sampler, or it does not fit the process.
    """
    plan, old, registry = run.plan, run.engine.process, run.report.registry
    if not isinstance(plan, ProcessPlan):
        raise UserError(f"{run.path} has no sampler that another one could replace")
    contract = registry.contract(name)
    if contract.kind != plan.sampler.contract.kind:
        raise UserError(f"{name!r} is no sampler for this model")
    held = plan.sampler.config.model_dump(exclude_unset=True)
    try:
        config = contract.config.model_validate({k: v for k, v in held.items() if k in contract.config.model_fields})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"sample.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    changed = dataclasses.replace(plan, sampler=Part(contract, config))
    made = type(old)(changed, old.setup)
    for key, part in made.learned().items():
        part.load_state_dict(old.learned()[key].state_dict())
    return dataclasses.replace(
        run, report=dataclasses.replace(run.report, plan=changed), engine=Engine(run.engine.network, made)
    )


def samplers(run: Run) -> dict[str, Run]:
    """Return an opened run with each installed sampler that fits it, by name, its own first.

    Args:
        run: The opened run folder.
    """
    plan, found = run.plan, dict[str, Run]()
    if not isinstance(plan, ProcessPlan):
        return found
    found[plan.sampler.name] = run
    for contract in run.report.registry.contracts():
        if contract.kind == plan.sampler.contract.kind and contract.name not in found:
            with contextlib.suppress(SeddGraphError):  # it does not fit
                found[contract.name] = with_sampler(run, contract.op)
    return found


@contextlib.contextmanager
def sampler_settings(run: Run, **settings: float) -> Iterator[None]:
    """Give the sampler of an opened run other values of keys of its Config inside the context.

    Args:
        run: The opened run folder.
        **settings: The values, such as ``temperature=0.7``.

    Raises:
        UserError: The sampler has no such key, or the value is not allowed.
    """
    sampler = getattr(run.engine.process, "sampler", None)
    if sampler is None:
        raise UserError(f"{run.path} has no sampler with settings")
    before = sampler.config
    if missing := sorted(settings.keys() - type(before).model_fields.keys()):
        raise UserError(f"the sampler {run.plan.sampler_op!r} has no {missing[0]!r}")
    try:
        sampler.config = type(before).model_validate({**before.model_dump(), **settings})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"sample.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    try:
        yield
    finally:
        sampler.config = before
