"""Verification that the steps of a reversible sampler of vectors are bijections, to the last bit.

Axes: b batch, l length, d width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import along
from sedd_graph.diffusion.vectors.reversible import Level, ReversibleSampler, State, levels_of
from sedd_graph.diffusion.vectors.sampler import VectorWalk, VectorWalkSettings
from sedd_graph.verify.vectors_toy import Toy

__all__ = ["check_inverse"]

ROWS = 64
"""Number of rows that are walked."""
STEPS = (2, 5, 16)
"""Numbers of steps."""


@torch.no_grad()
def check_inverse(toy: Toy, output: str) -> list[Check]:
    """Verify the inverse of a reversible sampler in both directions, if the sampler is one.

    The network is conditioned on its own estimate, so that a step that depends on earlier ones is found.

    Args:
        toy: The toy, of two tokens per row.
        output: Name of the network's output.
    """
    sampler, kernel = toy.parts.sampler, toy.parts.kernel
    if not isinstance(sampler, ReversibleSampler):
        return []
    wrong, most = [], kernel.steps or max(STEPS)
    for number, steps in enumerate(sorted({min(steps, most) for steps in STEPS})):
        generator = torch.Generator().manual_seed(96 + number)
        walk, levels = _walk(toy, output, sampler, steps)
        if not torch.equal(sampler.begin(walk.x)[0], sampler.grid.snap(walk.x)):
            wrong.append("a state does not begin with its vectors")
        for start in (_noise(walk, sampler, generator), _text(walk, sampler, levels[-1], toy, generator)):
            there = sampler.forward(walk, start, levels)
            if not _equal(sampler.backward(walk, there, levels), start):
                wrong.append(f"noise -> vectors -> noise differs after {steps} steps")
            back = sampler.backward(walk, start, levels)
            if not _equal(sampler.forward(walk, back, levels), start):
                wrong.append(f"vectors -> noise -> vectors differs after {steps} steps")
            if not all(torch.equal(sampler.grid.snap(x), x) for x in (*there, *back)):
                wrong.append("a state leaves the grid")
    claim = "noise and vectors determine each other to the last bit"
    how = f"{ROWS} rows of 2 tokens, both directions, {', '.join(map(str, STEPS))} steps, from noise and from text, a self-conditioned network"
    return [Check("vectors.inverse", claim, not wrong, "; ".join(dict.fromkeys(wrong)) or "equal", how)]


def _equal(some: State, others: State) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _walk(toy: Toy, output: str, sampler: ReversibleSampler, steps: int) -> tuple[VectorWalk, list[Level]]:
    """Return a run with a self-conditioned network, and its noise levels."""
    parts = toy.parts
    perfect = toy.network(parts.objective, output)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = inputs["estimate"].mean(-1, keepdim=True)
        return {
            name: value + 0.1 * own * torch.linspace(-1, 1, value.shape[-1]) for name, value in perfect(inputs).items()
        }

    settings = VectorWalkSettings(
        kernel=parts.kernel,
        schedule=parts.schedule,
        generator=torch.Generator().manual_seed(96),
        tokens=torch.zeros(ROWS, toy.length, dtype=torch.int64),
        free=torch.ones(ROWS, toy.length, dtype=torch.bool),
    )
    attend = torch.ones(ROWS, toy.length, dtype=torch.bool)
    denoise = Denoiser(run, parts.kernel, parts.schedule, attend, self_conditioned=True)
    walk = VectorWalk(denoise, settings, clamp=sampler.config.clamp)
    return walk, levels_of(walk, sampler.times(walk, steps))


def _noise(walk: VectorWalk, sampler: ReversibleSampler, generator: torch.Generator) -> State:
    """Return a state of noise whose streams differ."""
    return tuple(
        sampler.grid.snap(torch.randn(walk.x.shape, generator=generator, dtype=torch.float64))
        for _ in range(sampler.streams)
    )


def _text(walk: VectorWalk, sampler: ReversibleSampler, level: Level, toy: Toy, generator: torch.Generator) -> State:
    """Return a state at the lowest noise around rows of the toy."""
    clean = toy.parts.kernel.embed(toy.draw(len(walk.x), generator)).double()
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return sampler.begin(along(level.s, clean) * clean + noise)
