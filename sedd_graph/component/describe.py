"""``sedd-graph components``: what is installed, with ports, Config, distribution and place."""

from __future__ import annotations

import warnings

from sedd_graph.component.contract import Contract
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry, discover
from sedd_graph.errors import SeddGraphError

__all__ = ["describe", "list_components"]


def list_components(registry: Registry | None = None) -> str:
    """One line per component, by kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        contracts = (registry or discover()).contracts()
    lines: list[str] = []
    width = max((len(c.op) for c in contracts), default=0)
    for kind in sorted({c.kind for c in contracts}):
        lines.append(kind)
        lines += [f"  {c.op:<{width}}  {c.summary}  [{c.distribution}]" for c in contracts if c.kind == kind]
    return "\n".join(lines)


def describe(name: str, registry: Registry | None = None) -> str:
    """Ports, Config with defaults, what it promises, distribution, file and line of one component."""
    registry = registry or discover()
    contract, (file, line) = registry.contract(name), registry.place(name)
    lines = [
        f"{contract.op} ({contract.kind})",
        f"  {contract.summary}",
        f"  {contract.distribution}  {file}:{line}",
    ]
    if KINDS[contract.kind].is_node:
        lines.append("ports")
        lines += _ports(contract)
    lines.append("config")
    fields = contract.config.model_fields
    for field_name, field in fields.items():
        shown = "required" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {field_name}: {_type(field.annotation)} {shown}")
    if not fields:
        lines.append("  none")
    if contract.positionwise:
        lines += ["promises", "  positionwise: each position is looked at by itself"]
    return "\n".join(lines)


def _type(annotation: object) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


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
