"""From a registered name and raw ``with:`` keys to a contract and a validated Config, or to problems with places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from sedd_graph.axes import AxisError, Size, parse_size
from sedd_graph.blueprint.problems import model_problems
from sedd_graph.contract import ComponentConfig, Contract, size_fields
from sedd_graph.errors import SeddGraphError, suggest
from sedd_graph.plugins import Registry

__all__ = ["PathProblem", "configure", "find_contract"]

PathProblem = Callable[[tuple[str | int, ...], str], None]
"""Called with a path and a message for every problem."""


def find_contract(
    registry: Registry, op: str, kinds: tuple[str, ...], refuse: Callable[[str], None]
) -> Contract | None:
    """The contract behind ``op`` if it is of one of ``kinds``; otherwise ``refuse`` is told why not."""
    try:
        contract = registry.contract(op)
    except SeddGraphError as error:
        refuse(str(error))
        return None
    if contract.kind not in kinds:
        fitting = [e.name for e in registry if registry_kind(registry, e.op) in kinds] if len(kinds) == 1 else []
        refuse(
            f"{op!r} is of kind {contract.kind}; here stands "
            + (
                f"a {kinds[0]}{suggest(op, fitting)}" + (f": {', '.join(sorted(set(fitting)))}" if fitting else "")
                if len(kinds) == 1
                else "a node of the graph"
            )
        )
        return None
    return contract


def registry_kind(registry: Registry, op: str) -> str:
    try:
        return registry.contract(op).kind
    except SeddGraphError:
        return ""


def configure(
    contract: Contract,
    raw: Mapping[str, Any],
    scope: Mapping[str, Size],
    *,
    base: tuple[str | int, ...],
    locate: Callable[[tuple[str | int, ...]], tuple[str, int, int]],
    report: Callable[[Any], None],
    refuse: PathProblem,
) -> ComponentConfig | None:
    """Evaluate size expressions, then validate. Problems go to ``report`` and ``refuse``; None where there were any."""
    values, good = dict(raw), True
    for name in size_fields(contract.config) & values.keys():
        if not isinstance(values[name], str):
            continue
        try:
            size = parse_size(values[name], scope).substitute(scope)
            if size.constant is None:
                raise AxisError(
                    f"{values[name]!r} depends on {', '.join(sorted(size.symbols))}, which no one knows before a step runs"
                )
            values[name] = size.constant
        except AxisError as error:
            refuse((*base, name), str(error))
            good = False
    if not good:
        return None
    try:
        return contract.config.model_validate(values)
    except pydantic.ValidationError as error:
        for problem in model_problems(error, contract.config, locate, base, values):
            report(problem)
        return None
