"""Verification that a token kernel is a Markov process: rates, transition probabilities, declared properties.

Notation: sigma total noise, Q rate matrix, P transition matrix. Q[z, y] is the rate from state y to state z, and
columns of Q sum to 0. Axes: k noise levels, n states.
"""

from __future__ import annotations

import math

import torch

from sedd_graph.component.check import Check
from sedd_graph.verify.kernel_cases import Cases
from sedd_graph.verify.worst import worst

__all__ = ["check_chain"]

FEW = 24
"""Number of pairs of noise levels at which the Chapman-Kolmogorov equation is verified."""
NOTHING = 1e-30
"""Total noise at which P must be the identity. It is so low since masking probabilities may be roots of sigma."""


def check_chain(cases: Cases) -> list[Check]:
    """Verify rates, transition matrices, the declared properties and the bound on reverse rates of a kernel."""
    return [_rates(cases), _transition(cases), _semigroup(cases), _declared(cases), *_rate_bound(cases)]


def _rates(cases: Cases) -> Check:
    """Verify that columns of Q sum to 0, and that entries off the diagonal are non-negative."""
    q = cases.q
    largest = q.abs().amax((1, 2)).clamp(min=1e-300)
    columns = float((q.sum(1).abs().amax(1) / largest).max())
    least = float((q - torch.diag_embed(q.diagonal(dim1=1, dim2=2))).min())
    claim = "columns of Q sum to 0, and off the diagonal Q is not negative"
    value = f"{columns:.1e}, least {least:.1e}"
    return Check("kernel.rates", claim, columns < 1e-12 and least >= 0, value, f"Q at {len(q)} noise levels")


def _transition(cases: Cases) -> Check:
    """Verify the closed form of P by matrix exponentials if Q is constant, else by Kolmogorov's forward equation."""
    kernel, sigma, p, q = cases.kernel, cases.sigma, cases.p, cases.q
    if bool((q == q[:1]).all()):
        size = sigma * q[0].abs().sum(0).max()
        gap = (torch.matrix_exp(sigma[:, None, None] * q) - p).abs().amax((1, 2))
        error = float((gap / (1 + 1e-3 * size)).max())  # rounding in a matrix exponential grows with its argument
        claim, how = "the closed form of P is exp(sigma Q)", f"matrix exponential at {len(sigma)} noise levels"
        return Check.below("kernel.transition", claim, error, 1e-10, how)
    start = kernel.transition_matrix(NOTHING)
    error = float((start - torch.eye(kernel.states, dtype=start.dtype)).abs().max())
    h = 1e-3 * sigma
    near, far = (kernel.transition_matrix(sigma + k * h) - kernel.transition_matrix(sigma - k * h) for k in (1, 2))
    slope = (8 * near - far) / (12 * h[:, None, None])
    gap = (slope - q @ p).abs().amax((1, 2)) / (q.abs().amax((1, 2)) + 1e-5 / sigma)
    slopes = float(gap.nan_to_num(nan=math.inf).max())
    claim = "the closed form of P solves dP/dsigma = Q P from P = 1"
    how = f"central differences of fourth order at {len(sigma)} noise levels"
    return Check("kernel.transition", claim, error < 1e-3 and slopes < 1e-8, f"{worst(error, slopes):.1e}", how)


def _semigroup(cases: Cases) -> Check:
    """Verify the Chapman-Kolmogorov equation at pairs of levels, both ends and close levels among them."""
    kernel, count = cases.kernel, min(FEW, len(cases.sigma) - 1)
    generator, error = torch.Generator().manual_seed(23), 0.0
    later = torch.linspace(1, len(cases.sigma) - 1, count).round().long()
    for i in later.tolist():
        j = int(torch.randint(i, (1,), generator=generator)) if i % 3 else i - 1
        now, before = float(cases.sigma[i]), float(cases.sigma[j])
        found = kernel.transition_matrix(now, before) @ cases.p[j]
        gap = float((found - cases.p[i]).abs().nan_to_num(nan=math.inf).max())
        error = worst(error, gap / (1 + 1e-2 * now * float(cases.q[i].abs().max())))  # P rounds by its exponent
    how = f"Chapman-Kolmogorov at {count} pairs of noise levels"
    return Check.below("kernel.semigroup", "P(t | s) P(s) = P(t)", error, 1e-12, how)


def _declared(cases: Cases) -> Check:
    """Verify the class attributes and properties of the kernel, which objectives and samplers rely on."""
    kernel, p, q = cases.kernel, cases.p, cases.q
    n, m = kernel.states, kernel.data_tokens
    wrong = []
    if kernel.mask not in (None, n - 1):
        wrong.append(f"the mask is {kernel.mask}, not the last state {n - 1}")
    moved = p[:, :m, :m] - torch.diag_embed(p[:, :m, :m].diagonal(dim1=1, dim2=2))
    if kernel.clamp_safe and float(moved.abs().max()) != 0:
        wrong.append("clamp_safe, but a visible token can differ from the clean one")
    if kernel.masks_evenly:
        even = torch.zeros(n, n, dtype=torch.float64)
        even[n - 1, :m] = 1.0
        even -= torch.diag(even.sum(0))
        if not float((q - even).abs().max()) <= 1e-12:
            wrong.append("masks_evenly, but Q is not that of masking at rate 1")
    if not kernel.learned and any(x.requires_grad for x in kernel.parameters()):
        wrong.append("trained parameters, but 'learned' is False")
    claim = "the declared properties (mask, clamp_safe, masks_evenly, learned) hold"
    return Check("kernel.declares", claim, not wrong, "; ".join(wrong) or "they hold", f"P and Q at {len(q)} levels")


def _rate_bound(cases: Cases) -> list[Check]:
    """Verify the kernel's upper bound on reverse rates, if it has one.

    Rates are largest if the clean token is deterministic, so only these distributions are evaluated.
    """
    bound = cases.kernel.rate_bound
    if bound is None:
        return []
    away = (cases.rates * cases.ratio).sum(-1) * -torch.expm1(-cases.sigma)[:, None]
    fastest = float(away.max())
    claim = "no reverse rate exceeds the bound that uniformization uses"
    holds, value = fastest <= bound * (1 + 1e-9), f"{fastest:.4g} of {bound:.4g}"
    how = f"pairs of z and x0 at {len(cases.sigma)} noise levels"
    return [Check("kernel.rate_bound", claim, holds, value, how)]
