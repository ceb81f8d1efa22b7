"""Shared by the bijective components: isometries, products that keep their precision, what padding does to a bijection.

Where ``attend`` is false a bijective component is the identity: padding stays as it is, reaches nobody, and counts nothing
in a log-determinant, which so is that of the whole map.
"""

import dataclasses

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import Algebra, Signature
from sedd_graph.diffusion.numerics import full_precision


class Isometry(Component):
    """A component that changes no distance: what moves its input ``x`` moves its output ``out`` as far."""

    abstract = True

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), lipschitz={("x", "out"): 1.0})


def through(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` in x's own precision, whatever autocast says: a map rounded to bfloat16 could not be undone."""
    with full_precision(x):
        return x @ matrix.to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def keep(x: Tensor, y: Tensor, attend: Tensor | None) -> Tensor:
    """``y`` [b, l, d] where ``attend`` [b, l] is true (everywhere without it), else ``x``."""
    return y if attend is None else torch.where(attend[..., None], y, x)


def summed(log: Tensor, attend: Tensor | None) -> Tensor:
    """Nats [b] of an elementwise map: the logarithms of its slopes [b, l, d] summed where ``attend`` is true."""
    log = wide(log)
    return (log if attend is None else log * attend[..., None]).sum((1, 2))


def repeated(log: Tensor, x: Tensor, attend: Tensor | None) -> Tensor:
    """Nats [b] of a map with ``log`` [] nats at each position of ``x`` [b, l, d]."""
    log = wide(log) if x.dtype != torch.float64 else log.double()
    return (log * x.shape[1]).expand(len(x)) if attend is None else log * attend.sum(1)
