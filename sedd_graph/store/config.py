"""How saved ports are streamed to ``activations.zarr``."""

from __future__ import annotations

from typing import Annotated

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["StoreConfig"]


class StoreConfig(Strict):
    """The ``store`` section of a blueprint."""

    queue: Annotated[int, pydantic.Field(ge=1, le=1024)] = 16
    """How many records may wait to be written; training waits beyond that."""
