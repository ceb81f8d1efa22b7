"""Elementwise bijections whose parameters come in through ports: the couplings, but for ``add``.

What makes the parameters is ordinary dataflow: any sub-block, attention included, that reads the other half of a split over
channels (``split``) or over the sequence (``split_sequence``).

Axes: b batch, l length, d width of what is changed, k bins of a spline.
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

from ._bijection import keep, summed, wide

Positive = Annotated[float, pydantic.Field(gt=0)]


class Affine(Component, kind="mixer"):
    """``x * exp(clamp * tanh(s / clamp)) + t`` (RealNVP, arXiv 1605.08803, equation 7), the log-scale bounded by ``clamp``.

    Undoing it makes an error at most ``exp(clamp)`` times larger.
    """

    class Config(ComponentConfig):
        clamp: Annotated[float, pydantic.Field(gt=0, le=80)] = 2.0
        """exp(80) is about the largest factor that float32 holds."""

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        clamp: float = config.clamp  # type: ignore[attr-defined]
        bounds = {("x", "out"): math.exp(clamp), ("t", "out"): 1.0}
        return dataclasses.replace(super().algebra(config, signature), lipschitz=bounds)

    def _log_scale(self, s: Tensor, x: Tensor, sign: int = 1) -> Tensor:
        clamp: float = self.config.clamp
        return sign * clamp * torch.tanh(s.to(x.dtype) / clamp)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        s: Float[Tensor, "b l d"],
        t: Float[Tensor, "b l d"],
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        return keep(x, torch.addcmul(t, x, self._log_scale(s, x).exp()), attend)

    @solves("x", given=("out", "s", "t", "attend"), log_det="log_det")
    def undo(self, out: Tensor, s: Tensor, t: Tensor, attend: Tensor | None) -> Tensor:
        return keep(out, (out - t) * self._log_scale(s, out, -1).exp(), attend)

    def log_det(self, x: Tensor, s: Tensor, t: Tensor, attend: Tensor | None = None) -> Tensor:
        return summed(self._log_scale(s, wide(x)), attend)

    def with_log_det(
        self, method: str, x: Tensor, s: Tensor, t: Tensor, attend: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log = self._log_scale(s, wide(x))
        return keep(x, torch.addcmul(t, x, log.exp().to(x.dtype)), attend), summed(log, attend)


class _Bins(NamedTuple):
    """The bin that a value falls in: left edge, width, lower edge, height, and the slopes at both ends."""

    left: Tensor
    width: Tensor
    low: Tensor
    height: Tensor
    first: Tensor
    last: Tensor


class _Place(NamedTuple):
    """A value's bin, that bin's mean slope, where in it the value lies (0 to 1) as xi, and xi (1 - xi); ``below`` is what
    equations 4 and 5 of arXiv 1906.04032 divide by."""

    bin: _Bins
    slope: Tensor
    place: Tensor
    mixed: Tensor
    below: Tensor


class Spline(Component, kind="mixer"):
    """A monotone rational-quadratic spline per number, the identity beyond ``bound`` (Neural Spline Flows, arXiv 1906.04032).

    ``params`` holds, for each channel, ``bins`` raw widths, ``bins`` raw heights (softmax makes them shares of
    2 * ``bound``) and ``bins - 1`` raw slopes (softplus, shifted so that zero is slope one): all zero is the identity.
    Section 3.1 has the formulas; undoing solves a quadratic.
    """

    class Config(ComponentConfig):
        bins: SizeField = 8
        bound: Positive = 3.0
        smallest: Annotated[float, pydantic.Field(gt=0, lt=0.5)] = 1e-3
        """The smallest slope at a knot, and the smallest width and height of a bin as a share of an even one's. (Between two
        steep knots a low bin can be flatter than that: undoing an error grows by one over the slope.)"""

        @pydantic.field_validator("bins")
        @classmethod
        def _enough(cls, bins: int) -> int:
            if bins < 2:
                raise ValueError("a spline needs at least 2 bins")
            return bins

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        params: Float[Tensor, "b l d*(3*bins-1)"],
        attend: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        return self._forward(x, self._place(x, params), attend)

    @solves("x", given=("out", "params", "attend"), log_det="log_det")
    def undo(self, out: Tensor, params: Tensor, attend: Tensor | None) -> Tensor:
        bound = self.config.bound
        inside = out.abs() < bound
        at = self._bin(out.clamp(-bound, bound), params, vertical=True)
        above = out.clamp(-bound, bound) - at.low
        slope = at.height / at.width
        bend = above * (at.first + at.last - 2 * slope)
        a = at.height * (slope - at.first) + bend
        b = at.height * at.first - bend
        c = -slope * above
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        x = at.left + at.width * 2 * c / (-b - root)
        return keep(out, torch.where(inside, x, out), attend)

    def log_det(self, x: Tensor, params: Tensor, attend: Tensor | None = None) -> Tensor:
        return self._log_det(x, self._place(wide(x), params), attend)

    def with_log_det(
        self, method: str, x: Tensor, params: Tensor, attend: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found = self._place(wide(x), params)
        return self._forward(x, found, attend), self._log_det(x, found, attend)

    def _place(self, x: Tensor, params: Tensor) -> _Place:
        bound = self.config.bound
        at = self._bin(x.clamp(-bound, bound), params, vertical=False)
        place = (x.clamp(-bound, bound) - at.left) / at.width
        mixed = place * (1 - place)
        slope = at.height / at.width
        return _Place(at, slope, place, mixed, slope + (at.first + at.last - 2 * slope) * mixed)

    def _forward(self, x: Tensor, found: _Place, attend: Tensor | None) -> Tensor:
        at = found.bin
        top = found.slope * found.place.square() + at.first * found.mixed
        y = (at.low + at.height * top / found.below).to(x.dtype)
        return keep(x, torch.where(x.abs() < self.config.bound, y, x), attend)

    def _log_det(self, x: Tensor, found: _Place, attend: Tensor | None) -> Tensor:
        at = found.bin
        top = at.last * found.place.square() + 2 * found.slope * found.mixed + at.first * (1 - found.place).square()
        log = 2 * found.slope.log() + top.log() - 2 * found.below.log()
        return summed(torch.where(x.abs() < self.config.bound, log, 0.0), attend)

    def _bin(self, at: Tensor, params: Tensor, *, vertical: bool) -> _Bins:
        """The bin of each number of ``at`` [b, l, d], looked up along the heights where ``vertical``, else the widths."""
        bins, bound, least = self.config.bins, self.config.bound, self.config.smallest
        raw = params.to(at.dtype).unflatten(-1, (at.shape[-1], 3 * bins - 1))
        wide_, high, slopes = raw.split([bins, bins, bins - 1], dim=-1)

        def edges(raw_sizes: Tensor) -> tuple[Tensor, Tensor]:
            sizes = (least / bins + (1 - least) * raw_sizes.softmax(-1)) * (2 * bound)
            return F.pad(sizes.cumsum(-1)[..., :-1], (1, 0)) - bound, sizes

        x, w = edges(wide_)
        y, h = edges(high)
        index = (at[..., None] >= (y if vertical else x)[..., 1:]).sum(-1, keepdim=True)
        # softplus(log(e^(1 - least) - 1)) = 1 - least
        inner = least + F.softplus(slopes + math.log(math.expm1(1 - least)))
        ends = F.pad(inner, (1, 1), value=1.0)
        found = [v.gather(-1, index).squeeze(-1) for v in (x, w, y, h)]
        return _Bins(*found, *(ends.gather(-1, index + i).squeeze(-1) for i in (0, 1)))
