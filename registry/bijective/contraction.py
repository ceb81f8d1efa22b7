"""Maps whose Lipschitz constant is known and held: what stands in ``g`` of a residual ``x + g(x)`` that can be undone.

The bound is in the Euclidean norm of a whole sequence and holds for the weights as they are used, at every step of
training: the largest singular value is computed exactly (power iteration comes from below and certifies nothing).
i-ResNet, arXiv 1811.00995; Residual Flows, arXiv 1906.02735. Axes: b batch, l length, d width, h heads, r width of a head.
"""

import math
from typing import Annotated, Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import Algebra, Signature, SizeField
from sedd_graph.diffusion.numerics import full_precision

from ._bijection import wide

Positive = Annotated[float, pydantic.Field(gt=0)]


def largest_squared(weight: Tensor) -> Tensor:
    """The square of the largest singular value of ``weight`` [..., m, n], float64 [...], with gradients."""
    exact = weight.double()
    gram = exact @ exact.mT if weight.shape[-2] <= weight.shape[-1] else exact.mT @ exact
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values[..., -1]


def margin(shape: torch.Size, dtype: torch.dtype) -> float:
    """By how much, relatively, rounding to ``dtype`` can raise a matrix's norm (a Frobenius bound), and the eigenvalue err."""
    return math.sqrt(min(shape)) * torch.finfo(dtype).eps + sum(shape) * torch.finfo(torch.float64).eps


class _Bounded(Component):
    """A component whose output moves at most ``Config.bound`` times as far as ``x``."""

    abstract = True

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): config.bound})  # type: ignore[attr-defined]


class LipschitzLinear(_Bounded, kind="feedforward"):
    """An affine map to ``width`` channels with spectral norm at most ``bound``.

    The weight is divided by its largest singular value, times ``bound``, where that exceeds the bound (i-ResNet, equation
    3, with the exact value). One eigenvalue problem of the smaller side a step.
    """

    class Config(ComponentConfig):
        width: SizeField
        bound: Positive = 0.9
        bias: Literal["none", "all"] = "all"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        linear = nn.Linear(self.axis("d"), self.config.width, bias=self.config.bias == "all")
        self.weight, self.bias = linear.weight, linear.bias

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is used, [width, d] in ``dtype``."""
        bound = self.config.bound
        slack: float = 1 - margin(self.weight.shape, dtype)
        factor: Tensor = largest_squared(self.weight).clamp(min=bound**2).rsqrt() * (bound * slack)
        return (self.weight.double() * factor).to(dtype)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l width"]:
        with full_precision(x):
            rows = wide(x)
            return F.linear(rows, self.effective(rows.dtype), None if self.bias is None else self.bias.to(rows.dtype))


_SWISH = 1.1
"""Above the largest slope of x * sigmoid(beta * x), 1.0998 for every beta."""


class LipschitzAct(Component, kind="feedforward"):
    """An activation of slope at most 1: ``relu``, ``tanh``, ``elu``, or ``lip_swish`` (Residual Flows, section 3.2).

    ``lip_swish`` is ``x * sigmoid(beta * x) / 1.1`` with a learned ``beta`` > 0; its derivative does not saturate.
    """

    positionwise = True

    class Config(ComponentConfig):
        activation: Literal["relu", "tanh", "elu", "lip_swish"] = "lip_swish"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.config.activation == "lip_swish":
            self.beta = nn.Parameter(torch.full((), 0.5))

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 1.0})

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        match self.config.activation:
            case "relu":
                return F.relu(x)
            case "tanh":
                return torch.tanh(x)
            case "elu":
                return F.elu(x)
        return x * torch.sigmoid(x * F.softplus(self.beta).to(x.dtype)) / _SWISH


class L2Attention(_Bounded, kind="attention"):
    """Self-attention by squared distances, with queries and keys tied (arXiv 2006.04710, equation 8), held to ``bound``.

    With q = x W, ``P[i, j]`` proportional to exp(-|q_i - q_j|^2 / sqrt(r)) and values q M for each head, then an output map
    O: the paper's A W^V enters only as an r x r matrix, here M itself. For n attended positions

        Lip <= sqrt(n) (4 W0((n - 1) / e) + 1) |O| sqrt(sum over heads |W|^2 |M|^2)

    (its theorem 3.2 with M for W^V; |.| the spectral norm, W0 Lambert's function). The output is
    divided by what that exceeds ``bound`` by. The bound is for the worst input and grows like sqrt(n) log n: expect the
    branch to be small on long sequences. Hidden positions give nothing and get zero.
    """

    class Config(ComponentConfig):
        heads: SizeField
        bound: Positive = 0.9

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        heads, head = self.config.heads, self.axis("r")
        width = heads * head
        self.query = nn.Parameter(torch.empty(heads, width, head).normal_(std=width**-0.5))
        self.value = nn.Parameter(torch.empty(heads, head, head).normal_(std=head**-0.5))
        self.out = nn.Parameter(torch.empty(width, width).normal_(std=width**-0.5))

    def certified_squared(self, count: Tensor) -> Tensor:
        """The theorem's bound without the division, squared, float64 [...], for ``count`` [...] attended positions."""
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
            # -|q_i - q_j|^2 but for |q_i|^2, which the softmax over j does not see
            scores = -q.square().sum(-1)[:, :, None, :] * head**-0.5
            if attend is not None:
                seen = attend | ~attend.any(-1, keepdim=True)  # a row of padding alone stays finite
                scores = scores.masked_fill(~seen[:, None, None, :], -math.inf)
            mask = scores.expand(-1, -1, x.shape[1], -1)
            y = F.scaled_dot_product_attention(q, q, q @ self.value.to(dtype), attn_mask=mask, scale=2 * head**-0.5)
            count = torch.full((1,), x.shape[1], device=x.device) if attend is None else attend.sum(1)
            slack, bound = 1 - 3 * margin(self.out.shape, dtype), self.config.bound
            factor = self.certified_squared(count).clamp(min=bound**2).rsqrt() * (bound * slack)
            out: Tensor = y.transpose(1, 2).flatten(2) @ self.out.to(dtype) * factor[:, None, None].to(dtype)
            return out if attend is None else out * attend[..., None]


def _lambert(x: Tensor) -> Tensor:
    """Lambert's W0 at ``x`` >= 0 (``w e^w = x``) by Newton's steps, which come down to it from log(1 + x): never below it."""
    w = torch.log1p(x)
    for _ in range(8):
        e = w.exp()
        w = w - (w * e - x) / (e * (1 + w))
    return w
