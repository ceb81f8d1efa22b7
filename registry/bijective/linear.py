"""Affine maps of the channels: ``linear`` to any width, and the invertible ``plu`` and ``act_norm`` of flows.

Axes: b batch, l length, d width.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import SizeField
from sedd_graph.diffusion.numerics import full_precision

from ..network._shared import Bias, Positive
from ._bijection import det_of_positions, where_attended, wide


class Linear(Component, kind="feedforward"):
    """Affine map to ``width`` channels, as ``torch.nn.Linear``."""

    positionwise = True

    class Config(ComponentConfig):
        width: SizeField
        """Number of output channels."""
        bias: Bias = "all"
        """Bias of the map: ``all`` adds a bias, ``none`` does not."""
        init: Literal["default", "zero"] = "default"
        """Initialisation of weight and bias: ``default``, as in ``torch.nn.Linear``; or ``zero``, with which a coupling
        that this map parametrises starts as the identity."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = nn.Linear(self.axis("d"), self.config.width, bias=self.config.bias == "all")
        if self.config.init == "zero":
            for parameter in self.linear.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s width"]:
        if x.dim() == 2 or x.is_contiguous():
            out: Tensor = self.linear(x)
            return out
        # in two dimensions: in three, torch adds the bias to a non-contiguous input in a pass of its own
        rows: Tensor = self.linear(x.reshape(-1, x.shape[-1]))
        return rows.view(*x.shape[:-1], self.config.width)


class PLU(Component, kind="mixer"):
    """Invertible 1x1 convolution of Glow (arXiv 1807.03039, section 3.2): ``W = P L (U + diag(s))`` over the channels.

    P is a fixed permutation and the signs of s are fixed; the unit lower triangular L, the strictly upper triangular U
    and the magnitudes of s are learned. W is initialised to a random orthogonal matrix. The log-determinant is the sum
    of ``log |s|``, times the number of attended positions. The relative error of the inverse is proportional to the
    condition number of W.
    """

    class Config(ComponentConfig):
        pass

    config: Config
    order: Tensor
    sign: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        rotation, _ = torch.linalg.qr(torch.empty(width, width).normal_())
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        # one matrix: L below the diagonal, U above it, log |s| on it
        self.weight = nn.Parameter(lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log()))
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("order", p.argmax(1))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return L - I, U + diag(s) and ``log |s|``."""
        weight = self.weight.to(dtype)
        log = weight.diagonal()
        return weight.tril(-1), weight.triu(1) + torch.diag(self.sign.to(dtype) * log.exp()), log

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._multiply(x, attend, *self._factors(wide(x).dtype)[:2])

    def _multiply(self, x: Tensor, attend: Tensor | None, lower: Tensor, upper: Tensor) -> Tensor:
        with full_precision(x):
            matrix = torch.addmm(upper, lower, upper).index_select(0, self.order)
            return where_attended(attend, nn.functional.linear(x, matrix.to(x.dtype)), x)

    @solves("x", given=("out", "attend"), log_det="log_det")
    def inverse(self, out: Tensor, attend: Tensor | None) -> Tensor:
        with full_precision(out):
            lower, upper, _ = self._factors(wide(out).dtype)
            # the inverse matrix once, then a product: faster than triangular solves for every position
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, inverse, upper=False, unitriangular=True)
            inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
            return where_attended(attend, out @ inverse.T.index_select(0, self.order).to(out.dtype), out)

    def log_det(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        return det_of_positions(self.weight.diagonal().sum(), x, attend)

    def with_log_det(self, method: str, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log = self._factors(wide(x).dtype)
        return self._multiply(x, attend, lower, upper), det_of_positions(log.sum(), x, attend)


def _normalize(x: Tensor, log: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
    """Return ``(x - mean) * exp(log) + bias`` for x [..., d], in one pass over x."""
    scale = log.exp()
    return torch.addcmul(torch.addcmul(bias, mean, scale, value=-1), x, scale)


class _Normalize(torch.autograd.Function):
    """Autograd function of :func:`_normalize`, with a faster backward pass than the one that autograd derives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, log, mean)
        return _normalize(x, log, mean, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, log, mean = ctx.saved_tensors
        scale, over = log.exp(), tuple(range(x.dim() - 1))
        of_bias = gradient.sum(over)
        of_log = ((gradient * x).sum(over) - mean * of_bias) * scale
        return gradient * scale if ctx.needs_input_grad[0] else None, of_log, None, of_bias


class ActNorm(Component, kind="norm"):
    """Scale and bias per channel, initialised from the first training batch (Glow, arXiv 1807.03039, section 3.1).

    The mean and standard deviation of that batch over attended positions are stored in buffers and normalise the input,
    and the learned log-scale and bias are initialised to zero. With buffers instead of parameters, distributed training
    copies the statistics from rank 0, and the exponential moving average of the weights does not include their initial
    values.
    """

    class Config(ComponentConfig):
        smallest: Positive = 1e-4
        """Lower bound on the standard deviation of the first batch."""

    config: Config
    ready: Tensor
    mean: Tensor
    log_deviation: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self._known_ready = False
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("log_deviation", torch.zeros(width))

    @torch.no_grad()
    def _initialise(self, x: Tensor, attend: Tensor | None) -> None:
        """Set the buffers from ``x`` unless ``ready``, without a data-dependent branch, for torch.compile."""
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
        """Return the log of the total scale of each channel, [d]."""
        return self.log_scale.to(dtype) - self.log_deviation.to(dtype)

    def _initialised_log(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Return :meth:`_log` after filling the buffers if this is the first training batch."""
        if self.training and not self._known_ready:
            if torch.compiler.is_compiling() or x.is_meta:
                self._initialise(x, attend)
            else:
                if not self.ready:
                    self._initialise(x, attend)
                self._known_ready = True  # not read again, since a GPU would be waited for
        return self._log(wide(x).dtype)

    def _load_from_state_dict(self, *arguments: Any, **settings: Any) -> None:
        self._known_ready = False
        super()._load_from_state_dict(*arguments, **settings)

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        return self._apply_scale(x, attend, self._initialised_log(x, attend))

    def _apply_scale(self, x: Tensor, attend: Tensor | None, log: Tensor) -> Tensor:
        normalize = _Normalize.apply if torch.is_grad_enabled() else _normalize
        return where_attended(attend, normalize(x, log.to(x.dtype), self.mean.to(x.dtype), self.bias.to(x.dtype)), x)

    @solves("x", given=("out", "attend"), log_det="log_det")
    def inverse(self, out: Tensor, attend: Tensor | None) -> Tensor:
        scale = (-self._log(out.dtype)).exp()
        x = torch.addcmul(self.mean.to(out.dtype) - self.bias.to(out.dtype) * scale, out, scale)
        return where_attended(attend, x, out)

    def log_det(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        return det_of_positions(self._log(wide(x).dtype).sum(), x, attend)

    def with_log_det(self, method: str, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log = self._initialised_log(x, attend)
        return self._apply_scale(x, attend, log), det_of_positions(log.sum(), x, attend)
