"""Text output of the subcommand ``sedd-graph components``: a list of components, or the details of one."""

from __future__ import annotations

import warnings

from sedd_graph.component.contract import Contract
from sedd_graph.component.fields import field_descriptions, type_text
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry, discover
from sedd_graph.errors import SeddGraphError

__all__ = ["describe", "list_components"]


def list_components(registry: Registry | None = None) -> str:
    """Return text with one line per component, grouped by kind.

    Args:
        registry: Registry of the components to list; that of the installed components by default.
    """
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
    """Return a description of one component as text: ports, Config keys, Python distribution, source file and line.

    Args:
        name: Name of the component, such as ``attention`` (the highest version) or ``attention.v1``.
        registry: Registry that contains the component; that of the installed components by default.

    Raises:
        UserError: No component has this name.
        EnvironmentFault: The component cannot be imported.
    """
    registry = registry or discover()
    contract, (file, line) = registry.contract(name), registry.location(name)
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
        lines += ["properties", "  positionwise: an output at a position depends only on inputs at that position"]
    return "\n".join(lines)


def _keys(contract: Contract) -> list[str]:
    """Return two lines per Config key: default, type, choices and bounds, then the description."""
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
