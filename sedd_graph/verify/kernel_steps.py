"""Verification of kernels in discrete time: step matrices, their ordered products, draws, prior and posteriors.

Nothing is assumed to commute. The step matrices are those of single steps, P(i | i - 1); all other transition matrices
are compared with products of them. Notation: P(i | j) is the transition matrix from step j to step i, P(i) = P(i | 0).
Axes: k pairs of steps, c predictions, n states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError
from sedd_graph.verify.bitstream import check_bitstream
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.kernel_draws import check_draws, check_prior
from sedd_graph.verify.worst import worst

__all__ = ["check_own_schedule", "check_step_kernel"]

EVERY = {"full": 2e10, "quick": 2e9}
"""Largest number of multiplications for which every step is verified, and not a selection."""
SOME = {"full": 96, "quick": 32}
"""Number of steps of a selection."""
PAIRS = {"full": 24, "quick": 8}
"""Number of random pairs, and of triples, of steps."""
MANY, SKIPPED = 64, 12
"""Number of states above which random pairs of steps skip few steps, and how many at most."""
ROUNDING = 1e-10
"""Tolerance of probabilities."""
LIKELY = 1e-9
"""Least probability of a noisy state for its posterior to be compared; below, rounding of the reference would count."""


@torch.no_grad()
def check_step_kernel(kernel: Kernel, proof: Proof) -> list[Check]:
    """Verify a kernel in discrete time by products of its own step matrices and by Bayes' rule.

    Args:
        kernel: Kernel in discrete time, and with few enough states for matrices over all pairs of them.
        proof: Strength of the verification: ``quick`` takes fewer steps and draws.
    """
    total = kernel.steps or 1
    return [
        *_matrices(kernel, total, proof),
        _semigroup(kernel, total, proof),
        _declared(kernel, total),
        *check_draws(kernel, proof),
        *check_prior(kernel, end=total, proof=proof),
        *check_bitstream(kernel, proof),
        *_reverse(kernel, total, proof),
        _pure(kernel, total),
    ]


def check_own_schedule(kernel: Kernel, end: float) -> Check:
    """Verify that total noise at t = 1 is the number of steps of a kernel in discrete time.

    Args:
        kernel: Kernel in discrete time.
        end: Total noise at t = 1 by the schedule of the process.
    """
    claim = "the schedule ends at the last step of the kernel"
    return Check(
        "kernel.schedule", claim, end == kernel.steps, f"sigma(1) = {end:g} of {kernel.steps} steps", "the schedule"
    )


def _chosen(kernel: Kernel, total: int, proof: Proof) -> list[int]:
    """Return the steps that are verified one by one: all if that is affordable, with the first and the last otherwise."""
    if total * kernel.states**3 <= EVERY[proof]:
        return list(range(1, total + 1))
    some = torch.randperm(total, generator=torch.Generator().manual_seed(81))[: SOME[proof]] + 1
    return sorted({1, total, *some.tolist()})


def _gap(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().nan_to_num(nan=math.inf).max())


def _matrices(kernel: Kernel, total: int, proof: Proof) -> list[Check]:
    """Verify that step matrices have columns that sum to 1, and that P(i) is the product of the first i of them."""
    eye = torch.eye(kernel.states, dtype=torch.float64)
    columns, product = 0.0, _gap(kernel.transition_matrix(0.0), eye)
    chosen = _chosen(kernel, total, proof)
    for i in chosen:
        step = kernel.transition_matrix(float(i), float(i - 1))
        columns = worst(columns, _gap(step.sum(0), torch.ones_like(step[0])), -float(step.min()))
        before = kernel.transition_matrix(float(i - 1))
        product = worst(product, _gap(kernel.transition_matrix(float(i)), step @ before))
    how = f"{len(chosen):,} of {total:,} steps"
    claim = "every step matrix has entries of at least 0 and columns that sum to 1"
    recursion = "P(i) is the step matrix of step i times P(i - 1), from P(0) = 1"
    return [
        Check.below("kernel.step_matrix", claim, columns, ROUNDING, how),
        Check.below("kernel.transition", recursion, product, ROUNDING, how),
    ]


def _reach(kernel: Kernel, total: int) -> int:
    """Return the largest number of skipped steps of random pairs, whose products take one multiplication for each."""
    return total if kernel.states <= MANY else min(total, SKIPPED)


def _triples(total: int, reach: int, count: int) -> Iterable[tuple[int, int, int]]:
    """Yield steps k <= j <= i: random ones with i - k up to ``reach``, neighbouring ones, and both ends."""
    generator = torch.Generator().manual_seed(82)
    for number in range(count):
        low = int(torch.randint(0, total - reach + 1, (1,), generator=generator))
        some = (low + torch.randint(0, reach + 1, (3,), generator=generator)).sort().values.tolist()
        if number % 3 == 1:
            some = [max(0, some[2] - 3), max(0, some[2] - 1), some[2]]
        yield some[0], some[1], some[2]
    yield 0, total // 2, total
    yield max(0, total - 2), total - 1, total
    yield 0, 1, min(2, total)


def _semigroup(kernel: Kernel, total: int, proof: Proof) -> Check:
    """Verify the Chapman-Kolmogorov equation by products, and short stretches by their single steps in order."""
    error, count = 0.0, 0
    for k, j, i in _triples(total, _reach(kernel, total), PAIRS[proof]):
        whole = kernel.transition_matrix(float(i), float(k))
        parts = kernel.transition_matrix(float(i), float(j)) @ kernel.transition_matrix(float(j), float(k))
        error, count = worst(error, _gap(whole, parts)), count + 1
        if i - k <= 8:
            one = torch.eye(kernel.states, dtype=torch.float64)
            for step in range(k + 1, i + 1):
                one = kernel.transition_matrix(float(step), float(step - 1)) @ one
            error = worst(error, _gap(whole, one))
    how = f"Chapman-Kolmogorov by products at {count} triples of steps; nothing is assumed to commute"
    return Check.below("kernel.semigroup", "P(i | j) P(j | k) = P(i | k)", error, ROUNDING, how)


def _declared(kernel: Kernel, total: int) -> Check:
    """Verify the declared properties, which objectives and samplers rely on."""
    n, m, wrong = kernel.states, kernel.data_tokens, []
    if kernel.mask not in (None, n - 1):
        wrong.append(f"the mask is {kernel.mask}, not the last state {n - 1}")
    last = kernel.transition_matrix(float(total))[:m, :m]
    if kernel.clamp_safe and float((last - torch.diag(last.diagonal())).abs().max()) > 0:
        wrong.append("clamp_safe, but a visible token can differ from the clean one")
    if kernel.masks_evenly:
        wrong.append("masks_evenly, which only kernels in continuous time have")
    if kernel.learned or any(x.requires_grad for x in kernel.parameters()):
        wrong.append("trained parameters, which no kernel in discrete time may have")
    try:
        kernel.rate_matrix(1.0)
        wrong.append("a rate matrix, which the steps need not have")
    except UserError:
        pass
    claim = "the declared properties (steps, mask, clamp_safe, masks_evenly, learned) hold"
    return Check("kernel.declares", claim, not wrong, "; ".join(wrong) or "they hold", f"{total:,} steps")


def _levels(total: int, reach: int, count: int) -> list[tuple[int, int]]:
    """Return pairs of a step and an earlier one: the step before, clean text, and a random one in ``reach``, in turn."""
    generator = torch.Generator().manual_seed(83)
    pairs = [(total, total - 1), (1, 0), (total, 0)]
    for number in range(count):
        i = int(torch.randint(1, total + 1, (1,), generator=generator))
        j = (i - 1, 0, int(torch.randint(max(0, i - reach), i, (1,), generator=generator)))[number % 3]
        pairs.append((i, j))
    return pairs


def _guesses(kernel: Kernel, rows: int, seed: int) -> Tensor:
    """Return random predictions of the clean token, float64 [rows, n, n], one for each noisy state; 0 at the mask.

    They are wide, so that probabilities reach 1e-9 and below; every fourth is certain of one token.
    """
    n, m = kernel.states, kernel.data_tokens
    generator = torch.Generator().manual_seed(seed)
    width = torch.tensor([0.5, 5.0, 12.0], dtype=torch.float64)[torch.arange(n) % 3, None]
    logits = width * torch.randn(rows, n, n, generator=generator, dtype=torch.float64)
    certain = torch.randint(0, m, (rows, n, 1), generator=generator)
    only = torch.full_like(logits, -torch.inf).scatter(-1, certain, 0.0)
    logits = torch.where((torch.arange(n) % 4 == 1)[:, None], only, logits)
    return logits.masked_fill(torch.arange(n) >= m, -torch.inf).softmax(-1)


def _reverse(kernel: Kernel, total: int, proof: Proof) -> list[Check]:
    """Verify the implied scores, and the reverse steps by Bayes' rule, at every noisy state; also in float32."""
    n, errors = kernel.states, {"log_score": 0.0, "posterior": 0.0, "float32": 0.0}
    z = torch.arange(n)[None]
    pairs = _levels(total, _reach(kernel, total), PAIRS[proof])
    for number, (i, j) in enumerate(pairs):
        guess = _guesses(kernel, 1, seed=84 + number)
        now, before = (torch.tensor([float(v)], dtype=torch.float64) for v in (i, j))
        seen = guess @ kernel.transition_matrix(float(i)).T
        here = seen.gather(-1, z[..., None])
        joint = kernel.transition_matrix(float(i), float(j))[z[0]] * (guess @ kernel.transition_matrix(float(j)).T)
        exact = joint / joint.sum(-1, keepdim=True)
        likely = (here > LIKELY).expand_as(exact)
        found = kernel.posterior(guess, z, now, before)
        errors["posterior"] = worst(errors["posterior"], _where(likely, found, exact))
        single = kernel.posterior(guess.float(), z, now.float(), before.float())
        off = (
            math.inf if single.dtype != torch.float32 else _where(here.expand_as(exact) > 1e-3, single.double(), exact)
        )
        errors["float32"] = worst(errors["float32"], off)
        score = kernel.log_score(guess.log().clamp(min=-1e6), z, now).exp()
        scale = 1 + seen / here
        errors["log_score"] = worst(errors["log_score"], _where(likely, score / scale, seen / here / scale))
    how = f"every noisy state, {len(pairs)} pairs of steps, random predictions"
    claims = {
        "log_score": ("the score of a prediction is that of its distribution", 1e-8),
        "posterior": ("for one token, the ancestral step is Bayes' rule, also where it skips steps", 1e-9),
        "float32": ("the ancestral step is accurate in float32", 1e-4),
    }
    return [Check.below(f"kernel.{k}", claim, errors[k], limit, how) for k, (claim, limit) in claims.items()]


def _where(valid: Tensor, found: Tensor, exact: Tensor) -> float:
    return float(torch.where(valid, (found - exact).abs().nan_to_num(nan=math.inf), 0.0).max())


def _pure(kernel: Kernel, total: int) -> Check:
    """Verify that each posterior depends on its own row and position alone, and that calls change nothing."""
    n, rows = kernel.states, 3
    levels = torch.tensor([max(1, total // 3), max(1, 2 * total // 3), total], dtype=torch.float64)
    below = torch.stack([levels[0] - 1, torch.zeros_like(levels[1]), (levels[2] - 3).clamp(min=0)])
    x = torch.tensor([0, n - 1, n // 2, min(1, n - 1)]).expand(rows, -1).contiguous()
    guess = _guesses(kernel, rows, seed=90)[:, :1].expand(-1, 4, -1).contiguous()
    inputs, before = (guess, x, levels, below), generators_state()
    kept = [v.clone() for v in inputs]
    first, again = kernel.posterior(*inputs), kernel.posterior(*inputs)
    alone = torch.stack(
        [
            kernel.posterior(guess[b : b + 1, c : c + 1], x[b : b + 1, c : c + 1], levels[b : b + 1], below[b : b + 1])
            for b in range(rows)
            for c in range(4)
        ]
    ).view(first.shape)
    wrong = []
    if not torch.equal(first, again) or not bool(((alone - first).abs() <= 1e-9).all()):
        wrong.append("posterior gives other values")
    if not all(map(torch.equal, inputs, kept)):
        wrong.append("inputs are changed in place")
    if generators_state() != before:
        wrong.append("the global random generators are used")
    claim = "ancestral steps depend on one row and position alone, and change nothing"
    return Check("kernel.pure", claim, not wrong, "; ".join(wrong) or "they do", "a batch against single positions")
