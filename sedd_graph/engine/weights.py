"""Writing of weight files."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sedd_graph.store.durable import sync_file

__all__ = ["save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, durably, with the permissions that the umask gives to new files.

    The safetensors library itself would create the file with mode 0600.

    Args:
        tensors: Contiguous CPU tensors by name.
        path: The file to write.
        metadata: Texts by name for the header of the file; None for none.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
    sync_file(path)
