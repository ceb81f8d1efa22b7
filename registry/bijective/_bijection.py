"""Helpers of the bijective components: isometries, products in full precision, padding and log-determinants.

Where ``attend`` is false a bijective component is the identity: such a position keeps its value, affects no other, and adds
nothing to the log-determinant, which therefore remains that of the whole map.
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
    """A component from ``x`` to ``out`` that preserves Euclidean distances."""

    abstract = True

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), lipschitz={("x", "out"): 1.0})


def full_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix`` in the precision of ``x`` under autocast too: a map rounded to bfloat16 has no usable inverse."""
    with full_precision(x):
        return x @ matrix.to(x.dtype)


def where_attended(attend: Tensor | None, y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` [b, l, d] where ``attend`` [b, l] is true (everywhere if it is None), else ``x``."""
    return y if attend is None else torch.where(attend[..., None], y, x)


def sum_attended(log: Tensor, attend: Tensor | None) -> Tensor:
    """Return the log-determinant, nats [b], of an elementwise map with log-slopes ``log`` [b, l, d] at attended positions."""
    log = wide(log)
    return (log if attend is None else log * attend[..., None]).sum((1, 2))


def det_of_positions(log: Tensor, x: Tensor, attend: Tensor | None) -> Tensor:
    """Return the log-determinant, nats [b], of a map with ``log`` [] nats at each attended position of ``x`` [b, l, d]."""
    log = wide(log) if x.dtype != torch.float64 else log.double()
    return (log * x.shape[1]).expand(len(x)) if attend is None else log * attend.sum(1)
