"""From a registered name and raw ``with:`` keys to a contract and a validated Config, or to problems with places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

from sedd_graph.blueprint.problems import model_problems
from sedd_graph.component.axes import AxisError, parse_size
from sedd_graph.component.contract import ComponentConfig, Contract, size_fields
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry
from sedd_graph.errors import EnvironmentFault, SeddGraphError, suggest
from sedd_graph.graph.location import Location
from sedd_graph.graph.ports import Scope

__all__ = ["configure", "find_contract"]


def find_contract(registry: Registry, op: str, kinds: tuple[str, ...], at: Location) -> Contract | None:
    """The contract behind ``op``, written at ``at``, if it is of one of ``kinds``; otherwise it is reported why not."""
    try:
        contract = registry.contract(op)
    except SeddGraphError as error:
        at.refuse(str(error), environment=isinstance(error, EnvironmentFault))
        return None
    if contract.kind in kinds:
        return contract
    if KINDS[kinds[0]].is_node:
        wanted = "a node of the graph"
    else:
        fitting = sorted({e.name for e in registry if _kind(registry, e.op) in kinds})
        wanted = f"a {kinds[0]}{suggest(op, fitting)}" + (f": {', '.join(fitting)}" if fitting else "")
    at.refuse(f"{op!r} is of kind {contract.kind}; here stands {wanted}")
    return None


def _kind(registry: Registry, op: str) -> str:
    try:
        return registry.contract(op).kind
    except SeddGraphError:
        return ""


def configure(contract: Contract, raw: Mapping[str, Any], scope: Scope, at: Location) -> ComponentConfig | None:
    """The Config from the keys ``raw`` that stand at ``at``: size expressions evaluated, then all validated.

    None where a problem was reported.
    """
    values, before = dict(raw), len(at.problems)
    for name in size_fields(contract.config) & values.keys():
        values[name] = _sizes(values[name], scope, at / name)
    if len(at.problems) > before:
        return None
    try:
        return contract.config.model_validate(values)
    except pydantic.ValidationError as error:
        at.problems.extend(model_problems(error, contract.config, at.loaded.position, at.path, values))
        return None


def _sizes(value: Any, scope: Scope, at: Location) -> Any:
    """A size expression as an integer, in lists too; anything else as it is, for the Config to judge."""
    if isinstance(value, list):
        return [_sizes(item, scope, at / index) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        size = parse_size(value, scope)
        if size.constant is None:
            free = ", ".join(sorted(size.symbols))
            raise AxisError(f"{value!r} depends on {free}, which no one knows before a step runs")
        return size.constant
    except AxisError as error:
        at.refuse(str(error))
        return None
