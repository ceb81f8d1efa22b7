"""Resolution of a component: looks up its contract by name, and validates the keys of its Config.

The contract of a component describes it (kind, Config class, ports), so that a graph can be checked without running the
component's code.
"""

from __future__ import annotations

from typing import Any

from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.schema import ConfigKeys
from sedd_graph.component.axes import AxisError, parse_size
from sedd_graph.component.contract import ComponentConfig, Contract, size_fields
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry
from sedd_graph.errors import EnvironmentFault, SeddGraphError, nearest
from sedd_graph.graph.ports import Scope

__all__ = ["configure", "find_contract"]


def find_contract(registry: Registry, op: str, kinds: tuple[str, ...], at: Location) -> Contract | None:
    """Return the contract of a component: its kind, Config class and ports.

    Returns None if the component is unknown, cannot be loaded or is of the wrong kind; a problem is then reported.

    Args:
        registry: The installed components.
        op: Name of the component.
        kinds: Kinds that are allowed at this location, such as ``("kernel",)``.
        at: Location of the name in the blueprint.
    """
    try:
        contract = registry.contract(op)
    except SeddGraphError as error:
        unknown = op.partition(".")[0] not in registry.names and not KINDS[kinds[0]].is_node
        fitting = f"; it must be {_fitting(registry, op, kinds)}" if unknown else ""
        at.refuse(f"{error}{fitting}", environment=isinstance(error, EnvironmentFault))
        return None
    if contract.kind in kinds:
        return contract
    at.refuse(f"{op!r} is of kind {contract.kind}, but must be {_fitting(registry, op, kinds)}")
    return None


def _fitting(registry: Registry, op: str, kinds: tuple[str, ...]) -> str:
    """Return text that names the kinds and their components most similar to ``op``; graph nodes are not listed."""
    if KINDS[kinds[0]].is_node:
        return "a node of the graph"
    names = sorted({contract.name for contract in registry.contracts() if contract.kind in kinds})
    return f"of kind {' or '.join(kinds)}: {nearest(op, names)}"


def configure(contract: Contract, raw: ConfigKeys, scope: Scope, at: Location) -> ComponentConfig | None:
    """Return the validated Config of a component.

    In Config fields of type :data:`~sedd_graph.component.contract.SizeField`, expressions over axis names, such as
    ``4*d``, are evaluated to integers before validation.

    Args:
        contract: Contract of the component.
        raw: Config keys as written in the blueprint.
        scope: Sizes of the axis names that expressions may use.
        at: Location of the keys in the blueprint.

    Returns:
        The Config, or None if problems were reported.
    """
    values, before = dict(raw), len(at.problems)
    for name in sorted(size_fields(contract.config) & values.keys()):
        values[name] = _sizes(values[name], scope, at / name)
    return at.validate(contract.config, values) if len(at.problems) == before else None


def _sizes(value: Any, scope: Scope, at: Location) -> Any:
    """Evaluate a size expression, or a list of them; return any other value as it is, for the Config to validate."""
    if isinstance(value, list):
        return [_sizes(item, scope, at / index) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        size = parse_size(value, scope)
        if size.constant is None:
            free = ", ".join(sorted(size.symbols))
            raise AxisError(f"{value!r} depends on {free}, which is known only when a step runs")
        return size.constant
    except AxisError as error:
        at.refuse(str(error))
        return None
