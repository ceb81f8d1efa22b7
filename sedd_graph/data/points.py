"""Rows of real numbers for a flow: densities of the plane that are drawn, and files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_graph.data.config import ArrayFile, EightGaussians, PointsConfig, TwoMoons
from sedd_graph.data.order import Ordered, Units
from sedd_graph.errors import UserError

__all__ = ["PointData", "Points", "open_points"]

Numbers = npt.NDArray[np.float32]
MAX_BYTES = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class Points:
    """``x`` float32 [b, ...]."""

    x: Numbers


@dataclasses.dataclass
class _Array:
    x: Numbers
    phases: int = 1

    @property
    def count(self) -> int:
        return len(self.x)

    def take(self, index: npt.NDArray[np.int64], phase: int) -> Points:
        return Points(self.x[index])


@dataclasses.dataclass
class PointData(Ordered[Points]):
    """Points as rows: training rows by position, held-out rows in order."""

    config: PointsConfig
    train: _Array
    heldout: _Array

    def fingerprint(self) -> str:
        """A hash of all rows: other points, another fingerprint."""
        found = hashlib.sha256(f"{self.train.x.shape} {self.heldout.x.shape};".encode())
        for part in (self.train, self.heldout):
            found.update(np.ascontiguousarray(part.x).tobytes())
        return found.hexdigest()[:16]

    @property
    def units(self) -> Units:
        return Units("dimension", "dimension", 1.0)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return math.prod(self.train.x.shape[1:])


def open_points(config: PointsConfig, *, root: Path, shape: tuple[int, ...]) -> PointData:
    """Draw or read the points, each as ``shape``. Names of files start from ``root``.

    Raises :class:`UserError` where they have another number of coordinates, or are no finite numbers.
    """
    generator = np.random.Generator(np.random.Philox(key=[config.seed, 2**32]))
    found = config.points
    if isinstance(found, ArrayFile):
        x = _read(root / found.path)
    elif isinstance(found, TwoMoons):
        x = _two_moons(found, generator)
    else:
        x = _eight_gaussians(found, generator)
    width = math.prod(x.shape[1:])
    if width != math.prod(shape):
        raise UserError(f"data.points has {width} numbers a row; the graph's input takes {' x '.join(map(str, shape))}")
    cut = min(len(x) - 1, max(1, round(len(x) * (1 - config.holdout))))
    x = x.reshape(len(x), *shape)
    return PointData(config, _Array(x[:cut]), _Array(x[cut:]))


def _two_moons(config: TwoMoons, generator: np.random.Generator) -> Numbers:
    angle = generator.uniform(0, math.pi, config.count)
    upper = generator.integers(0, 2, config.count) == 0
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return (np.stack([x, y], 1) + generator.normal(0, config.noise, (config.count, 2))).astype(np.float32)


def _eight_gaussians(config: EightGaussians, generator: np.random.Generator) -> Numbers:
    angle = generator.integers(0, 8, config.count) * (math.pi / 4)
    centres = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (centres + generator.normal(0, config.noise, centres.shape)).astype(np.float32)


def _read(path: Path) -> Numbers:
    """Pickled arrays are refused: they could run anything."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"data.points.path: {path} has more than {MAX_BYTES >> 30} GiB")
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data.points.path: {path} is no .npy file that can be read: {error}") from None
    if not isinstance(x, np.ndarray) or x.ndim < 2 or len(x) < 2 or x.dtype.kind not in "fiu":
        raise UserError(f"data.points.path: {path} must hold numbers [row, ...], two rows or more")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise UserError(f"data.points.path: {path} holds numbers that are not finite")
    return x
