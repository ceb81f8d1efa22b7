"""Frequency tables of reversible noise for kernels of tokens, from the transition matrix that a kernel declares.

A step draws the noisy token z from q(z | y), the kernel's transition probability from token y, and records y given z under
the posterior p(y | z) proportional to q(z | y) r(y). The *reference* r is a declared distribution of tokens; text that
follows it has the shortest record. Axes: n states.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from sedd_graph.diffusion.bitstream.coder import TOTAL
from sedd_graph.diffusion.bitstream.tables import Numbers, Rows, SharedRows, Table, rounded
from sedd_graph.diffusion.tokens.kernel import Kernel, Replacement
from sedd_graph.errors import UserError

__all__ = ["DENSE", "TokenLaw", "reference_of", "token_law"]

DENSE = 2048
"""Largest number of states for which a table of n^2 frequencies is made."""


@dataclasses.dataclass(frozen=True)
class TokenLaw:
    """The two tables of a step of noise on one token.

    Attributes:
        draw: Distribution of the noisy token given the token before the step.
        record: Distribution of the token before the step given the noisy token.
    """

    draw: Table
    record: Table


def reference_of(kernel: Kernel, reference: Tensor | None) -> Numbers:
    """Return the reference distribution of clean tokens, float64 [n].

    Args:
        kernel: The kernel.
        reference: Weights of the data tokens, [m], all positive; None: all equal.

    Raises:
        UserError: The weights are not one positive number per data token.
    """
    m = kernel.data_tokens
    weights = torch.ones(m, dtype=torch.float64) if reference is None else reference.detach().double().cpu()
    if weights.shape != (m,) or not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
        raise UserError(f"a reference distribution is {m} positive numbers, one for each data token of the kernel")
    found = np.zeros(kernel.states)
    found[np.arange(kernel.states) != (-1 if kernel.mask is None else kernel.mask)] = (weights / weights.sum()).numpy()
    return found


@torch.no_grad()
def token_law(kernel: Kernel, sigma: float, start: float, reference: Numbers) -> TokenLaw:
    """Return the tables of a step of noise from ``start`` to ``sigma``.

    Args:
        kernel: The kernel.
        sigma: Total noise after the step.
        start: Total noise before the step, at most ``sigma``.
        reference: Distribution of clean tokens, float64 [n].

    Raises:
        UserError: The kernel has too many states for a dense table, and declares no :class:`Replacement`.
    """
    form = kernel.replacement(sigma, start)
    if form is not None:
        before = kernel.replacement(start) if start > 0 else None
        return _shared(form, _spread(before, reference))
    if kernel.states > DENSE:
        raise UserError(
            f"reversible noise of {type(kernel).__name__} takes a table of {kernel.states:,} x {kernel.states:,} "
            f"frequencies; it is limited to {DENSE:,} states for kernels that do not define replacement()"
        )
    # q[y, z]
    q = kernel.transition_matrix(sigma, start).detach().double().cpu().numpy().T.clip(min=0)
    if start > 0:
        reference = kernel.transition_matrix(start).detach().double().cpu().numpy().clip(min=0) @ reference
    draw = rounded(q)
    joint = draw * reference[:, None]
    return TokenLaw(Rows(draw), Rows(rounded(joint.T, (joint > 0).T)))


def _spread(form: Replacement | None, reference: Numbers) -> Numbers:
    """Return the distribution of the token before the step, [n]."""
    if form is None:
        return reference
    keep, target = (x.detach().cpu().numpy() for x in form)
    found: Numbers = keep * reference + target * float(((1 - keep) * reference).sum())
    return found


def _shared(form: Replacement, reference: Numbers) -> TokenLaw:
    keep, target = (x.detach().cpu().numpy() for x in form)
    move = 1 - keep
    stay = rounded(np.stack([keep + move * target, move * (1 - target)], -1))[:, 0]
    draw = SharedRows(stay, rounded(target[None])[0])
    # given the noisy token z: y = z, or y drawn from weights that do not depend on z
    weights = reference * move * (stay < TOTAL)
    same = reference * (keep + move * target)
    other = target * (weights.sum() - weights).clip(min=0)
    support = np.stack([same > 0, (other > 0) & (weights.sum() > weights)], -1)
    chance = rounded(np.stack([same, other], -1), support)[:, 0]
    return TokenLaw(draw, SharedRows(chance, rounded(weights[None], weights[None] > 0)[0]))
