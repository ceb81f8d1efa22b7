"""Sources of data points for continuous models: two densities in the plane, and ``.npy`` files.

The module does not import torch.
"""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.sources import MAX_BYTES, Numbers, PointSource
from sedd_graph.errors import UserError
from sedd_graph.inputs.arrays import read_npy
from sedd_graph.inputs.confine import confined

Deviation = Annotated[float, pydantic.Field(gt=0, le=10)]


class Drawn(ComponentConfig):
    """Config keys of sources that draw points from a known density."""

    count: Annotated[int, pydantic.Field(ge=2, le=10_000_000)] = 20_000
    """Number of points to draw, held-out points included, from 2 to 10,000,000."""


class TwoMoons(PointSource, kind="points"):
    """Two moons: points on two interleaved half circles of radius 1, with Gaussian noise; float32 [count, 2]."""

    class Config(Drawn):
        noise: Deviation = 0.1
        """Standard deviation of the noise added to each coordinate, above 0 and at most 10."""

    config: Config

    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        count, noise = self.config.count, self.config.noise
        angle = generator.uniform(0, math.pi, count)
        upper = generator.integers(0, 2, count) == 0
        x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
        y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
        return (np.stack([x, y], 1) + generator.normal(0, noise, (count, 2))).astype(np.float32)


class EightGaussians(PointSource, kind="points"):
    """Eight Gaussians: points of a uniform mixture with means on a circle of radius 2, float32 [count, 2]."""

    class Config(Drawn):
        noise: Deviation = 0.2
        """Standard deviation of each Gaussian in each coordinate, above 0 and at most 10."""

    config: Config

    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        angle = generator.integers(0, 8, self.config.count) * (math.pi / 4)
        centres = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
        return (centres + generator.normal(0, self.config.noise, centres.shape)).astype(np.float32)


class ArrayFile(PointSource, kind="points"):
    """Points of a ``.npy`` file: a numeric array [points, ...] of at least two axes and two points, read as float32."""

    class Config(ComponentConfig):
        path: Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
        """Path of the ``.npy`` file, relative to the blueprint's folder."""

    config: Config

    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        path = confined(self.config.path, root, what="data.points.path")
        try:
            x = read_npy(path, limit=MAX_BYTES)
        except UserError as error:
            raise UserError(f"data.points.path: {error}") from None
        if x.ndim < 2 or len(x) < 2 or not x.size:
            raise UserError(f"data.points.path: {self.config.path} must hold numbers [row, ...], two rows or more")
        with np.errstate(over="ignore"):  # found below
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"data.points.path: {self.config.path} has numbers that are not finite")
        return x
