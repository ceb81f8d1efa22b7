"""Orthogonal maps of the channels or of the sequence: they keep lengths, undo by their transpose, and change no volume.

Learned ones start as the identity (Householder: with an even number of reflections). They are applied in the precision of
``x`` whatever autocast says. Axes: b batch, l length, d width, n reflections.
"""

import math
from typing import Annotated, Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import ComponentConfig, Context, solves
from sedd_graph.diffusion.numerics import full_precision

from ..network.attention import rotate
from ._bijection import Isometry, keep, through, wide


class Orthogonal(Isometry, kind="mixer"):
    """A learned orthogonal matrix Q over the channels: ``x @ Q``.

    ``householder``: a product of ``reflections`` reflections (arXiv 1611.09630), as one product of low rank;
    ``cayley``: (I + A)^-1 (I - A) with A skew (arXiv 1707.09520); ``matrix_exp``: exp(A) (arXiv 1901.08428).
    Cayley and matrix exponential cost O(d^3) a step, beside O(b l d^2) for the product.
    """

    class Config(ComponentConfig):
        kind: Literal["householder", "cayley", "matrix_exp"] = "householder"
        reflections: Annotated[int, pydantic.Field(gt=0, le=4096)] = 8
        """How many reflections ``householder`` takes."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width, count = self.axis("d"), self.config.reflections
        if self.config.kind == "householder":
            pairs = torch.empty((count + 1) // 2, 1, width).normal_()
            self.weight = nn.Parameter(pairs.expand(-1, 2, -1).reshape(-1, width)[:count].clone())
        else:
            self.weight = nn.Parameter(torch.zeros(width, width))

    def _apply_to(self, x: Tensor, *, transposed: bool) -> Tensor:
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
            if self.config.kind == "matrix_exp":
                matrix = torch.matrix_exp(-skew if transposed else skew)
            else:
                eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
                skew = -skew if transposed else skew
                matrix = torch.linalg.solve(eye + skew, eye - skew)
            return through(x, matrix)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self._apply_to(x, transposed=False)

    @solves("x", given=("out",), log_det="zero")
    def undo(self, out: Tensor) -> Tensor:
        return self._apply_to(out, transposed=True)


class Hadamard(Isometry, kind="mixer"):
    """The Walsh-Hadamard transform of the channels, normalised; its own inverse. The width is a power of two.

    H(d) is the Kronecker product of two of about the square root's size (Sylvester), so it takes two small products.
    """

    class Config(ComponentConfig):
        pass

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
        parts = through(x.unflatten(-1, (rows, width // rows)), self._signs(width // rows, x))
        parts = through(parts.transpose(-1, -2), self._signs(rows, x)).transpose(-1, -2)
        return parts.flatten(-2) * (1 / math.sqrt(width))

    @solves("x", given=("out",), log_det="zero")
    def undo(self, out: Tensor) -> Tensor:
        return self.forward(out)


class DCT(Isometry, kind="mixer"):
    """The orthonormal discrete cosine transform (DCT-II; Ahmed, Natarajan and Rao 1974) over the channels or the sequence.

    Over the sequence it mixes as FNet does (arXiv 2105.03824). With ``attend`` each row's attended positions are
    transformed as a sequence of their own length.
    """

    class Config(ComponentConfig):
        over: Literal["channels", "sequence"] = "channels"

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._transform(x, attend, inverse=False)

    @solves("x", given=("out", "attend"), log_det="zero")
    def undo(self, out: Tensor, attend: Tensor | None) -> Tensor:
        return self._transform(out, attend, inverse=True)

    def _transform(self, x: Tensor, attend: Tensor | None, *, inverse: bool) -> Tensor:
        if self.config.over == "channels":
            count = torch.full((), x.shape[-1], device=x.device)
            matrix = _cosines(torch.arange(x.shape[-1], device=x.device), count, x)
            return keep(x, through(x, matrix if inverse else matrix.T), attend)
        if attend is None:
            count = torch.full((), x.shape[1], device=x.device)
            matrix = _cosines(torch.arange(x.shape[1], device=x.device), count, x)
        else:
            matrix = _cosines(attend.cumsum(1) - 1, attend.sum(1).clamp(min=1), x)
        with full_precision(x):
            if attend is None:
                return (matrix.T if inverse else matrix) @ x
            seen = torch.where(
                attend[..., None], x, 0.0
            )  # so that a row of the matrix outside the sequence adds nothing
            return keep(x, (matrix.mT if inverse else matrix) @ seen, attend)


def _cosines(index: Tensor, count: Tensor, like: Tensor) -> Tensor:
    """The DCT-II matrix C[k, m] = sqrt(2/n) cos(pi (2 m + 1) k / 2n), its first row over sqrt 2, at ranks ``index`` [..., n].

    The angle is reduced in integers, so the cosines are right to the last digit at any length.
    """
    k, m = index[..., :, None], index[..., None, :]
    n = count[..., None, None]
    size = n.to(wide(like).dtype)
    angle = ((2 * m + 1) * k % (4 * n)) / size * (math.pi / 2)
    return (angle.cos() * (torch.where(k == 0, 1, 2) / size).sqrt()).to(like.dtype)


class RotaryMix(Isometry, kind="mixer"):
    """Turns pairs of channels, the first half of them against the second (RoFormer's rotation, arXiv 2104.09864).

    By learned angles, or by those of a ``rotary`` node of the same width where ``angles`` is connected.
    """

    class Config(ComponentConfig):
        pass

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
        return self._turn(x, angles, 1.0)

    @solves("x", given=("out", "angles"), log_det="zero")
    def undo(self, out: Tensor, angles: Tensor | None) -> Tensor:
        return self._turn(out, angles, -1.0)

    def _turn(self, x: Tensor, angles: Tensor | None, sign: float) -> Tensor:
        if angles is None:
            angle = self.angle.to(x.dtype)
            cos, sin = angle.cos(), angle.sin()
        else:
            # a float32 cosine and sine are off the unit circle by 6e-8, which float64 would see
            cos, sin = angles[:, :, : x.shape[-1] // 2].to(x.dtype)
            norm = torch.hypot(cos, sin)
            cos, sin = cos / norm, sin / norm
        return rotate(x, torch.stack([torch.cat([cos, cos], -1), sign * torch.cat([sin, sin], -1)]))
