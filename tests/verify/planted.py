"""Planted faults: a shipped component with one method changed, and the check that must name the fault."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.base import Context

__all__ = ["Fault", "after", "before", "globally_seeded", "planted"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of a component.

    Attributes:
        name: What is wrong, in a few words; the id of its test.
        base: The shipped class.
        methods: Members that replace those of the class.
        caught: Names of the checks of which at least one must fail.
        config: Values of Config keys.
        states: Declared number of states.
    """

    name: str
    base: Any
    methods: dict[str, Any]
    caught: tuple[str, ...]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    states: int = 4

    def of(self, states: int | None = None) -> Any:
        """Construct the component with ``states`` states; None: the declared number."""
        return planted(self.base, self.methods, self.config, states or self.states)


def planted(base: Any, methods: dict[str, Any], config: dict[str, Any], states: int) -> Any:
    """Construct a subclass of ``base`` with some members replaced."""
    cls: Any = type(f"Planted{base.__name__}", (base,), methods)
    made = base.Config(**config)
    if hasattr(base, "toy"):
        made = base.toy(made, states)
    return cls(made, Context({"n": states}))


def after(cls: Any, name: str, change: Callable[..., Any]) -> dict[str, Any]:
    """Return the method ``name`` of ``cls`` with its result changed: ``change(self, result, *arguments)``."""
    known = getattr(cls, name)

    def method(self: Any, *arguments: Any, **more: Any) -> Any:
        return change(self, known(self, *arguments, **more), *arguments, *more.values())

    return {name: method}


def before(cls: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> dict[str, Any]:
    """Return the method ``name`` of ``cls`` with its positional arguments changed: ``change(self, *arguments)``."""
    known = getattr(cls, name)

    def method(self: Any, *arguments: Any, **more: Any) -> Any:
        return known(self, *change(self, *arguments), **more)

    return {name: method}


def globally_seeded(source: str) -> Callable[[], float]:
    """Return a function that draws a number in [0, 1) from a global generator: ``torch``, ``numpy`` or ``python``."""
    sources: dict[str, Callable[[], float]] = {
        "torch": lambda: float(torch.rand(())),
        "numpy": lambda: float(np.random.rand()),
        "python": random.random,
    }
    return sources[source]


def at(where: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` where ``where`` [b] or [b, l] holds, else ``other``, of more axes."""
    while where.dim() < other.dim():
        where = where[..., None]
    return torch.where(where, value, other)
