"""The noise process held to an enumerable toy: the same components and configs on three tokens and two positions.

What the parts claim is checked in :mod:`sedd_graph.proof.noise`; here the whole, against the law of all nine sequences. Axes: b rows, l = 2 positions, n states.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from sedd_graph.diffusion.roles import Batch, Randomness
from sedd_graph.engine.engine import Process, make_process
from sedd_graph.graph.process import ProcessPlan
from sedd_graph.plugins import Registry
from sedd_graph.proof.check import Check
from sedd_graph.proof.noise import check_kernel, check_precision, check_schedule

__all__ = ["Toy", "prove_process"]

TOKENS, LENGTH = 3, 2


class Toy:
    """A law over the nine sequences of two tokens, and its exact scores and posteriors under a process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        kernel = process.kernel
        generator = torch.Generator().manual_seed(7)
        weights = torch.rand(TOKENS**LENGTH, generator=generator, dtype=torch.float64) + 0.05
        self.law = weights / weights.sum()
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
        self.states = kernel.states
        joint = torch.zeros(self.states, self.states, dtype=torch.float64)
        joint[self.sequences[:, 0], self.sequences[:, 1]] = self.law
        self.joint = joint

    @property
    def entropy(self) -> float:
        return float(-(self.law * self.law.log()).sum())

    def outputs(self, x: Tensor, sigma: Tensor, name: str) -> dict[str, Tensor]:
        """What a perfect network would put out for rows ``x`` [b, 2] at noise ``sigma`` [b]."""
        kernel, rows = self.process.kernel, torch.arange(len(x))
        levels, index = torch.unique(sigma.double(), return_inverse=True)
        p = kernel.transition_matrix(levels)[index]  # [b, n, n]
        if name == "log_score":
            law = p @ self.joint @ p.transpose(1, 2)
            given = [law[rows, :, x[:, 1]], law[rows, x[:, 0]]]  # the law of one position beside the other
            exact = torch.stack([g / g.gather(1, x[:, i, None]) for i, g in enumerate(given)], dim=1)
        else:
            # the clean token given the other position alone: under a mask there is no more to know, and for kernels that
            # move data tokens this leave-one-out posterior is what the bound asks for; a token that is surely clean is carried
            exact = torch.stack([p[rows, x[:, 1]] @ self.joint.T, p[rows, x[:, 0]] @ self.joint], dim=1)
            exact = exact / exact.sum(-1, keepdim=True)
            if kernel.clamp_safe and kernel.mask is not None:
                carried = torch.nn.functional.one_hot(x, self.states).double()
                exact = torch.where((x == kernel.mask)[..., None], exact, carried)
        return {name: exact.clamp(min=1e-300).log().clamp(min=-1e6).float()}


def prove_process(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Every check of the declared combination. Takes a few seconds on a CPU."""
    declared = make_process(plan, registry).kernel
    process = make_process(plan, registry, states=TOKENS)
    if process.kernel.mask is not None:
        process = make_process(plan, registry, states=TOKENS + 1)
    toy = Toy(process)
    end = float(process.schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))
    return [
        *check_schedule(process.schedule),
        *check_kernel(process.kernel, end=end),
        dataclasses.replace(check_precision(declared), name="kernel.declared"),
        _bound(toy, plan.output),
        *_sampler(toy, plan.output),
    ]


def _bound(toy: Toy, output: str) -> Check:
    """With a perfect network the bound is the entropy of the data: catches transposes, missing terms and wrong factors."""
    process, rows = toy.process, 30_000
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(toy.law, rows, replacement=True, generator=generator)
    batch = Batch.of(toy.sequences[chosen])
    draw = process.objective.corrupt(batch, process.kernel, process.schedule, random=Randomness(generator))
    outputs = toy.outputs(draw.xt, draw.sigma, output)
    nats = process.objective.loss(outputs, draw, batch, process.kernel, process.schedule).double()
    # subtracting -log p(x0), whose mean is the entropy, leaves less to chance
    gap = nats + toy.law[chosen].log()
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(rows))
    return Check(
        "objective.tight",
        "with a perfect network the bound is the entropy of the data",
        abs(mean) < 5 * error + 0.01 * toy.entropy,
        f"{toy.entropy + mean:.4f} +- {error:.4f} against {toy.entropy:.4f} nats",
        f"{rows:,} draws on {TOKENS**LENGTH} sequences",
    )


def _sampler(toy: Toy, output: str) -> list[Check]:
    """With a perfect network and many steps the sampler gives back the law of the data."""
    process, rows, steps = toy.process, 20_000, 64
    generator = torch.Generator().manual_seed(4)
    x = process.kernel.prior(rows, LENGTH, generator=generator, allowed=None)
    out = process.sampler.run(
        lambda x, t: toy.outputs(x, process.schedule.sigma(t), output),
        x,
        free=torch.ones_like(x, dtype=torch.bool),
        kernel=process.kernel,
        schedule=process.schedule,
        generator=generator,
        steps=steps,
    )
    clean = bool((out < TOKENS).all())
    code = (out.clamp(max=TOKENS - 1) * torch.tensor([TOKENS, 1])).sum(-1)
    found = torch.bincount(code, minlength=TOKENS**LENGTH).double() / rows
    distance = float((found - toy.law).abs().sum() / 2)
    floor = math.sqrt(TOKENS**LENGTH / rows / 2)
    # two positions that move in the same of n steps ignore each other: an error of the order of 1/n
    return [
        Check("sampler.clean", "no mask comes out", clean, "0 masks" if clean else "masks", f"{rows:,} rows"),
        Check(
            "sampler.law",
            "with a perfect network the sampler gives back the law of the data",
            distance < 2 * floor + 1.5 / steps,
            f"{distance:.4f} (chance alone: about {floor:.4f})",
            f"total variation, {steps} steps, {rows:,} rows",
        ),
    ]
