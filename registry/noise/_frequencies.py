"""Token frequencies from a blueprint or a file, and reading of ``.npy`` files. Axes: m data tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.errors import UserError
from sedd_graph.inputs.arrays import read_npy
from sedd_graph.inputs.confine import outside_allowed
from sedd_graph.inputs.files import require_file

MAX_BYTES = 64 * 2**20

Count = Annotated[float, pydantic.Field(ge=0, lt=1e18)]


class FrequencyConfig(ComponentConfig):
    """Config keys of components that depend on the frequencies of the data tokens."""

    frequencies: Literal["zipf"] | Annotated[tuple[Count, ...], pydantic.Field(min_length=2, max_length=2**16)] = "zipf"
    """Frequencies of the data tokens up to a common factor, at least 0, one per token; or ``zipf``: 1 / (id + 1), for a
    vocabulary sorted by frequency."""
    file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
    """A ``.npy`` file of token counts, one axis, in place of ``frequencies``; below the working directory, up to 64
    MiB."""
    smoothing: Annotated[float, pydantic.Field(ge=1e-6, le=1)] = 1e-2
    """Weight of the uniform distribution in the frequencies, from 1e-6 to 1, so that no token has frequency 0."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> FrequencyConfig:
        if self.file is not None and self.frequencies != "zipf":
            raise ValueError("give one of 'frequencies' and 'file'")
        if self.frequencies != "zipf" and sum(self.frequencies) <= 0:
            raise ValueError("frequencies: all are 0; give the count of at least one token")
        return self


def local_file(file: str, limit: int) -> Path:
    """Resolve the path of a file that a blueprint names, and verify its location and size.

    Args:
        file: Path, absolute or relative to the working directory.
        limit: Largest accepted size in bytes.

    Returns:
        The absolute path.

    Raises:
        UserError: The file is not below the working directory (without
            :func:`~sedd_graph.inputs.confine.allow_outside`), cannot be read, is no regular file, or is too large.
    """
    try:
        path = Path(os.path.realpath(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file[:200]!r} cannot be read: {error}") from None
    if not path.is_relative_to(os.path.realpath(Path.cwd())) and not outside_allowed():
        raise UserError(f"{file} is not below the working directory; copy it there, or allow it with --allow-outside")
    require_file(path, limit=limit)
    return path


def load_numbers(file: str, dims: int, *, limit: int = MAX_BYTES) -> np.ndarray:
    """Read an array of finite numbers from a ``.npy`` file.

    Args:
        file: Path below the working directory.
        dims: Number of axes that the array must have.
        limit: Largest accepted size of the file in bytes.

    Returns:
        The array, float64.

    Raises:
        UserError: The file is not below the working directory, too large or unreadable, its array has another number of
            axes or is not numeric, or some values are not finite.
    """
    values = read_npy(local_file(file, limit), limit=limit)
    if values.ndim != dims:
        raise UserError(f"{file} must hold one array of numbers with {dims} axes")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{file} has values that are not finite")
    return values


def token_frequencies(config: FrequencyConfig, tokens: int) -> Tensor:
    """Return the smoothed frequencies of the data tokens.

    Args:
        config: Frequencies, or their file, and smoothing.
        tokens: Number of data tokens m.

    Returns:
        Frequencies, float64 [m], positive and of sum 1.

    Raises:
        UserError: The file is unreadable or has negative counts, or the number of entries is not ``tokens``.
    """
    if config.file is not None:
        counts = torch.from_numpy(load_numbers(config.file, 1))
        if bool((counts < 0).any()) or float(counts.sum()) <= 0:
            raise UserError(f"{config.file} must hold counts: none negative, not all 0")
    elif config.frequencies == "zipf":
        counts = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    else:
        counts = torch.tensor(config.frequencies, dtype=torch.float64)
    if len(counts) != tokens:
        raise UserError(
            f"{config.file or 'frequencies'} has {len(counts)} entries, but the model has {tokens} data tokens"
        )
    return (1 - config.smoothing) * counts / counts.sum() + config.smoothing / tokens


def thinned(config: ComponentConfig, tokens: int) -> FrequencyConfig:
    """Return a copy of ``config`` for a smaller vocabulary of ``tokens`` data tokens, for numerical verification.

    The new frequencies are evenly spaced quantiles of those in ``config``, from the highest to the lowest; ``zipf`` is
    left unchanged.

    Raises:
        UserError: The file of frequencies is unreadable.
    """
    config = FrequencyConfig.model_validate(config)
    if config.frequencies == "zipf" and config.file is None:
        return config
    counts = load_numbers(config.file, 1) if config.file is not None else np.asarray(config.frequencies)
    chosen = np.quantile(counts, np.linspace(1, 0, tokens), method="nearest")
    return config.model_copy(update={"file": None, "frequencies": tuple(float(c) for c in chosen)})
