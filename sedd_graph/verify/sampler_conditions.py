"""Verification that samplers respect prompts and allowed tokens, and that samples depend on the seed alone.

Axes: b rows, l positions, n states, v data tokens, s sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.walk import OnStep, WalkSettings
from sedd_graph.errors import UserError
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.statistics import chi_distance
from sedd_graph.verify.toy import Toy

__all__ = ["check_conditions", "check_random"]

ROWS = 8000
"""Number of samples of allowed tokens, whose distribution is verified."""
MOST_STEPS = 128
"""Largest number of steps that is tried where fewer are refused, divided by 4."""
STEPS = 32
"""Number of steps of samples given prompts."""


def _run(
    toy: Toy,
    output: str,
    x: Tensor,
    *,
    steps: int | None,
    seed: int = 1,
    free: Tensor | None = None,
    allowed: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return samples from initial rows ``x`` int64 [b, l]; ``steps`` is ignored for a sampler that has none,
    at most those of a kernel in discrete time, and larger if steps of this size are refused."""
    if steps is not None and toy.parts.kernel.steps is not None:
        steps = min(steps, toy.parts.kernel.steps)
    while True:
        settings = WalkSettings(
            free=torch.ones_like(x, dtype=torch.bool) if free is None else free,
            kernel=toy.parts.kernel,
            schedule=toy.parts.schedule,
            generator=torch.Generator().manual_seed(seed),
            allowed=allowed,
            on_step=on_step,
        )
        count = None if toy.parts.sampler.steps is None else steps
        try:
            return toy.sample(x, output, settings, count)
        except UserError:  # steps that are too long for the kernel are refused
            if count is None or count > MOST_STEPS:
                raise
            steps = 4 * count


def _prior(toy: Toy, rows: int, seed: int = 2, allowed: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return toy.parts.kernel.prior(rows, toy.length, generator=generator, allowed=allowed)


def check_conditions(toy: Toy, alone: Toy, output: str, bias: float, rows: int) -> Check:
    """Verify that a sampler keeps the tokens of prompts, and draws no other than the allowed tokens.

    The distribution of samples is verified in two cases, unless the sampler is declared heuristic. Given a prompt, it
    must be the conditional distribution, if the kernel guarantees that a visible token is the clean one
    (:attr:`Kernel.clamp_safe`). With some tokens disallowed, it must be the data distribution renormalised over the
    allowed ones, if the kernel masks all tokens at the same rate and the sampler declares that independent tokens are
    exact.

    Args:
        toy: Data set whose tokens depend on each other.
        alone: Data set of independent tokens.
        output: Kind of network output that the sampler reads: ``log_score`` or ``log_x0``.
        bias: Error of samples without a prompt due to their number of steps, which the tolerance allows for: the square
            root of the sum of (f - p)^2 / p, for frequencies f and probabilities p.
        rows: Number of samples given prompts.
    """
    wrong = [*_prompt_faults(toy, output, bias, rows), *_allowed_faults(alone, output)]
    claim = "given tokens stay as they are, and only allowed tokens are drawn"
    how = f"random prompts, and tokens allowed for all rows and for each position of a row; {rows:,} rows"
    return Check("sampler.conditions", claim, not wrong, wrong[0] if wrong else "none wrong", how)


def _prompt_faults(toy: Toy, output: str, bias: float, rows: int) -> list[str]:
    """Return what is wrong with samples given prompts, which are drawn from the data."""
    generator = torch.Generator().manual_seed(3)
    sampler, kernel = toy.parts.sampler, toy.parts.kernel
    data = toy.sequences[torch.multinomial(toy.law, rows, replacement=True, generator=generator)]
    free = torch.rand(data.shape, generator=generator) < 0.6
    if toy.block < toy.length:  # blocks are generated from left to right, each given all tokens before it
        free = (torch.arange(toy.length) > 0).expand(rows, -1)
    x = torch.where(free, _prior(toy, rows), data)
    frames: list[tuple[int, Tensor]] = []

    def note(index: int, now: Tensor) -> None:
        if index == 0:
            frames.clear()  # of a run that was refused
        frames.append((index, now.clone()))

    out = _run(toy, output, x, steps=STEPS, free=free, on_step=note)
    if bool((out != x)[~free].any()):
        return ["given tokens are changed"]
    if bool((out >= toy.tokens).any()):
        return ["samples given a prompt hold masks"]
    if [i for i, _ in frames] != list(range(len(frames))) or not frames or not torch.equal(frames[0][1], x):
        return ["steps are not reported to on_step from 0 on, the initial rows first"]
    if any(bool((now != x)[~free].any()) for _, now in frames):
        return ["given tokens are changed on the way"]
    if not torch.equal(frames[-1][1], out):
        return ["the rows of the last step that is reported to on_step are not the samples"]
    if not kernel.clamp_safe or sampler.heuristic() is not None:
        return []
    distance, limit, _ = chi_distance(toy.counts(out) / rows, toy.law, rows=rows)
    limit += 0.0 if sampler.exact else 2.5 * bias + 1 / STEPS
    if not distance < limit:
        return [f"given a prompt, samples do not follow the model: chi {distance:.3g} (up to {limit:.3g})"]
    return []


def _allowed_faults(alone: Toy, output: str) -> list[str]:
    """Return what is wrong with samples of allowed tokens, which are independent."""
    toy = alone
    generator, kernel, n = torch.Generator().manual_seed(5), toy.parts.kernel, toy.states
    rows = 600
    for shape in ((), (rows, toy.length)):
        allowed = torch.rand(*shape, n, generator=generator) < 0.6
        allowed[..., 0] |= ~allowed[..., : toy.tokens].any(-1)
        states = allowed.reshape(-1, n).any(0)
        out = _run(toy, output, _prior(toy, rows, allowed=states), steps=4, allowed=allowed)
        every = allowed.expand(rows, toy.length, n)
        if bool((out >= toy.tokens).any()) or not bool(every.gather(-1, out[..., None]).all()):
            return [f"tokens are drawn that 'allowed' {list(allowed.shape)} excludes"]
    sampler = toy.parts.sampler
    if not kernel.masks_evenly or sampler.heuristic() is not None or not sampler.alone(kernel):
        return []
    allowed = torch.arange(alone.states) != 0
    out = _run(alone, output, _prior(alone, ROWS, allowed=allowed), steps=3, allowed=allowed)
    law = torch.where((alone.sequences != 0).all(-1), alone.law, 0.0)
    distance, limit, _ = chi_distance(alone.counts(out) / len(out), law / law.sum(), rows=len(out))
    if not distance < limit:
        return ["allowed tokens do not have their probabilities, divided by the sum over allowed tokens"]
    return []


def check_random(toy: Toy, output: str) -> Check:
    """Verify that samples depend on the seed and the initial noise alone, and leave global generators as they are."""
    x, wrong = _prior(toy, 48), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(986)
        before = generators_state()
        first = _run(toy, output, x, steps=3)
        if before != generators_state():
            wrong.append("sampling changes a global random number generator")
        other = _run(toy, output, _prior(toy, 20, seed=8), steps=5, seed=6)
        torch.manual_seed(987)
        again = _run(toy, output, x, steps=3)
    if not torch.equal(first, again):
        wrong.append("the same seed gives other samples: they depend on earlier samples, or a global generator")
    if torch.equal(first, _run(toy, output, x, steps=3, seed=2)) or torch.equal(other, first[:20]):
        wrong.append("another seed gives the same samples")
    claim = "samples depend on the seed and the initial noise alone"
    how = "seeds, global generators and earlier samples"
    return Check("sampler.random", claim, not wrong, wrong[0] if wrong else "none wrong", how)
