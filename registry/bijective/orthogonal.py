"""Orthogonal maps of the channels or of the sequence: isometries with inverse = transpose and log-determinant zero.

Learned maps are initialised to the identity (``householder`` only with an even number of reflections). Products are
computed in the dtype of ``x`` even under autocast. Axes: b batch, l length, d width, n reflections.
"""

import dataclasses
import math
from typing import Annotated, Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Signature
from sedd_graph.diffusion.numerics import full_precision

from ..network.attention import rotate
from ._bijection import Isometry, full_matmul, where_attended, wide


class Orthogonal(Isometry, kind="mixer"):
    """Learned orthogonal matrix Q over the channels: ``x @ Q``.

    ``cayley`` and ``matrix_exp`` cost O(d^3) per evaluation, in addition to O(b l d^2) for the product.
    """

    class Config(ComponentConfig):
        kind: Literal["householder", "cayley", "matrix_exp"] = "householder"
        """Parametrisation of Q. ``householder``: a product of reflections (arXiv 1611.09630), applied as one low-rank
        product; ``cayley``: (I + A)^-1 (I - A) with A skew-symmetric (arXiv 1707.09520); ``matrix_exp``: exp(A) (arXiv
        1901.08428)."""
        reflections: Annotated[int, pydantic.Field(gt=0, le=4096)] = 8
        """Number of reflections for ``householder``, 1 to 4096."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width, count = self.axis("d"), self.config.reflections
        if self.config.kind == "householder":
            pairs = torch.empty((count + 1) // 2, 1, width).normal_()
            self.weight = nn.Parameter(pairs.expand(-1, 2, -1).reshape(-1, width)[:count].clone())
        else:
            self.weight = nn.Parameter(torch.zeros(width, width))

    def _product(self, x: Tensor, *, transposed: bool) -> Tensor:
        with full_precision(x):
            weight = wide(self.weight.to(x.dtype))
            if self.config.kind == "householder":
                # H1 ... Hn = I - V S V^T with S^-1 = strict upper(V^T V) + I/2 (the UT form; Walker 1988)
                unit = nn.functional.normalize(weight, dim=1)
                inner = (unit @ unit.T).triu(1) + 0.5 * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
                inner = inner.T if transposed else inner
                tail: Tensor = torch.linalg.solve_triangular(inner, unit, upper=not transposed)
                rows = x.flatten(0, 1)
                return torch.addmm(rows, rows @ unit.T.to(x.dtype), tail.to(x.dtype), alpha=-1).view_as(x)
            skew = weight.triu(1) - weight.triu(1).T
            skew = -skew if transposed else skew
            if self.config.kind == "matrix_exp":
                return full_matmul(x, torch.matrix_exp(skew))
            eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
            return full_matmul(x, torch.linalg.solve(eye + skew, eye - skew))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self._product(x, transposed=False)

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return self._product(out, transposed=True)


class Hadamard(Isometry, kind="mixer"):
    """Normalised Walsh-Hadamard transform of the channels (Sylvester 1867), which is its own inverse.

    The matrix is a Kronecker product of two Hadamard matrices of size about sqrt(d), and is applied as two small
    products.

    Raises:
        ValueError: The width is not a power of two.
    """

    class Config(ComponentConfig):
        pass

    config: Config

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        found, width = super().algebra(config, signature), signature.inputs[0].type.dims[-1].size.constant
        if width is None:
            return found
        # products with two matrices of signs, m x m and n x n: an inner product of m terms rounds m times, and the
        # absolute values of a normalised matrix have the norm sqrt(m); 3 roundings of the factor
        m = 1 << (width.bit_length() - 1) // 2
        n = width // m
        return dataclasses.replace(found, rounding={("x", "out"): 1.01 * (m**1.5 + n**1.5 + 3)})

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        if width & (width - 1):
            raise ValueError(f"hadamard needs a width that is a power of two, not {width}")

    @staticmethod
    def _signs(size: int, like: Tensor) -> Tensor:
        signs = torch.ones(1, 1, dtype=like.dtype, device=like.device)
        while len(signs) < size:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return signs

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        width = x.shape[-1]
        rows = 1 << (width.bit_length() - 1) // 2
        parts = full_matmul(x.unflatten(-1, (rows, width // rows)), self._signs(width // rows, x))
        parts = full_matmul(parts.transpose(-1, -2), self._signs(rows, x)).transpose(-1, -2)
        return parts.flatten(-2) * (1 / math.sqrt(width))

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return self.forward(out)


class DCT(Isometry, kind="mixer"):
    """Orthonormal discrete cosine transform (DCT-II; Ahmed, Natarajan and Rao 1974) over the channels or the sequence.

    If ``attend`` is connected, a transform over the sequence treats the attended positions of each row as a sequence
    whose length is their number, and leaves the other positions unchanged.
    """

    class Config(ComponentConfig):
        over: Literal["channels", "sequence"] = "channels"
        """Axis to transform: ``channels``, or ``sequence``, which mixes tokens as in FNet (arXiv 2105.03824)."""

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._transform(x, attend, inverse=False)

    @solves("x", given=("out", "attend"), log_det="zero")
    def inverse(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self._transform(out, attend, inverse=True)

    def _transform(self, x: Tensor, attend: Tensor | None, *, inverse: bool) -> Tensor:
        if self.config.over == "channels":
            matrix = _cosines(x, 2, None)
            return where_attended(attend, full_matmul(x, matrix if inverse else matrix.T), x)
        matrix = _cosines(x, 1, attend)
        # columns of the matrix outside the sequence meet zeros
        seen = x if attend is None else torch.where(attend[..., None], x, 0.0)
        with full_precision(x):
            return where_attended(attend, (matrix.mT if inverse else matrix) @ seen, x)


def _cosines(x: Tensor, dim: int, attend: Tensor | None) -> Tensor:
    """Return the DCT-II matrix C[k, m] = sqrt(2/n) cos(pi (2 m + 1) k / 2n), the row k = 0 divided by sqrt(2).

    Without ``attend``, n is the size of dimension ``dim`` of ``x``, and the shape is [n, n]. With ``attend`` [b, l],
    n is each row's number of attended positions, k and m are ranks among them, and the shape is [b, l, l]. The angle is
    reduced in integers, so that the cosines are accurate to rounding at any length.
    """
    if attend is None:
        index = torch.arange(x.shape[dim], device=x.device)
        count = torch.full((), x.shape[dim], device=x.device)
    else:
        index, count = attend.cumsum(1) - 1, attend.sum(1).clamp(min=1)
    k, m = index[..., :, None], index[..., None, :]
    n = count[..., None, None]
    size = n.to(wide(x).dtype)
    angle = ((2 * m + 1) * k % (4 * n)) / size * (math.pi / 2)
    return (angle.cos() * (torch.where(k == 0, 1, 2) / size).sqrt()).to(x.dtype)


class RotaryMix(Isometry, kind="mixer"):
    """Rotation of pairs of channels, channel i with channel i + d/2 (RoFormer, arXiv 2104.09864).

    The angle of each pair is learned and the same at all positions. If the input ``angles`` is connected, the
    position-dependent angles of a ``rotary`` node with ``dim`` = d are used instead.

    Raises:
        ValueError: The width is odd.
    """

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        if width % 2:
            raise ValueError(f"rotary_mix needs an even width, not {width}")
        if "angles" not in context.connected:
            self.angle = nn.Parameter(torch.zeros(width // 2))

    def forward(
        self, x: Float[Tensor, "b l d"], angles: Float[Tensor, "2 l d"] | None = None
    ) -> Float[Tensor, "b l d"]:
        return self._rotate(x, angles, 1.0)

    @solves("x", given=("out", "angles"), log_det="zero")
    def inverse(self, out: Tensor, angles: Tensor | None) -> Tensor:
        return self._rotate(out, angles, -1.0)

    def _rotate(self, x: Tensor, angles: Tensor | None, sign: float) -> Tensor:
        if angles is None:
            angle = self.angle.to(x.dtype)
            cos, sin = angle.cos(), angle.sin()
        else:
            # float32 cosines and sines are off the unit circle by 6e-8, which would show in float64
            cos, sin = angles[:, :, : x.shape[-1] // 2].to(x.dtype)
            norm = torch.hypot(cos, sin)
            cos, sin = cos / norm, sin / norm
        return rotate(x, torch.stack([torch.cat([cos, cos], -1), sign * torch.cat([sin, sin], -1)]))
