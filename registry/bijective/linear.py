"""Affine maps of the channels: to any width, and the invertible ones of a flow (PLU, ActNorm).

Axes: b batch, l length, d width.
"""

from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import SizeField
from sedd_graph.diffusion.numerics import full_precision

from ._bijection import keep, repeated, wide


class Linear(Component, kind="feedforward"):
    """An affine map to ``width`` channels. ``init: zero`` makes a coupling that it feeds start as the identity."""

    positionwise = True

    class Config(ComponentConfig):
        width: SizeField
        bias: Literal["none", "all"] = "all"
        init: Literal["default", "zero"] = "default"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = nn.Linear(self.axis("d"), self.config.width, bias=self.config.bias == "all")
        if self.config.init == "zero":
            nn.init.zeros_(self.linear.weight)
            if self.linear.bias is not None:
                nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s width"]:
        if x.dim() == 2 or x.is_contiguous():
            return self.linear(x)
        # in two dimensions: torch adds the bias in a pass of its own to a part of the channels in three
        return self.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.config.width)


class PLU(Component, kind="mixer"):
    """The invertible 1x1 convolution of Glow (arXiv 1807.03039, section 3.2): ``W = P L (U + diag(s))`` over the channels.

    P is fixed, L has ones on its diagonal; the start is a random rotation. log |det| is the sum of log |s| for each
    position. Undoing loses as many digits as the condition number of W has.
    """

    class Config(ComponentConfig):
        pass

    order: Tensor
    sign: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        rotation, _ = torch.linalg.qr(torch.empty(width, width).normal_())
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        # One matrix: L below the diagonal, U above it, log |s| on it.
        self.weight = nn.Parameter(lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log()))
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("order", p.argmax(1))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """L - 1, U + diag(s) and log |s|."""
        weight = self.weight.to(dtype)
        log = weight.diagonal()
        return weight.tril(-1), weight.triu(1) + torch.diag(self.sign.to(dtype) * log.exp()), log

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._move(x, attend, *self._factors(wide(x).dtype)[:2])

    def _move(self, x: Tensor, attend: Tensor | None, lower: Tensor, upper: Tensor) -> Tensor:
        with full_precision(x):
            matrix = torch.addmm(upper, lower, upper).index_select(0, self.order)
            return keep(x, nn.functional.linear(x, matrix.to(x.dtype)), attend)

    @solves("x", given=("out", "attend"), log_det="log_det")
    def undo(self, out: Tensor, attend: Tensor | None) -> Tensor:
        with full_precision(out):
            lower, upper, _ = self._factors(wide(out).dtype)
            # the inverse once, then a product: solving for every row would take longer
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, inverse, upper=False, unitriangular=True)
            inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
            return keep(out, out @ inverse.T.index_select(0, self.order).to(out.dtype), attend)

    def log_det(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        return repeated(self.weight.diagonal().sum(), x, attend)

    def with_log_det(self, method: str, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log = self._factors(wide(x).dtype)
        return self._move(x, attend, lower, upper), repeated(log.sum(), x, attend)


def _moved(x: Tensor, log: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
    """``(x - mean) * exp(log) + bias`` for x [..., d] in one pass over x."""
    scale = log.exp()
    return torch.addcmul(torch.addcmul(bias, mean, scale, value=-1), x, scale)


class _Moved(torch.autograd.Function):
    """:func:`_moved`, whose gradient by torch's own rules would take longer than that of two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, log, mean)
        return _moved(x, log, mean, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, log, mean = ctx.saved_tensors
        scale, over = log.exp(), tuple(range(x.dim() - 1))
        of_bias = gradient.sum(over)
        of_log = ((gradient * x).sum(over) - mean * of_bias) * scale
        return gradient * scale if ctx.needs_input_grad[0] else None, of_log, None, of_bias


class ActNorm(Component, kind="norm"):
    """A scale and a bias for each channel (Glow, arXiv 1807.03039, section 3.1), started from the first training batch.

    That batch's mean and deviation (over attended positions) go into buffers, so that the channels leave with mean 0 and
    deviation 1; the learned part starts as nothing. Buffers, because processes that train together take rank 0's, and
    because an average of the weights over time must not mix in what they were before that batch.
    """

    class Config(ComponentConfig):
        smallest: Annotated[float, pydantic.Field(gt=0)] = 1e-4
        """The smallest deviation that the first batch is taken to have."""

    ready: Tensor
    mean: Tensor
    log_deviation: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("log_deviation", torch.zeros(width))

    @torch.no_grad()
    def _start(self, x: Tensor, attend: Tensor | None) -> None:
        """Fill the buffers unless they are filled: without a branch, so that it compiles."""
        rows = wide(x)
        if attend is None:
            mean = rows.mean((0, 1))
            square = (rows - mean).square().mean((0, 1))
        else:
            seen = attend[..., None].to(rows.dtype)
            count = seen.sum().clamp(min=1)
            mean = (rows * seen).sum((0, 1)) / count
            square = ((rows - mean).square() * seen).sum((0, 1)) / count
        log_deviation = square.sqrt().clamp(min=self.config.smallest).log()
        self.mean.copy_(torch.where(self.ready, self.mean, mean))
        self.log_deviation.copy_(torch.where(self.ready, self.log_deviation, log_deviation))
        self.ready.fill_(True)

    def _log(self, dtype: torch.dtype) -> Tensor:
        return self.log_scale.to(dtype) - self.log_deviation.to(dtype)

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._move(x, attend, self._started(x, attend))

    def _started(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """The logarithm of the scale, after the first training batch has been seen to."""
        if self.training and (torch.compiler.is_compiling() or x.is_meta or not self.ready):
            self._start(x, attend)
        return self._log(wide(x).dtype)

    def _move(self, x: Tensor, attend: Tensor | None, log: Tensor) -> Tensor:
        y = (_Moved.apply if torch.is_grad_enabled() else _moved)(
            x, log.to(x.dtype), self.mean.to(x.dtype), self.bias.to(x.dtype)
        )
        return keep(x, y, attend)

    @solves("x", given=("out", "attend"), log_det="log_det")
    def undo(self, out: Tensor, attend: Tensor | None) -> Tensor:
        scale = (-self._log(out.dtype)).exp()
        x = torch.addcmul(self.mean.to(out.dtype) - self.bias.to(out.dtype) * scale, out, scale)
        return keep(out, x, attend)

    def log_det(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        return repeated(self._log(wide(x).dtype).sum(), x, attend)

    def with_log_det(self, method: str, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log = self._started(x, attend)
        return self._move(x, attend, log), repeated(log.sum(), x, attend)
