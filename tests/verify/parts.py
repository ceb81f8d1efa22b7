"""Registered components by name."""

from typing import Any

from sedd_graph.component.registry import discover
from sedd_graph.families.plan import Part

REGISTRY = discover()


def part(op: str, **config: Any) -> Part:
    """Return a component with its example Config and the given values."""
    contract = REGISTRY.contract(op)
    example = getattr(REGISTRY.component(op), "example", {})
    return Part(contract, contract.config.model_validate({**example, **config}))
