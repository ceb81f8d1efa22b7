"""Memory that a process can use on a device: physical memory, limits of control groups (cgroup v1 and v2), GPU memory."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

__all__ = ["MemoryLimit", "memory_limit", "resident_bytes"]

_UNLIMITED = 2**60
"""Limits from this size on, bytes, are none: cgroup v1 writes the largest multiple of a page."""


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """Largest memory that a process can use on a device.

    Attributes:
        size: Size in bytes.
        what: Name of the limit for messages, such as ``memory of this machine``.
    """

    size: int
    what: str


def memory_limit(device: torch.device, *, root: Path = Path("/")) -> MemoryLimit | None:
    """Return the largest memory that this process can use on ``device``, bytes, with a name; None if it is not known.

    On a CUDA GPU this is the free memory and the memory that PyTorch's allocator has reserved in this process. On any
    other device it is the smallest of the machine's physical memory and the limits of the control groups (cgroup v1
    and v2) of this process; memory that other processes use is not subtracted.

    Args:
        device: The device.
        root: Root of the file system, from which ``/proc`` and ``/sys`` are read.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MemoryLimit(free + torch.cuda.memory_reserved(device), f"free memory of {device}")
    found = [MemoryLimit(size, "memory of this machine") for size in _physical(root)]
    found += [MemoryLimit(size, "memory limit of this process's control group (cgroup)") for size in _cgroups(root)]
    return min(found, key=lambda limit: limit.size, default=None)


def resident_bytes(device: torch.device, *, root: Path = Path("/")) -> int:
    """Return the memory that this process uses at the moment on ``device``, bytes; 0 if it is not known.

    Args:
        device: The device.
        root: Root of the file system, from which ``/proc`` is read.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int((root / "proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _physical(root: Path) -> Iterator[int]:
    """Yield the size of the machine's memory, bytes, if it is known."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, StopIteration):
        if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> Iterator[int]:
    """Yield the memory limits, bytes, of the control groups of this process and of all groups that contain them.

    Each line of ``/proc/self/cgroup`` is ``0::PATH`` (v2) or ``NUMBER:CONTROLLERS:PATH`` (v1). In a container, PATH may
    be that on the host, and the limits are those at the root of the mounted hierarchy; both are read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            folders, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max"
        elif "memory" in controllers.split(","):
            folders, name = ["sys/fs/cgroup/memory"], "memory.limit_in_bytes"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for folder in folders:
            for part in (inside, *inside.parents):
                yield from _limit(root / folder / part / name)


def _limit(path: Path) -> Iterator[int]:
    """Yield the limit in a file of a control group, unless there is no file or no limit (``max`` in v2)."""
    try:
        size = int(path.read_text())
    except (OSError, ValueError):
        return
    if size < _UNLIMITED:
        yield size
