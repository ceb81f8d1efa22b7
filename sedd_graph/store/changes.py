"""Changes to the training settings of a run folder after it was built, in ``changes.json`` beside the lock file.

The lock file never changes, since the weights depend on it. A run that is extended records here what was changed at which
step; later commands apply the changes in order.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sedd_graph.component.strict import Strict
from sedd_graph.store.files import write_json
from sedd_graph.store.manifest import read_typed

__all__ = ["CHANGES", "Change", "add_change", "read_changes"]

CHANGES = "changes.json"
"""File name, in a run folder, of the changes."""
Override = Annotated[str, pydantic.Field(max_length=10_000, pattern=r"^train\.")]


class Change(Strict):
    """Overrides with which training was resumed."""

    step: Annotated[int, pydantic.Field(ge=0, le=10**10)]
    """Step of the newest checkpoint at that time."""
    overrides: Annotated[list[Override], pydantic.Field(max_length=100)]
    """The overrides, such as ``train.steps=3000``."""
    at: str
    """Time, UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"at step {self.step}: {' '.join(self.overrides)}"


class _Changes(Strict):
    format: Literal[1] = 1
    changes: Annotated[list[Change], pydantic.Field(max_length=1000)]


def read_changes(run: Path) -> list[Change]:
    """Return the changes to a run folder, oldest first.

    Raises:
        DamagedError: ``changes.json`` is damaged.
    """
    return read_typed(run / CHANGES, _Changes).changes if (run / CHANGES).exists() else []


def add_change(run: Path, step: int, overrides: list[str]) -> Change:
    """Record a change to a run folder, and return it.

    Raises:
        EnvironmentFault: The disk cannot be written.
    """
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    changes = [*read_changes(run), Change(step=step, overrides=overrides, at=at)]
    write_json(run / CHANGES, _Changes(changes=changes).model_dump(mode="json"))
    return changes[-1]
