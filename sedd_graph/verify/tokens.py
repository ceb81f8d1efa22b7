"""The noise process held to an enumerable toy: the same components and configs on three tokens and two positions.

What the parts claim is checked in :mod:`sedd_graph.verify.noise`; here the whole, against the law of all nine sequences (of
all 81 of four positions, where text is written in blocks, which are two here). Axes: b rows, l positions, n states.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine.positionwise_suffix import take
from sedd_graph.verify.noise import check_kernel, check_precision, check_schedule

__all__ = ["TOKENS", "Toy", "prove_objective", "prove_parts", "prove_process", "prove_sampler", "prove_whole"]

TOKENS, LENGTH = 3, 2
"""Of the toy: how many tokens, and how long a sequence."""
_LOWEST = 25.0
"""Minus the logarithm of the least noise that a table of transitions knows."""


class Toy:
    """A law over the nine sequences of two tokens, and its exact scores and posteriors under a process."""

    length, rows = LENGTH, 20_000
    """Positions of a sequence, and how many rows a sampler is tried on."""

    def __init__(self, process: TokenParts) -> None:
        self.process = process
        kernel = process.kernel
        generator = torch.Generator().manual_seed(7)
        weights = torch.rand(TOKENS**self.length, generator=generator, dtype=torch.float64) + 0.05
        self.law = weights / weights.sum()
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=self.length)))
        self.states = kernel.states
        self._prepare()

    def _prepare(self) -> None:
        kernel = self.process.kernel
        joint = torch.zeros(self.states, self.states, dtype=torch.float64)
        joint[self.sequences[:, 0], self.sequences[:, 1]] = self.law
        self.joint = joint
        self._table = torch.zeros(35 * 10_000, kernel.states, kernel.states, dtype=torch.float64)
        self._made = torch.zeros(len(self._table), dtype=torch.bool)

    @property
    def entropy(self) -> float:
        return float(-(self.law * self.law.log()).sum())

    def distance(self, rows: Tensor) -> float:
        """Total variation between the law and the counts of ``rows`` [b, l]."""
        code = (rows.clamp(max=TOKENS - 1) * TOKENS ** torch.arange(self.length).flip(0)).sum(-1)
        found = torch.bincount(code, minlength=len(self.law)).double() / len(rows)
        return float((found - self.law).abs().sum() / 2)

    def _transition(self, sigma: Tensor) -> Tensor:
        """P at ``sigma`` [b], float64 [b, n, n], of levels 0.01 % apart, each made once.

        Samplers whose rows keep their own time would otherwise ask for as many as there are rows, at every turn.
        """
        levels = ((sigma.double().log() + _LOWEST) * 10_000).round().long().clamp(0, len(self._table) - 1)
        new = torch.unique(levels[~self._made[levels]])
        self._table[new] = self.process.kernel.transition_matrix(torch.exp(new / 10_000 - _LOWEST).double())
        self._made[new] = True
        return self._table[levels]

    def outputs(self, x: Tensor, sigma: Tensor, name: str, at: Tensor | None = None) -> dict[str, Tensor]:
        """What a perfect network would put out for rows ``x`` [b, 2] at noise ``sigma`` [b], at all positions or those in
        ``at`` [b, k]."""
        kernel, rows = self.process.kernel, torch.arange(len(x))
        p = self._transition(sigma)
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
        if at is not None:
            exact, x = exact.gather(1, at[..., None].expand(-1, -1, self.states)), x.gather(1, at)
        outputs = {name: exact.clamp(min=1e-300).log().clamp(min=-1e6).float()}
        # in the kernel's own outputs and back, so that what it makes of a network is verified, too
        return dict(kernel.translate(kernel.express(outputs, x, sigma), x, sigma))

    def answers(self, draw: Draw, batch: Batch, name: str) -> dict[str, Tensor]:
        """What a perfect network would say to a draw."""
        return self.outputs(draw.xt, draw.sigma, name)

    def written(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        """Sample from noise ``x`` [b, l] with a perfect network."""
        sampler, schedule = self.process.sampler, self.process.schedule

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            return self.outputs(x, schedule.sigma(t), name, at)

        return sampler.run(denoise, x, settings, steps=steps)


class BlockToy(Toy):
    """A law over the 81 sequences of four tokens, noised two by two, each two given all before them."""

    length, rows = 2 * LENGTH, 100_000

    def _prepare(self) -> None:
        # laws of the first two, [1, 3, 3], and of the last two given the first, [9, 3, 3]
        joint = self.law.view(TOKENS**LENGTH, TOKENS, TOKENS)
        self._laws = (joint.sum((1, 2)).view(1, TOKENS, TOKENS), joint / joint.sum((1, 2), keepdim=True))

    def predict(self, x: Tensor, before: Tensor) -> Tensor:
        """log p(clean token | all else that is seen) for two noised tokens ``x`` [b, 2] behind clean ones [b, 0 or 2]."""
        mask, rows = TOKENS, torch.arange(len(x))
        given = before[:, 0] * TOKENS + before[:, 1] if before.shape[1] else torch.zeros_like(rows)
        pair = self._laws[before.shape[1] // LENGTH][given]
        pair = torch.cat([pair, pair.sum(1, keepdim=True)], dim=1)  # where the other is masked: whatever it is
        pair = torch.cat([pair, pair.sum(2, keepdim=True)], dim=2)
        law = torch.stack([pair[rows, :, x[:, 1]], pair[rows, x[:, 0]]], dim=1)
        law = law.index_fill(-1, torch.tensor([mask]), 0.0)
        law = law / law.sum(-1, keepdim=True)
        carried = torch.nn.functional.one_hot(x, TOKENS + 1).double()
        return torch.where((x == mask)[..., None], law, carried).log().clamp(min=-1e6).float()

    def answers(self, draw: Draw, batch: Batch, name: str) -> dict[str, Tensor]:
        parts = [self.predict(draw.xt[:, s : s + LENGTH], batch.tokens[:, :s]) for s in (0, LENGTH)]
        return {name: torch.cat(parts, dim=1)}

    def written(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        def given(before: Tensor) -> Denoise:
            def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
                said = self.predict(x, before[rows])
                return {name: said if at is None else take(said, at, 1)}

            return denoise

        return write_blocks(self.process.sampler, given, x, settings, block=LENGTH, steps=steps)


Make = Callable[[int | None], TokenParts]
"""Makes the declared process, for the declared number of states (None) or another."""


def prove_process(make: Make, output: str) -> list[Check]:
    """Verify the declared combination; ``output`` is the name of the graph's. Takes a few seconds on a CPU."""
    return [*prove_parts(make), *prove_whole(make, output)]


@torch.no_grad()
def prove_parts(make: Make) -> list[Check]:
    """Verify the schedule and the kernel, each by itself."""
    declared, small = make(None).kernel, _cut_down(make)
    end = float(small.schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))
    return [
        *check_schedule(small.schedule),
        *check_kernel(small.kernel, end=end),
        dataclasses.replace(check_precision(declared), name="kernel.declared"),
        *_mixed(declared, end),
    ]


def _mixed(declared: Kernel, end: float) -> list[Check]:
    """Whether the declared kernel comes to its prior, where how fast it mixes is a matter of its size."""
    gap = declared.unmixed(end)
    if gap is None:
        return []
    how = f"total variation from the tokens that are left most seldom, at total noise {end:.3g}; raise it at t = 1 where this fails"
    return [
        Check("kernel.mixed", "noise at t = 1 is the prior at the declared size, too", gap < 0.02, f"{gap:.4f}", how)
    ]


def prove_whole(make: Make, output: str) -> list[Check]:
    """Verify the objective and the sampler with a perfect network."""
    return [*prove_objective(make, output), *prove_sampler(make, output)]


@torch.no_grad()
def prove_objective(make: Make, output: str) -> list[Check]:
    """Verify the bound with a perfect network; of blocks, which may train by clipped draws, also in the form that evaluation
    takes."""
    toy = _toy(make)
    checks = [_bound(toy, output)]
    return checks if toy.process.objective.block is None else [*checks, _bound(toy, output, evaluated=True)]


@torch.no_grad()
def prove_sampler(make: Make, output: str) -> list[Check]:
    """Verify the distribution of samples with a perfect network."""
    return _sampler(_toy(make), output)


def _toy(make: Make) -> Toy:
    small = _cut_down(make)
    return Toy(small) if small.objective.block is None else BlockToy(small)


def _cut_down(make: Make) -> TokenParts:
    """The declared process on three tokens, and the mask where there is one."""
    process = make(TOKENS)
    return process if process.kernel.mask is None else make(TOKENS + 1)


def _bound(toy: Toy, output: str, *, evaluated: bool = False) -> Check:
    """With a perfect network the bound is the entropy of the data: catches transposes, missing terms and wrong factors.

    ``evaluated``: in the form that evaluation takes instead of training's.
    """
    process, rows = toy.process, 30_000
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(toy.law, rows, replacement=True, generator=generator)
    batch = Batch.of(toy.sequences[chosen])
    random, objective = Randomness(generator), process.objective.bound()
    if evaluated:
        objective, draw = objective.bound_draw(batch, process.kernel, process.schedule, random=random)
    else:
        draw = objective.corrupt(batch, process.kernel, process.schedule, random=random)
    outputs = toy.answers(draw, batch, output)
    nats = objective.loss(outputs, draw, batch, process.kernel, process.schedule).double()
    # subtracting -log p(x0), whose mean is the entropy, leaves less to chance
    gap = nats + toy.law[chosen].log()
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(rows))
    # the prior term, and the stretch of time below t_min
    left_out = 0.0 if evaluated else 0.01 * toy.entropy
    # where time has steps, two positions that move in one of them ignore each other, as in samplers
    steps = getattr(objective.config, "steps", None)
    left_out += 0.0 if steps is None else 1.5 / steps
    return Check(
        "objective.evaluated" if evaluated else "objective.tight",
        "with a perfect network the bound is the entropy of the data",
        abs(mean) < 5 * error + left_out,
        f"{toy.entropy + mean:.4f} +- {error:.4f} against {toy.entropy:.4f} nats",
        f"{rows:,} draws on {len(toy.law)} sequences",
    )


def _sampler(toy: Toy, output: str) -> list[Check]:
    """With a perfect network the sampler gives back the law of the data: at once if it is exact, else with many steps."""
    process, rows = toy.process, toy.rows
    sampler, generator = process.sampler, torch.Generator().manual_seed(4)
    steps = None if sampler.steps is None else 2 if sampler.exact else 64
    x = process.kernel.prior(rows, toy.length, generator=generator, allowed=None)
    free = torch.ones_like(x, dtype=torch.bool)
    settings = WalkSettings(free=free, kernel=process.kernel, schedule=process.schedule, generator=generator)
    out = toy.written(x, output, settings, steps)
    clean = bool((out < TOKENS).all())
    distance, floor = toy.distance(out), math.sqrt(len(toy.law) / rows / 2)
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
