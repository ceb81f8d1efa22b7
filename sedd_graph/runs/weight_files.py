"""Reading of downloaded weights, which are untrusted: safetensors, GGUF, or torch files with ``weights_only=True``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.errors import UserError
from sedd_graph.inputs.files import read_json, require_file
from sedd_graph.runs.gguf_files import gguf_weights

__all__ = ["files_of_weights", "read_tensors"]

MAX_BYTES = 64 * 2**30
INDEX = "model.safetensors.index.json"
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "checkpoint.pth")
_CONTAINERS = ("model", "ema", "state_dict", "weights", "backbone")


def files_of_weights(path: Path) -> list[Path]:
    """Return the files that hold the weights of a path.

    Args:
        path: A safetensors, GGUF or torch file, or a folder as downloaded from a model hub.

    Raises:
        UserError: The path does not exist, or is a folder without weights, or with several GGUF files.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        return [path]
    if (path / INDEX).is_file():
        return _parts(path / INDEX)
    if (file := next((path / name for name in _FILES if (path / name).is_file()), None)) is not None:
        return [file]
    several = sorted(path.glob("*.gguf"))
    if not several:
        raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin nor a GGUF file")
    if len(several) > 1:
        raise UserError(f"{path} has several GGUF files; name one of them: {', '.join(p.name for p in several[:8])}")
    return several


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file of weights by name.

    Args:
        path: A safetensors, GGUF or torch file, or a folder as downloaded from a model hub.

    Returns:
        Tensors on the CPU by name. If a torch file holds its tensors in a nested dictionary, the keys that lead to it
        are prefixed to their names (``state_dict.``).

    Raises:
        UserError: The file does not exist, is larger than 64 GiB, or does not contain named tensors.
    """
    return {name: tensor for file in files_of_weights(path) for name, tensor in _read(file).items()}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".gguf":
        return gguf_weights(path)
    require_file(path, limit=MAX_BYTES)
    if path.suffix != ".safetensors":
        return _read_torch(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def _parts(index: Path) -> list[Path]:
    """Return the files that an index of safetensors files names, all in its folder."""
    data = read_json(index)
    try:
        names = sorted(set(data["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of safetensors files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names a file outside its folder: {name!r}")
    return [index.parent / name for name in names]


def _read_torch(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch file, which may lie in nested containers such as ``state_dict``."""
    try:
        data: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many classes for such files, and advises to load them all the same
        raise UserError(f"{path} cannot be read as plain weights, and nothing else is loaded from a file") from None
    prefix = ""
    while isinstance(data, dict) and not any(isinstance(value, Tensor) for value in data.values()):
        name = next((name for name in _CONTAINERS if isinstance(data.get(name), dict)), None)
        if name is None:
            raise UserError(f"{path} holds no tensors under {', '.join(_CONTAINERS)}")
        prefix, data = f"{prefix}{name}.", data[name]
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no named tensors")
    return {f"{prefix}{name}": value for name, value in data.items() if isinstance(value, Tensor)}
