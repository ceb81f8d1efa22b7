"""One component under one Config, as the checks of its kind receive it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedd_graph.component.contract import ComponentConfig

__all__ = ["Case", "Failures"]

Failures = list[tuple[str, str]]
"""What is wrong, as (name of the check, what was found)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The class under test, its validated Config, and the arguments of ``check_component``."""

    cls: Any
    config: ComponentConfig
    axes: Mapping[str, int]
    connected: tuple[str, ...]
    compile: bool
    root: Path
    partners: tuple[type, ...]
