"""Linear maps to many states on a GPU: products in TF32 with float32 output, whatever the global precision.

TF32 rounds the factors of a product to 10 bits of mantissa, and sums in float32. On tensor cores it is several times as
fast as float32. The output is not rounded, unlike that of a product in bfloat16. A global switch would also reach the
matrix products of kernels and inverses.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.exported import exported_as
from sedd_graph.diffusion.numerics import full_precision

from ._shared import full_linear, wide

__all__ = ["head_linear", "tf32_linear"]

MULTIPLE = 64
"""States are padded to a multiple of this number: tensor cores need aligned rows, and 50,258 states are 2 mod 8."""


@torch.library.custom_op("sedd_graph::tf32_mm", mutates_args=())
def _mm(a: Tensor, b: Tensor) -> Tensor:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@_mm.register_fake
def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # of torch.library
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return _mm(gradient, b.t()) if needs[0] else None, _mm(a.t(), gradient) if needs[1] else None


_mm.register_autograd(_backward, setup_context=_save)


def tf32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32, and its gradients, with products in TF32 on a GPU.

    Args:
        x: Input, [..., d].
        weight: Weight, [v, d].
        bias: Bias, [v], or None.

    Returns:
        The output, float32 [..., v].
    """
    states = len(weight)
    with full_precision(x):
        rows = wide(x)
        table = F.pad(weight.to(rows.dtype), (0, 0, 0, -states % MULTIPLE))
        out: Tensor = _mm(rows.flatten(0, -2), table.t())[:, :states].unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias.to(rows.dtype)


@exported_as(full_linear)
def head_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, float32: with products in TF32 on a GPU, in float32 elsewhere.

    Arguments as for :func:`tf32_linear`.
    """
    on_gpu = x.device.type == "cuda" and x.dtype != torch.float64
    return tf32_linear(x, weight, bias) if on_gpu else full_linear(x, weight, bias)
