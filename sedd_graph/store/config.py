"""The ``store`` section of a blueprint. No torch."""

from __future__ import annotations

from typing import Annotated

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["StoreConfig"]


class StoreConfig(Strict):
    """Writing of saved activations to ``activations.zarr`` during training."""

    queue: Annotated[int, pydantic.Field(ge=1, le=1024)] = 16
    """Largest number of writes that wait in memory, each of one chunk of records; training pauses while the queue is full."""
