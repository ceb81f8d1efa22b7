"""sedd_graph: discrete-diffusion language models and normalizing flows, declared as graphs in YAML.

The package checks the declaration (:func:`check`), verifies numerically the noise process and the inverses of
invertible blocks (:func:`build`), and trains, evaluates and samples the model.

Public names are imported on first use, so that ``import sedd_graph`` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedd_graph.component.base import Component, ComponentConfig, Context
    from sedd_graph.engine.block_steps import BlockSteps
    from sedd_graph.engine.engine import Bound, Engine
    from sedd_graph.errors import SeddGraphError
    from sedd_graph.runs.check import Report, check
    from sedd_graph.runs.open import build

__version__ = "0.1.0"

_HOME = {
    "BlockSteps": "sedd_graph.engine.block_steps",
    "Bound": "sedd_graph.engine.engine",
    "Component": "sedd_graph.component.base",
    "ComponentConfig": "sedd_graph.component.base",
    "Context": "sedd_graph.component.base",
    "Engine": "sedd_graph.engine.engine",
    "Report": "sedd_graph.runs.check",
    "SeddGraphError": "sedd_graph.errors",
    "build": "sedd_graph.runs.open",
    "check": "sedd_graph.runs.check",
}

__all__ = [
    "BlockSteps",
    "Bound",
    "Component",
    "ComponentConfig",
    "Context",
    "Engine",
    "Report",
    "SeddGraphError",
    "build",
    "check",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sedd_graph' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
