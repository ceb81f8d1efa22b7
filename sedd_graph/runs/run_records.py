"""Files of a run folder that record what it was built from, and the results of its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sedd_graph.graph.model import Running
from sedd_graph.store.manifest import read_typed

__all__ = ["CERTIFICATE", "FACTS", "Certificate", "Facts", "read_certificate", "read_facts"]

CERTIFICATE = "certificate.json"
"""File name, in a run folder, of the results of all checks."""
FACTS = "run.json"
"""File name, in a run folder, of what the run was built from, and where."""


class Facts(pydantic.BaseModel):
    """Those facts of ``run.json`` that commands use."""

    root: str | None = None
    """Folder to which file names of the data are relative."""
    corpus: str | None = None
    """Fingerprint of the data."""
    blueprint: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    """Digest of the lock file."""
    teacher: str | None = None
    """Name of the run folder that the run is distilled from; None for a run that is trained on data."""


class _Mode(pydantic.BaseModel):
    """Execution mode of a block (:class:`sedd_graph.graph.model.Running`)."""

    memory: Literal["store", "checkpoint", "reversible"]
    exact: bool
    share: Annotated[float, pydantic.Field(gt=0, le=1)]
    stored: Annotated[int, pydantic.Field(ge=0, le=4096)]


class Certificate(pydantic.BaseModel):
    """Those results in ``certificate.json`` that commands use."""

    checkpointed: list[str] = []
    """Paths of the blocks that are checkpointed instead of reversible."""
    memory: dict[str, _Mode] = {}
    """Execution modes that the plan for a memory budget chose, by the name of a node."""

    @property
    def modes(self) -> dict[str, Running]:
        """The execution modes in :attr:`memory`."""
        return {name: Running(**mode.model_dump()) for name, mode in self.memory.items()}


def read_facts(path: Path) -> Facts:
    """Return the facts of run.json; none of them where there is none."""
    return read_typed(path / FACTS, Facts) if (path / FACTS).exists() else Facts()


def read_certificate(path: Path) -> Certificate:
    """Return the results in certificate.json of a run folder; the defaults where there is none."""
    return read_typed(path / CERTIFICATE, Certificate) if (path / CERTIFICATE).exists() else Certificate()
