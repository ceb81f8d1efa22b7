"""Weights that a run starts from: a run folder, an export, a folder of another library, or a file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK
from sedd_graph.runs.gguf_files import gguf_tokenizer
from sedd_graph.runs.import_mapped import exported_weights
from sedd_graph.runs.open import WEIGHTS, open_run
from sedd_graph.runs.plain.folder import OWN_TOKENIZER
from sedd_graph.runs.weight_files import files_of_weights, read_tensors
from sedd_graph.store.manifest import read_manifest
from sedd_graph.training.adapters import merge
from sedd_graph.training.checkpoint import file_name, files_of

__all__ = ["WeightSource", "open_source"]


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Weights by name, with the tokenizer under which their token ids have a meaning.

    Attributes:
        path: The folder or file.
        kind: ``run``, ``export`` or ``weights``.
        tensors: Tensors on the CPU by name; of a run and an export by our names, with merged adapters.
        tokenizer: The tokenizer; None if there is none beside the weights.
        sha256: SHA-256 of each file of weights by its name, hexadecimal.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    sha256: Mapping[str, str]


def open_source(path: Path) -> WeightSource:
    """Read the weights that a run starts from.

    Args:
        path: A run folder (its newest weights, averaged if the run averages them), a folder that ``sedd-graph export``
            wrote, a folder as downloaded from a model hub, or a safetensors, GGUF or torch file.

    Raises:
        UserError: The path holds no weights, or they cannot be read.
    """
    if (path / LOCK).is_file() and (path / "config.json").is_file():
        _, tensors = exported_weights(path)
        own = path / OWN_TOKENIZER
        tokenizer = load_tokenizer(own) if own.is_file() else None
        return WeightSource(path, "export", tensors, tokenizer, _digests(files_of_weights(path)))
    if (path / LOCK).is_file():
        return _run(path)
    files = files_of_weights(path)
    return WeightSource(path, "weights", read_tensors(path), _tokenizer(files), _digests(files))


def _run(path: Path) -> WeightSource:
    run = open_run(path, device=torch.device("cpu"), compile="off")
    if run.weights == "fresh":
        raise UserError(f"{path} has neither checkpoints nor {WEIGHTS}: there are no weights to start from")
    merge(run.engine.model)
    label = path / run.weights
    files = [label]
    if not label.is_file():  # shards, of which the label is a pattern
        kind = label.name.partition("-")[0]
        names = files_of(read_manifest(label.parent), kind, label.parent) or [file_name(kind)]
        files = [label.parent / name for name in names]
    return WeightSource(path, "run", run.engine.model.state_dict(), run.tokenizer, _digests(files, root=path))


def _tokenizer(files: Sequence[Path]) -> Tokenizer | None:
    """Return the tokenizer beside files of weights."""
    beside = files[0].with_name(TOKENIZER)
    if beside.is_file():
        return load_tokenizer(beside)
    if files[0].suffix == ".gguf":
        return parse_tokenizer(gguf_tokenizer(files[0]), where=str(files[0]))
    return None


def _digests(files: Sequence[Path], root: Path | None = None) -> dict[str, str]:
    found = {}
    for file in files:
        with file.open("rb") as stream:
            name = file.name if root is None else file.relative_to(root).as_posix()
            found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
