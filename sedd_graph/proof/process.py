"""The noise process held to an enumerable toy: the same components and configs on three tokens and two positions.

What is claimed is checked against independent means: matrix exponentials, finite differences, and Bayes' rule by
enumeration of all nine sequences. Axes: b rows, l = 2 positions, n states.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sedd_graph.diffusion.process import Kernel, Schedule
from sedd_graph.diffusion.roles import Batch, Randomness
from sedd_graph.engine.engine import Process, make_process
from sedd_graph.graph.process import ProcessPlan
from sedd_graph.plugins import Registry
from sedd_graph.proof.check import Check

__all__ = ["Toy", "check_kernel", "check_schedule", "prove_process"]

TOKENS, LENGTH = 3, 2
_LOWEST = 25.0
"""Minus the logarithm of the least noise that a table of transitions knows."""


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
        self._table = torch.zeros(35 * 10_000, kernel.states, kernel.states, dtype=torch.float64)
        self._made = torch.zeros(len(self._table), dtype=torch.bool)

    @property
    def entropy(self) -> float:
        return float(-(self.law * self.law.log()).sum())

    def distance(self, rows: Tensor) -> float:
        """Total variation between the law and the counts of ``rows`` [b, 2]."""
        code = (rows.clamp(max=TOKENS - 1) * torch.tensor([TOKENS, 1])).sum(-1)
        found = torch.bincount(code, minlength=TOKENS**LENGTH).double() / len(rows)
        return float((found - self.law).abs().sum() / 2)

    def _transition(self, sigma: Tensor) -> Tensor:
        """P at ``sigma`` [b], float64 [b, n, n], of levels 0.01 % apart, each made once.

        Samplers whose rows keep their own time would otherwise ask for as many as there are rows, at every turn.
        """
        levels = ((sigma.double().log() + _LOWEST) * 10_000).round().long().clamp(0, len(self._table) - 1)
        for level in torch.unique(levels[~self._made[levels]]).tolist():
            self._table[level] = self.process.kernel.transition_matrix(math.exp(level / 10_000 - _LOWEST))
            self._made[level] = True
        return self._table[levels]

    def outputs(self, x: Tensor, sigma: Tensor, name: str) -> dict[str, Tensor]:
        """What a perfect network would put out for rows ``x`` [b, 2] at noise ``sigma`` [b]."""
        kernel, rows = self.process.kernel, torch.arange(len(x))
        p = self._transition(sigma)
        if name == "log_score":
            law = p @ self.joint @ p.transpose(1, 2)
            given = [law[rows, :, x[:, 1]], law[rows, x[:, 0]]]  # the law of one position beside the other
            exact = torch.stack([g / g.gather(1, x[:, i, None]) for i, g in enumerate(given)], dim=1)
        else:
            # the clean token given the other position alone: under a mask there is no more to know, and for kernels
            # that move data tokens this leave-one-out posterior is what the bound asks for
            exact = torch.stack([p[rows, x[:, 1]] @ self.joint.T, p[rows, x[:, 0]] @ self.joint], dim=1)
            exact = exact / exact.sum(-1, keepdim=True)
            if kernel.mask is not None:
                carried = torch.nn.functional.one_hot(x, self.states).double()
                exact = torch.where((x == kernel.mask)[..., None], exact, carried)
        return {name: exact.clamp(min=1e-300).log().clamp(min=-1e6).float()}


def check_schedule(schedule: Schedule) -> list[Check]:
    """Total noise grows, and the rate is its derivative (the field has shipped schedules where it is not)."""
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    step = 1e-5
    numeric = (schedule.sigma(t + step) - schedule.sigma(t - step)) / (2 * step)
    error = float(((schedule.dsigma(t) - numeric).abs() / numeric.abs().clamp(min=1e-9)).max())
    ends = schedule.sigma(torch.tensor([1e-6, 1.0]))
    grid = schedule.sigma(torch.linspace(1e-6, 1, 1001, dtype=torch.float64))
    finite = bool(torch.isfinite(torch.cat([ends, schedule.dsigma(torch.tensor([1e-6, 1.0]))])).all())
    return [
        Check(
            "schedule.rate",
            "the rate is the derivative of total noise",
            error < 1e-5,
            f"{error:.1e}",
            "central differences, relative",
        ),
        Check(
            "schedule.range",
            "total noise is positive, finite and increasing on (0, 1], in float32 at both ends",
            finite and bool((grid.diff() > 0).all()) and bool((grid > 0).all()),
            f"sigma(1) = {float(ends[1]):.3g}",
            "grid of 1,001 times",
        ),
    ]


def check_kernel(kernel: Kernel, *, end: float) -> list[Check]:
    """Rates, transitions, draws and prior fit together; ``end`` is the total noise at t = 1."""
    q = kernel.rate_matrix()
    off = q - torch.diag(q.diagonal())
    columns = float(q.sum(0).abs().max())
    expm = max(float((torch.matrix_exp(s * q) - kernel.transition_matrix(s)).abs().max()) for s in (0.01, 0.5, 3.0))
    a, b = kernel.transition_matrix(0.3), kernel.transition_matrix(0.9)
    semigroup = float((a @ b - kernel.transition_matrix(1.2)).abs().max())
    last = kernel.transition_matrix(end)
    rows = kernel.prior(4000, LENGTH, generator=torch.Generator().manual_seed(1), allowed=None)
    prior = torch.bincount(rows.reshape(-1), minlength=kernel.states).double() / rows.numel()
    gap = float((last - prior[:, None]).abs().sum(0).max() / 2)
    floor = 0.0 if float(prior.max()) == 1 else math.sqrt(kernel.states / rows.numel())
    draws = 20_000
    x0 = torch.zeros(draws, 1, dtype=torch.int64)
    drawn = kernel.sample(
        x0,
        torch.full((draws,), 0.7),
        random=Randomness(torch.Generator().manual_seed(2)),
        corrupt=torch.ones_like(x0, dtype=torch.bool),
    )
    found = torch.bincount(drawn[:, 0], minlength=kernel.states).double() / draws
    sampled = float((found - kernel.transition_matrix(0.7)[:, 0]).abs().sum() / 2)
    return [
        Check(
            "kernel.rates",
            "columns of Q sum to 0 and its other entries are not negative",
            columns < 1e-12 and float(off.min()) >= 0,
            f"{columns:.1e}",
            "Q written out",
        ),
        Check(
            "kernel.transition",
            "the closed form of P is exp(sigma Q)",
            expm < 1e-10,
            f"{expm:.1e}",
            "matrix exponential at three noise levels",
        ),
        Check(
            "kernel.semigroup",
            "P(s) P(t) = P(s + t)",
            semigroup < 1e-12,
            f"{semigroup:.1e}",
            "Chapman-Kolmogorov at one pair",
        ),
        Check(
            "kernel.sample",
            "draws of x_t follow P",
            sampled < 0.02,
            f"{sampled:.4f}",
            f"total variation, {draws:,} draws",
        ),
        Check(
            "kernel.prior",
            "noise at t = 1 is the prior",
            gap < 0.01 + 3 * floor,
            f"{gap:.4f}",
            "total variation from the worst token",
        ),
    ]


def prove_process(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Every check of the declared combination. Takes a few seconds on a CPU."""
    process = make_process(plan, registry, states=TOKENS)
    if process.kernel.mask is not None:
        process = make_process(plan, registry, states=TOKENS + 1)
    toy = Toy(process)
    end = float(process.schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))
    return [
        *check_schedule(process.schedule),
        *check_kernel(process.kernel, end=end),
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
    """With a perfect network the sampler gives back the law of the data: at once if it is exact, else with many steps."""
    process, rows = toy.process, 20_000
    sampler, generator = process.sampler, torch.Generator().manual_seed(4)
    steps = None if sampler.steps is None else 2 if sampler.exact else 64
    x = process.kernel.prior(rows, LENGTH, generator=generator, allowed=None)
    out = sampler.run(
        lambda x, t, _: toy.outputs(x, process.schedule.sigma(t), output),
        x,
        free=torch.ones_like(x, dtype=torch.bool),
        kernel=process.kernel,
        schedule=process.schedule,
        generator=generator,
        steps=steps,
    )
    clean = bool((out < TOKENS).all())
    distance, floor = toy.distance(out), math.sqrt(TOKENS**LENGTH / rows / 2)
    # two positions that move in the same of n steps ignore each other: an error of the order of 1/n
    error = 0.0 if sampler.exact or steps is None else 1.5 / steps
    why = sampler.heuristic()
    claim = "with a perfect network the sampler gives back the law of the data"
    taken = f"{steps} steps" if steps else f"{sampler.evaluations / rows:.1f} evaluations a row"
    measured = f"{distance:.4f} (chance alone: about {floor:.4f})", f"total variation, {taken}, {rows:,} rows"
    checks = [
        Check("sampler.clean", "no mask comes out", clean, "0 masks" if clean else "masks", f"{rows:,} rows"),
        Check("sampler.law", claim, distance < 2 * floor + error, *measured)
        if why is None
        else Check("sampler.heuristic", f"its law is not the model's: {why}", None, *measured),
    ]
    if sampler.exact:
        checks.append(
            Check(
                "sampler.bound",
                "no chance to move is out of range",
                sampler.clamped == 0,
                f"{sampler.clamped} were",
                f"{sampler.evaluations:,} evaluations",
            )
        )
    return checks
