"""Maps with a certified Lipschitz constant, for the branch ``g`` of an invertible residual block ``x + g(x)``.

The constant is with respect to the Euclidean norm of a whole sequence [l, d], and holds at every training step: largest
singular values are computed exactly, whereas power iteration would only give lower bounds. i-ResNet, arXiv 1811.00995;
Residual Flows, arXiv 1906.02735. Axes: b batch, l length, d width, h heads, r width of a head.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import Algebra, Signature, SizeField
from sedd_graph.diffusion.numerics import full_precision

from ..network._shared import Bias, Positive, full_linear, wide
from ..network.attention import attendable


def largest_squared(weight: Tensor) -> Tensor:
    """Return the squared largest singular value of ``weight`` [..., m, n]: float64, [...], differentiable."""
    exact = weight.double()
    gram = exact @ exact.mT if weight.shape[-2] <= weight.shape[-1] else exact.mT @ exact
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values[..., -1]


def rounding_margin(shape: torch.Size, dtype: torch.dtype) -> float:
    """Return a bound on the relative increase of a matrix's spectral norm due to rounding and eigenvalue errors.

    Args:
        shape: Shape [m, n] of the matrix.
        dtype: Floating-point type to which the matrix is rounded.
    """
    return math.sqrt(min(shape)) * torch.finfo(dtype).eps + sum(shape) * torch.finfo(torch.float64).eps


class LipschitzLinear(Component, kind="feedforward"):
    """Affine map to ``width`` channels, spectral norm at most ``bound`` (i-ResNet, equation 3, with the exact norm).

    A weight whose largest singular value exceeds ``bound`` is scaled down to ``bound``. Each evaluation computes the
    eigenvalues of one Gram matrix, whose side is the smaller of the input and output widths.
    """

    class Config(ComponentConfig):
        width: SizeField
        """Number of output channels."""
        bound: Positive = 0.9
        """Lipschitz constant. A residual block is invertible if the product of the constants along its branch is less
        than 1."""
        bias: Bias = "all"
        """Bias of the map: ``all`` adds a bias, ``none`` does not."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        linear = nn.Linear(self.axis("d"), self.config.width, bias=self.config.bias == "all")
        self.weight, self.bias = linear.weight, linear.bias

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        key, width = ("x", "out"), signature.inputs[0].type.dims[-1].size.constant
        if config.bias == "all" or width is None:  # a bias does not map zero to zero
            return Algebra(lipschitz={key: config.bound})
        # inner products of `width` terms, and the scale of the weight; the Frobenius norm is at most sqrt(rank) times the
        # spectral norm
        rounding = 1.01 * (width + 4) * math.sqrt(min(width, config.width)) * config.bound
        return Algebra(lipschitz={key: config.bound}, rounding={key: rounding})

    def effective(self, dtype: torch.dtype) -> Tensor:
        """Return the weight after scaling to the bound, [width, d] in ``dtype``."""
        bound = self.config.bound
        factor = largest_squared(self.weight).clamp(min=bound**2).rsqrt()
        return (self.weight.double() * (factor * (bound * (1 - rounding_margin(self.weight.shape, dtype))))).to(dtype)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l width"]:
        with full_precision(x):
            return full_linear(x, self.effective(wide(x).dtype), self.bias)


_SWISH = 1.1
"""Upper bound on the slope of x * sigmoid(beta * x), whose maximum is 1.0998 for every beta."""


class LipschitzAct(Component, kind="feedforward"):
    """Elementwise activation function with Lipschitz constant 1."""

    positionwise = True

    class Config(ComponentConfig):
        activation: Literal["relu", "tanh", "elu", "lip_swish"] = "lip_swish"
        """Activation function. ``lip_swish`` is ``x * sigmoid(beta * x) / 1.1`` with a learned ``beta`` > 0; its
        derivative does not saturate (Residual Flows, section 3.2)."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.config.activation == "lip_swish":
            self.beta = nn.Parameter(torch.full((), 0.5))

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        rounding = {("x", "out"): 0.0} if config.activation == "relu" else {}
        return Algebra(lipschitz={("x", "out"): 1.0}, rounding=rounding)

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        match self.config.activation:
            case "relu":
                return F.relu(x)
            case "tanh":
                return torch.tanh(x)
            case "elu":
                return F.elu(x)
        return x * torch.sigmoid(x * F.softplus(self.beta).to(x.dtype)) / _SWISH


class L2Attention(Component, kind="attention"):
    """L2 self-attention, queries and keys tied, Lipschitz constant at most ``bound`` (arXiv 2006.04710, equation 8).

    Each head has learned matrices W [d, r] and M [r, r]. With ``q = x W`` and the attention weights ``P[i, j]``
    proportional to ``exp(-|q_i - q_j|^2 / sqrt(r))``, its output is ``P q M``. The heads' outputs are concatenated and
    multiplied by O [d, d]. The paper's A W^V enters only through an r x r matrix, for which M is learned directly. For
    n attended positions, theorem 3.2 of the paper, with M in the place of W^V, gives

        ``Lip <= sqrt(n) (4 W0((n - 1) / e) + 1) |O| sqrt(sum over heads |W|^2 |M|^2)``

    where ``|.|`` is the spectral norm and W0 is Lambert's function. If the right-hand side exceeds ``bound``, the
    output is scaled by their ratio. The bound covers the worst input and grows like sqrt(n) log n, so that the output
    becomes small for long sequences. Positions where ``attend`` is false contribute nothing, and their output is zero.
    """

    class Config(ComponentConfig):
        heads: SizeField
        """Number of heads; must divide the width of ``x``."""
        bound: Positive = 0.9
        """Lipschitz constant. A residual block is invertible if the product of the constants along its branch is less
        than 1."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        heads, head = self.config.heads, self.axis("r")
        width = heads * head
        self.query = nn.Parameter(torch.empty(heads, width, head).normal_(std=width**-0.5))
        self.value = nn.Parameter(torch.empty(heads, head, head).normal_(std=head**-0.5))
        self.out = nn.Parameter(torch.empty(width, width).normal_(std=width**-0.5))

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): config.bound})

    def certified_squared(self, count: Tensor) -> Tensor:
        """Return the squared Lipschitz bound of theorem 3.2 of Kim et al. (arXiv 2006.04710).

        Args:
            count: Number of attended positions, of any shape.

        Returns:
            The bound, float64, of the shape of ``count``.
        """
        heads = (largest_squared(self.query) * largest_squared(self.value)).sum()
        count = count.double().clamp(min=1)
        return count * largest_squared(self.out) * heads * (4 * _lambert((count - 1) / math.e) + 1).square()

    def forward(
        self, x: Float[Tensor, "b l heads*r"], attend: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b l heads*r"]:
        with full_precision(x):
            rows = wide(x)
            dtype, head = rows.dtype, self.query.shape[-1]
            q = torch.einsum("bld,hdr->bhlr", rows, self.query.to(dtype))
            # -|q_i - q_j|^2 without |q_i|^2, which cancels in the softmax over j
            scores = -q.square().sum(-1)[:, :, None, :] * head**-0.5
            if (seen := attendable(attend)) is not None:
                scores = scores.masked_fill(~seen[:, None, None, :], -math.inf)
            mask = scores.expand(-1, -1, x.shape[1], -1)
            y = F.scaled_dot_product_attention(q, q, q @ self.value.to(dtype), attn_mask=mask, scale=2 * head**-0.5)
            count = torch.full((1,), x.shape[1], device=x.device) if attend is None else attend.sum(1)
            slack, bound = 1 - 3 * rounding_margin(self.out.shape, dtype), self.config.bound
            factor = self.certified_squared(count).clamp(min=bound**2).rsqrt() * (bound * slack)
            out: Tensor = y.transpose(1, 2).flatten(2) @ self.out.to(dtype) * factor[:, None, None].to(dtype)
            return out if attend is None else out * attend[..., None]


def _lambert(x: Tensor) -> Tensor:
    """Return Lambert's W0 of ``x`` >= 0 (``w e^w = x``), by Newton's method from log(1 + x)."""
    w = torch.log1p(x)
    for _ in range(8):
        e = w.exp()
        w = w - (w * e - x) / (e * (1 + w))
    return w
