"""How saved ports are streamed to ``activations.zarr``."""

from __future__ import annotations

from typing import Annotated

import pydantic

__all__ = ["StoreConfig"]


class StoreConfig(pydantic.BaseModel):
    """The ``store`` section of a blueprint."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    queue: Annotated[int, pydantic.Field(ge=1, le=1024)] = 16
    """How many records may wait to be written; training waits beyond that."""
