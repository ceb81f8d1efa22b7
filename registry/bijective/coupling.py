"""Coupling layers of flows, affine and spline: elementwise bijections of one half of a value.

Their scales, shifts and spline parameters are inputs, which any subgraph, attention included, computes from the other
half of a split over channels (``split``) or over the sequence (``split_sequence``). Additive coupling is the component
``add``.

Axes: b batch, l length, d width of the transformed half, k bins of a spline.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, solves
from sedd_graph.component.contract import Algebra, Signature, SizeField

from ..network._shared import Positive
from ._bijection import sum_attended, where_attended, wide


class Affine(Component, kind="mixer"):
    """Affine coupling ``x * exp(clamp * tanh(s / clamp)) + t`` (RealNVP, arXiv 1605.08803, equation 7).

    The inputs ``s`` (log-scale, bounded by ``clamp``) and ``t`` (shift) have the shape of the transformed half ``x``.
    """

    class Config(ComponentConfig):
        clamp: Annotated[float, pydantic.Field(gt=0, le=80)] = 2.0
        """Maximum absolute log-scale, nats. The inverse amplifies errors by at most exp(clamp); exp(80) is near the
        largest float32."""

    config: Config

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        bounds = {("x", "out"): math.exp(config.clamp), ("t", "out"): 1.0}
        return dataclasses.replace(super().algebra(config, signature), lipschitz=bounds)

    def _log_scale(self, s: Tensor, x: Tensor, sign: int = 1) -> Tensor:
        clamp = self.config.clamp
        return sign * clamp * torch.tanh(s.to(x.dtype) / clamp)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        s: Float[Tensor, "b l d"],
        t: Float[Tensor, "b l d"],
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Scale and shift ``x`` elementwise.

        Args:
            x: Half to transform, [b, l, d].
            s: Log-scales before clamping, [b, l, d], nats.
            t: Shifts, [b, l, d].
            attend: False at positions to leave unchanged, [b, l].

        Returns:
            The transformed half, [b, l, d].
        """
        return where_attended(attend, torch.addcmul(t, x, self._log_scale(s, x).exp()), x)

    @solves("x", given=("out", "s", "t", "attend"), log_det="log_det")
    def inverse(self, out: Tensor, s: Tensor, t: Tensor, attend: Tensor | None) -> Tensor:
        return where_attended(attend, (out - t) * self._log_scale(s, out, -1).exp(), out)

    def log_det(self, x: Tensor, s: Tensor, t: Tensor, attend: Tensor | None = None) -> Tensor:
        return sum_attended(self._log_scale(s, wide(x)), attend)

    def with_log_det(
        self, method: str, x: Tensor, s: Tensor, t: Tensor, attend: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log = self._log_scale(s, wide(x))
        return where_attended(attend, torch.addcmul(t, x, log.exp().to(x.dtype)), x), sum_attended(log, attend)


class _Bin(NamedTuple):
    """The spline bin that contains each value; all tensors have shape [b, l, d].

    ``left`` and ``width`` are along x, ``low`` and ``height`` along y; ``slope`` is height / width; ``first`` and
    ``last`` are the derivatives at the left and right knot.
    """

    left: Tensor
    width: Tensor
    low: Tensor
    height: Tensor
    slope: Tensor
    first: Tensor
    last: Tensor


class _Point(NamedTuple):
    """Position of each value within its bin; all tensors have shape [b, l, d].

    ``xi`` is the relative position, 0 to 1; ``mixed`` is xi (1 - xi); ``below`` is the denominator of equations 4 and 5
    of arXiv 1906.04032.
    """

    bin: _Bin
    xi: Tensor
    mixed: Tensor
    below: Tensor


class Spline(Component, kind="mixer"):
    """Elementwise monotone rational-quadratic spline, identity outside [-bound, bound] (arXiv 1906.04032, section 3.1).

    ``params`` [b, l, d * (3 * bins - 1)] contains for each channel ``bins`` unnormalised widths and ``bins``
    unnormalised heights, to which softmax is applied so that each sums to 2 * bound, and ``bins - 1`` unnormalised
    derivatives at the inner knots, to which a shifted softplus is applied. With all parameters zero, the spline is the
    identity. The inverse solves a quadratic equation.
    """

    class Config(ComponentConfig):
        bins: Annotated[SizeField, pydantic.Field(ge=2)] = 8
        """Number of bins, at least 2."""
        bound: Positive = 3.0
        """The spline acts on the interval [-bound, bound]."""
        smallest: Annotated[float, pydantic.Field(gt=0, lt=0.5)] = 1e-3
        """Minimum derivative at a knot, and minimum width and height of a bin relative to those of equal bins. Inside a
        bin the derivative can be smaller; the inverse amplifies errors by 1 / derivative."""

    config: Config

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        params: Float[Tensor, "b l d*(3*bins-1)"],
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        return self._value(x, self._point(x, params), attend)

    @solves("x", given=("out", "params", "attend"), log_det="log_det")
    def inverse(self, out: Tensor, params: Tensor, attend: Tensor | None) -> Tensor:
        clamped = out.clamp(-self.config.bound, self.config.bound)
        at = self._bin(clamped, params, vertical=True)
        above = clamped - at.low
        bend = above * (at.first + at.last - 2 * at.slope)
        a = at.height * (at.slope - at.first) + bend
        b = at.height * at.first - bend
        c = -at.slope * above
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        x = at.left + at.width * 2 * c / (-b - root)
        return where_attended(attend, torch.where(out.abs() < self.config.bound, x, out), out)

    def log_det(self, x: Tensor, params: Tensor, attend: Tensor | None = None) -> Tensor:
        return self._log_det(x, self._point(wide(x), params), attend)

    def with_log_det(
        self, method: str, x: Tensor, params: Tensor, attend: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        point = self._point(wide(x), params)
        return self._value(x, point, attend), self._log_det(x, point, attend)

    def _point(self, x: Tensor, params: Tensor) -> _Point:
        clamped = x.clamp(-self.config.bound, self.config.bound)
        at = self._bin(clamped, params, vertical=False)
        xi = (clamped - at.left) / at.width
        mixed = xi * (1 - xi)
        return _Point(at, xi, mixed, at.slope + (at.first + at.last - 2 * at.slope) * mixed)

    def _value(self, x: Tensor, point: _Point, attend: Tensor | None) -> Tensor:
        at = point.bin
        top = at.slope * point.xi.square() + at.first * point.mixed
        y = (at.low + at.height * top / point.below).to(x.dtype)
        return where_attended(attend, torch.where(x.abs() < self.config.bound, y, x), x)

    def _log_det(self, x: Tensor, point: _Point, attend: Tensor | None) -> Tensor:
        at = point.bin
        top = at.last * point.xi.square() + 2 * at.slope * point.mixed + at.first * (1 - point.xi).square()
        log = 2 * at.slope.log() + top.log() - 2 * point.below.log()
        return sum_attended(torch.where(x.abs() < self.config.bound, log, 0.0), attend)

    def _bin(self, at: Tensor, params: Tensor, *, vertical: bool) -> _Bin:
        """Find the bin that contains each element of ``at`` [b, l, d], along y if ``vertical``, else along x."""
        bins, bound, least = self.config.bins, self.config.bound, self.config.smallest
        raw = params.to(at.dtype).unflatten(-1, (at.shape[-1], 3 * bins - 1))
        widths, heights, slopes = raw.split([bins, bins, bins - 1], dim=-1)

        def edges(raw_sizes: Tensor) -> tuple[Tensor, Tensor]:
            sizes = (least / bins + (1 - least) * raw_sizes.softmax(-1)) * (2 * bound)
            return F.pad(sizes.cumsum(-1)[..., :-1], (1, 0)) - bound, sizes

        x, w = edges(widths)
        y, h = edges(heights)
        index = (at[..., None] >= (y if vertical else x)[..., 1:]).sum(-1, keepdim=True)
        # softplus(log(e^(1 - least) - 1)) = 1 - least
        inner = least + F.softplus(slopes + math.log(math.expm1(1 - least)))
        ends = F.pad(inner, (1, 1), value=1.0)
        left, width, low, height = (v.gather(-1, index).squeeze(-1) for v in (x, w, y, h))
        first, last = (ends.gather(-1, index + i).squeeze(-1) for i in (0, 1))
        return _Bin(left, width, low, height, height / width, first, last)
