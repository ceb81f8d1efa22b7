"""Config class of the ``store`` section of a blueprint. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["StoreConfig"]


class StoreConfig(Strict):
    """``store`` section of a blueprint: how saved activations are written to ``activations.zarr`` during training."""

    queue: Annotated[int, pydantic.Field(ge=1, le=1024)] = 16
    """Largest number of writes that wait in memory, each one chunk of activations; training pauses while the queue is
    full."""
