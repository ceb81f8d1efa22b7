"""Helpers of the bijective components: isometries, full-precision products, padding and log-determinants.

At positions where ``attend`` is false (padding), a bijective component is the identity: the position keeps its value,
does not affect other positions, and contributes nothing to the log-determinant.
"""

import dataclasses

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import Algebra, Signature
from sedd_graph.diffusion.numerics import full_precision

from ..network._shared import wide

__all__ = ["Isometry", "det_of_positions", "full_matmul", "sum_attended", "where_attended", "wide"]


class Isometry(Component):
    """Base class of components from port ``x`` to port ``out`` that preserve Euclidean distances."""

    abstract = True

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), lipschitz={("x", "out"): 1.0})


def full_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix``, computed in the dtype of ``x`` even under autocast.

    A product rounded to bfloat16 could not be inverted accurately.

    Args:
        x: Left factor, [..., d].
        matrix: Right factor, [d, n] or [..., d, n].

    Returns:
        The product, [..., n], in the dtype of ``x``.
    """
    with full_precision(x):
        return x @ matrix.to(x.dtype)


def where_attended(attend: Tensor | None, y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` at attended positions and ``x`` elsewhere.

    Args:
        attend: True at attended positions, [b, l]; None if all are.
        y: Values at attended positions, [b, l, d].
        x: Values elsewhere, [b, l, d].
    """
    return y if attend is None else torch.where(attend[..., None], y, x)


def sum_attended(log: Tensor, attend: Tensor | None) -> Tensor:
    """Return the log-determinant of an elementwise map, summed over attended positions: nats, [b].

    Args:
        log: Log of the absolute derivative of each element, [b, l, d], nats.
        attend: True at attended positions, [b, l]; None if all are.
    """
    log = wide(log)
    return (log if attend is None else log * attend[..., None]).sum((1, 2))


def det_of_positions(log: Tensor, x: Tensor, attend: Tensor | None) -> Tensor:
    """Return the log-determinant, nats [b], of a position-wise map with one log-determinant at all attended positions.

    Args:
        log: Log-determinant at one position, a scalar tensor, nats.
        x: Input of the map, [b, l, d], which provides the shape and dtype.
        attend: True at attended positions, [b, l]; None if all are.
    """
    log = wide(log) if x.dtype != torch.float64 else log.double()
    return (log * x.shape[1]).expand(len(x)) if attend is None else log * attend.sum(1)
