"""Device and dtype selection, and a one-line description of the hardware."""

from __future__ import annotations

import math
import os
import platform
import time
from pathlib import Path

import torch

from sedd_graph.errors import UserError, suggest

__all__ = ["describe_hardware", "has_fast_bfloat16", "matmul_speed", "pick_device", "pick_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device called ``name``, or the best available device (``cuda``, then ``mps``, then ``cpu``).

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None or ``auto``: the best available. ``cuda`` without a number,
            also where it is the best, is the GPU that the environment variable ``LOCAL_RANK`` numbers, which torchrun
            sets for each process; the first one without it.

    Raises:
        UserError: The device is unknown or not available.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    # torch also knows devices that only compilers see, and cpu:7
    if device is None or device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
        raise UserError(f"unknown device {str(name)!r}: use cpu, cuda, cuda:0, mps or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available: torch finds no CUDA device")
    if device.type == "cuda":
        local = os.environ.get("LOCAL_RANK", "0")
        own = device.index is None
        device = torch.device("cuda", int(local) if own and local.isdecimal() else device.index or 0)
        if device.index >= (count := torch.cuda.device_count()):
            why = f" (LOCAL_RANK={local}: start at most as many processes as there are GPUs)" if own else ""
            raise UserError(f"device {str(device)!r}: this machine has {count} CUDA device(s){why}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not available: torch finds none")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware.

    False for ``mps``. A CPU without AVX512-BF16 or AMX emulates bfloat16, about 300 times slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        try:
            flags = Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype called ``name``.

    Args:
        name: ``float32``, ``bfloat16`` or ``auto`` (bfloat16 on a GPU that supports it in hardware, otherwise float32).
        device: Device on which the dtype is used.

    Raises:
        UserError: The dtype is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_fast_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise UserError(f"unknown dtype {name!r}{suggest(name, _DTYPES)}: use {', '.join(_DTYPES)} or auto")
    return _DTYPES[name]


def describe_hardware(device: torch.device) -> str:
    """Return a one-line description of ``device`` for reports, such as ``cpu: Intel Xeon, 2 threads``."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{device.type}: {name}, {torch.get_num_threads()} threads"


def matmul_speed(device: torch.device) -> float:
    """Measure the speed at which ``device`` multiplies float32 matrices, in FLOPs per second.

    The fastest of three products of square matrices counts, of size 1,024 on a CPU and 4,096 on other devices. A
    multiply-add counts as two FLOPs.
    """
    side = 1024 if device.type == "cpu" else 4096
    a = torch.ones(side, side, device=device)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
