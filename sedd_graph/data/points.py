"""Data set of real-valued points for training a flow. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_graph.data.config import PointsConfig
from sedd_graph.data.order import Ordered, Units
from sedd_graph.data.sources import Numbers
from sedd_graph.errors import UserError

__all__ = ["PointData", "Points", "open_points"]


@dataclasses.dataclass(frozen=True)
class Points:
    """Batch of points."""

    x: Numbers
    """The points, float32 [b, ...]; the other axes are those of the network's input."""


@dataclasses.dataclass
class _Array:
    x: Numbers
    phases: int = 1
    many: bool = False

    @property
    def count(self) -> int:
        return len(self.x)

    def take(self, index: npt.NDArray[np.int64], phase: int) -> Points:
        return Points(self.x[index])


@dataclasses.dataclass
class PointData(Ordered[Points]):
    """Data set of points, divided into training and held-out points."""

    config: PointsConfig
    train: _Array
    heldout: _Array
    tokenizer = None

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of the SHA-256 of all points, training and held-out."""
        found = hashlib.sha256(f"{self.train.x.shape} {self.heldout.x.shape};".encode())
        for part in (self.train, self.heldout):
            found.update(np.ascontiguousarray(part.x).tobytes())
        return found.hexdigest()[:16]

    def describe(self) -> str:
        """Return one line of text for the user: the numbers of rows and of dimensions."""
        sizes = f"{self.train.count:,} training rows and {self.heldout.count:,} held-out rows"
        return f"{sizes} of {self.width} dimensions"

    def record(self) -> dict[str, object]:
        """Return the description of the data that is saved with the results of an evaluation, as JSON values by key.

        The keys are ``corpus``, the :meth:`fingerprint`, and ``length``, the number of coordinates of a point.
        """
        return {"corpus": self.fingerprint(), "length": self.width}

    def baselines(self) -> dict[str, float]:
        """Return an empty dictionary, since real-valued points have no unigram baseline."""
        return {}

    @property
    def units(self) -> Units:
        """Units in which the loss is reported: nats per dimension and bits per dimension, so that their ratio is 1."""
        return Units("dimension", "dimension", 1.0)

    @property
    def width(self) -> int:
        """Number of coordinates of a point."""
        return math.prod(self.train.x.shape[1:])


def open_points(config: PointsConfig, *, root: Path, shape: tuple[int, ...]) -> PointData:
    """Draw or read the points of a ``data`` section, and split them into training and held-out points.

    Args:
        config: The ``data`` section.
        root: Folder to which file names in the blueprint are relative.
        shape: Shape of one point at the network's input, without the batch axis.

    Raises:
        UserError: The points do not have as many coordinates as ``shape``, or a file cannot be read.
    """
    x = config.points.points(root, np.random.Generator(np.random.Philox(key=[config.seed, 2**32])))
    width = math.prod(x.shape[1:])
    if width != math.prod(shape):
        raise UserError(f"data.points has {width} numbers a row; the graph's input takes {' x '.join(map(str, shape))}")
    cut = min(len(x) - 1, max(1, round(len(x) * (1 - config.holdout))))
    x = x.reshape(len(x), *shape)
    return PointData(config, _Array(x[:cut]), _Array(x[cut:]))
