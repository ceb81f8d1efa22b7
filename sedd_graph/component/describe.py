"""``sedd-graph components``: the installed components, with ports, Config keys, distribution and source."""

from __future__ import annotations

import warnings

from sedd_graph.component.contract import Contract
from sedd_graph.component.fields import field_descriptions, type_text
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry, discover
from sedd_graph.errors import SeddGraphError

__all__ = ["describe", "list_components"]


def list_components(registry: Registry | None = None) -> str:
    """Return one line per component, by kind in the order of :data:`~sedd_graph.component.kinds.KINDS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        contracts = (registry or discover()).contracts()
    lines: list[str] = []
    width = max((len(c.op) for c in contracts), default=0)
    for kind in KINDS.values():
        found = [f"  {c.op:<{width}}  {c.summary}  [{c.distribution}]" for c in contracts if c.kind == kind.name]
        lines += [kind.name if kind.is_node else f"{kind.name} ({kind.place})", *found] if found else []
    return "\n".join(lines)


def describe(name: str, registry: Registry | None = None) -> str:
    """Return ports, Config keys, distribution, file and line of one component."""
    registry = registry or discover()
    contract, (file, line) = registry.contract(name), registry.place(name)
    kind = KINDS[contract.kind]
    lines = [
        f"{contract.op} ({contract.kind}, {'node of the graph' if kind.is_node else kind.place})",
        f"  {contract.summary}",
        f"  {contract.distribution}  {file}:{line}",
    ]
    if kind.is_node:
        lines += ["ports", *_ports(contract)]
    lines += ["config", *(_keys(contract) or ["  none"])]
    if contract.positionwise:
        lines += ["promises", "  positionwise: an output at a position depends on inputs at that position alone"]
    return "\n".join(lines)


def _keys(contract: Contract) -> list[str]:
    """Return the lines of all Config keys: type, choices, bounds and default, and the meaning below."""
    lines, meanings = [], field_descriptions(contract.config)
    for name, field in contract.config.model_fields.items():
        default = "required" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {name} {default}  ({type_text(field.annotation, field.metadata)})")
        lines += [f"      {meanings[name]}"] if name in meanings else []
    return lines


def _ports(contract: Contract) -> list[str]:
    required = [n for n, f in contract.config.model_fields.items() if f.is_required()]
    try:
        signature = contract.signature(contract.config.model_construct() if required else contract.config(), {"*": 2})
    except (SeddGraphError, ValueError, TypeError, AttributeError):
        return ["  depend on the config"]
    lines = []
    for port in signature.inputs:
        mark = " (optional)" if port.optional else " (any number)" if port.variadic else ""
        lines.append(f"  in   {port.name}: {port.type}{mark}")
    return lines + [f"  out  {port.name}: {port.type}" for port in signature.outputs]
