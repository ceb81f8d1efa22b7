"""Reading of the tensors of a checkpoint, whole or sharded, whichever way they are placed on processes.

Shards are read by torch's distributed checkpoints (``HuggingFaceStorageReader``), which reads from each file only what the
tensors of this process need. Their places are in JSON headers: nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sedd_graph.store.manifest import DamagedError, Manifest
from sedd_graph.training.checkpoint import file_name, files_of, read_tensors
from sedd_graph.training.weights import check_finite, check_tensors

__all__ = ["Stored", "stored"]


def stored(path: Path, kind: str, manifest: Manifest) -> Stored:
    """Return the tensors of a kind in a checkpoint, without reading them.

    Args:
        path: The folder of the checkpoint.
        kind: The kind of tensors, such as ``model``.
        manifest: Manifest of the checkpoint. Files that it does not list are not read.

    Raises:
        DamagedError: Shards are missing.
    """
    names = files_of(manifest, kind, path) or [file_name(kind)]
    return Stored(path, kind, tuple(names))


@dataclasses.dataclass(frozen=True)
class Stored:
    """Tensors of one kind in a checkpoint: one file, or one for each shard."""

    path: Path
    kind: str
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name of the file, or of all shards, such as ``model-*-of-00004.safetensors``."""
        return self.names[0] if len(self.names) == 1 else self.names[0].replace("00001", "*", 1)

    @property
    def where(self) -> str:
        """Path of the file, for messages."""
        return str(self.path / self.label)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, whole, on the CPU.

        Raises:
            DamagedError: A file is missing, or is not a safetensors file.
        """
        if len(self.names) == 1:
            return read_tensors(self.path / self.names[0])
        found = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in self._shapes().items()}
        self._read(found)
        return found

    def read_into(
        self,
        targets: Mapping[str, Tensor],
        *,
        finite: Container[str] | None = None,
    ) -> None:
        """Read tensors in place: of each, what this process holds.

        Args:
            targets: Tensors by name, whole or sharded (DTensor).
            finite: Names of the tensors whose values must be finite; None for all.

        Raises:
            DamagedError: A file is damaged, or names, shapes, dtypes or values are not those of the targets. These may
                have been read in part.
        """
        if len(self.names) == 1 and not any(hasattr(t, "to_local") for t in targets.values()):
            found = self.tensors()
            check_tensors(found, targets, where=self.where, finite=finite)
            with torch.no_grad():
                for name, target in targets.items():
                    target.copy_(found[name])
            return
        check_tensors(self._shapes(), targets, where=self.where, finite=())
        self._read(targets)
        check_finite(targets, where=self.where, finite=finite)

    def _shapes(self) -> dict[str, Tensor]:
        """Return the stored tensors as ``meta`` tensors, and check that their shards are whole."""
        try:
            return _shapes(self.path, self.names)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"{self.where} cannot be read: {error}") from None

    def _read(self, targets: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # every process reads for itself
                load(dict(targets), storage_reader=_reader(self.path, self.names), no_dist=True)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise DamagedError(f"{self.where} cannot be read: {error}") from None


def _reader(path: Path, names: Sequence[str]) -> Any:
    """Return a reader of the named files of a folder, and no others."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    class Files(FileSystem):
        def ls(self, _: Any) -> list[str]:
            return [str(path / name) for name in names]

    reader = HuggingFaceStorageReader(str(path))
    reader.fs = Files()
    return reader


def _shapes(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of sharded files as ``meta`` tensors by name.

    Raises:
        ValueError: The shards of a tensor are not its rows, each once.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, stored in _reader(path, names).read_metadata().state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or stored.properties.dtype is None:
            raise ValueError(f"{name} is not a tensor")
        row = 0
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets):
            start = (row, *(0 for _ in stored.size[1:])) if stored.size else ()
            if tuple(chunk.offsets) != start or chunk.sizes[1:] != stored.size[1:]:
                raise ValueError(f"the shards of {name} are not its rows, each once")
            row += chunk.sizes[0] if stored.size else 1
        if row != (stored.size[0] if stored.size else 1) or math.prod(stored.size) > 2**40:
            raise ValueError(f"the shards of {name} are not its rows, each once")
        found[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
    return found
