"""Samplers for masking kernels: remasking (``remdm``), and unmasking by confidence (``confidence``, ``entropy_bound``).

Axes: b batch, l length, n states.
"""

from itertools import pairwise
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.draws import NewStates, Where
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.tokens.sampler import PositionsConfig, Sampler, StepsConfig, Stepwise
from sedd_graph.diffusion.tokens.walk import T_MIN, SamplerConfig, Walk

from ._unmasking import MEASURES, Measure, commit, entropy_of, in_order, log_of

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class ReMDM(Sampler, kind="sampler"):
    """Remasking sampler: ancestral steps that also mask tokens again (ReMDM, arXiv 2503.00307).

    Remasking allows the model to revise tokens. A step from time t down to s remasks an unmasked token with probability
    r <= (1 - alpha_s) / alpha_t and unmasks a masked token with probability (alpha_s - (1 - r) alpha_t) / (1 - alpha_t)
    (eq. 6). Here alpha is the probability that a token is unmasked; the step preserves the marginal distributions of
    the forward process.

    The Config key ``remask`` chooses r. Tokens that are unmasked in one step are drawn independently, so the error
    depends on how many they are. With ``remask: cap`` and ``remask: rescale``, steps near the end unmask almost all
    masks, and the error falls slowly: on a toy of 3 positions and 3 tokens, where the distribution of samples can be
    computed exactly, total variation falls as steps^-0.4, and with ``cap`` more slowly still while ``eta`` is small
    (benchmarks/sampler_order.py). With ``remask: loop``, each step of the loop unmasks the same share of the masks,
    however many the steps, so the error does not vanish: on the toy, total variation tends to 0.006 with the other
    defaults, and to 0.13 with ``eta`` 1 and ``alpha_on`` 0.5.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(PositionsConfig):
        remask: Literal["cap", "rescale", "conf", "loop"] = "cap"
        """Choice of the remasking probability r, whose upper bound is (1 - alpha_s) / alpha_t. ``cap``: the smaller of
        ``eta`` and the bound; ``rescale``: ``eta`` times the bound; ``conf``: the bound times the softmax over tokens
        of minus the probability with which each token was drawn (a heuristic); ``loop``: ``cap`` at constant alpha
        between ``t_on`` and ``t_off``, ancestral steps before and after."""
        eta: Share = 0.02
        """Remasking probability per step, from 0 to 1; with ``rescale``, a factor on the upper bound; unused with
        ``conf``."""
        t_on: Share = 0.55
        """Time at which the loop starts, above ``t_off`` and below 1; used with ``loop`` only."""
        t_off: Share = 0.05
        """Time at which the loop ends, above 0 and below ``t_on``; used with ``loop`` only."""
        alpha_on: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.9
        """Probability alpha that a token is unmasked during the loop, between 0 and 1; used with ``loop`` only."""

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "ReMDM.Config":
            if not 0 < self.t_off < self.t_on < 1:
                raise ValueError(f"0 < t_off < t_on < 1 must hold, not t_off = {self.t_off:g}, t_on = {self.t_on:g}")
            return self

    config: Config

    def heuristic(self) -> str | None:
        if self.config.remask == "conf":
            return "which tokens are remasked depends on the probabilities that they were drawn with"
        if self.config.remask == "loop":
            return "each step of the loop unmasks the same share of the masks, however many the steps, and draws them independently"
        return super().heuristic()

    @property
    def order(self) -> float:
        return 0.4  # measured: benchmarks/sampler_order.py

    def levels(self, walk: Walk, steps: int) -> list[tuple[float, float, float]]:
        """Return the noise levels of all steps.

        Args:
            walk: State of the sampling run, with its schedule.
            steps: Number of steps before the last one.

        Returns:
            A list of tuples ``(alpha_t, alpha_s, eta)``, one per step from time t down to s: the probabilities that a
            token is unmasked at t and at s, and the Config value ``eta``. With ``remask: loop``, ``eta`` is 0 in steps
            that are not between ``t_on`` and ``t_off``. The last step ends at clean text, where alpha_s is 1.
        """
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64)
        config = self.config
        if config.remask != "loop":
            alphas = [*torch.exp(-walk.schedule.sigma(times)).tolist(), 1.0]
            return [(a, b, config.eta) for a, b in pairwise(alphas)]
        # alpha is linear in time before and after the plateau, whatever the schedule
        low = float(torch.exp(-walk.schedule.sigma(times[:1])))

        def alpha(t: float) -> float:
            if t > config.t_on:
                return low + (config.alpha_on - low) * (1 - t) / (1 - config.t_on)
            return config.alpha_on if t > config.t_off else 1 - (1 - config.alpha_on) * t / config.t_off

        grid = times.tolist()
        found = [
            (alpha(t), alpha(s), config.eta if config.t_off < s and t <= config.t_on else 0.0)
            for t, s in pairwise(grid)
        ]
        return [*found, (alpha(grid[-1]), 1.0, 0.0)]

    def walk(self, walk: Walk, steps: int) -> None:
        rows, device = walk.x.shape[0], walk.x.device
        confidence = torch.zeros(walk.x.shape, device=device)
        for now, below, eta in self.levels(walk, steps):
            sigma = -torch.full((rows,), now, device=device, dtype=torch.float64).log()
            outputs, masked = walk.outputs_where_drawn(walk.time(sigma)), walk.masked
            bound = min(1.0, (1 - below) / now)
            visible = walk.free & ~masked
            if self.config.remask == "conf":
                shares = (-confidence).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
                again, r = shares * bound, 0.0
            else:
                r = eta * bound if self.config.remask == "rescale" else min(eta, bound)
                again = visible * r
            unmask = 1.0 if below == 1 else (below - (1 - r) * now) / (1 - now)
            walk.remask(again)
            # only positions that were masked before the step
            move, clean = masked.double() * unmask, walk.clean_at(outputs)
            if self.config.remask == "conf":
                walk.put(_draw_measured(walk, move, clean, _probability, confidence, must=below == 1))
            else:
                walk.put(walk.draw(move, clean, must=below == 1))
            walk.end_step()


def _draw_measured(
    walk: Walk, move: Tensor, clean: NewStates, measure: Measure, table: Tensor, *, must: bool = True
) -> Tensor:
    """Draw tokens as :meth:`Walk.draw` does, and measure each of the distributions that they are drawn from.

    Args:
        walk: State of the sampling run.
        move: As of :meth:`Walk.draw`.
        clean: The predicted distributions of some positions.
        measure: The measure.
        table: Receives the measures of the positions that are drawn, [b, l].
        must: As of :meth:`Walk.draw`.

    Returns:
        The rows with new tokens, int64 [b, l].
    """
    if walk.joint:  # tokens are drawn together, so that their distributions are of all masks of a row
        drawn = walk.draw(move, clean, must=must)
        row, place = (v for v in (walk.masked if must else drawn != walk.x).nonzero().unbind(1))
        table[row, place] = measure(clean(Where(row, place)), drawn[row, place]).to(table.dtype)
        return drawn
    last: list[Tensor] = []

    def kept(where: Where) -> Tensor:
        last[:] = [clean(where)]
        return last[0]

    def note(where: Where, tokens: Tensor) -> None:
        table[where.row, where.place] = measure(last[0], tokens).to(table.dtype)

    return walk.draw(move, kept, must=must, note=note)


def _probability(clean: Tensor, tokens: Tensor) -> Tensor:
    return take(clean, tokens)


class Confidence(Stepwise, Sampler, kind="sampler"):
    """Confidence-based unmasking: each step draws a token for every mask and retains the most confident ones.

    Every step unmasks the same number of tokens, up to rounding (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992).
    Of positions that are equally confident up to rounding, the first is unmasked first.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(StepsConfig):
        by: Literal["probability", "margin", "entropy", "random"] = "probability"
        """Measure of confidence. ``probability``: that of the drawn token; ``margin``: difference of the probabilities
        of the two most likely tokens; ``entropy``: negative entropy of the predicted distribution; ``random``: a random
        order."""
        block: Annotated[int, pydantic.Field(ge=1)] | None = None
        """Number of positions per block; blocks are unmasked one after another from left to right, and ``steps`` is
        divided among them. null: one block, the whole row."""

    config: Config

    def heuristic(self) -> str | None:
        if self.config.by != "random":
            return "the order of unmasking depends on the network's confidence"
        return super().heuristic()

    def walk(self, walk: Walk, steps: int) -> None:
        kept = self.begin(walk, steps)
        for number in range(max(steps, -(-walk.x.shape[1] // self._block(walk)))):  # each block takes at least one step
            kept = self.advance(walk, kept, number, steps)

    def _block(self, walk: Walk) -> int:
        """Return the number of positions per block."""
        length = walk.x.shape[1]
        return min(self.config.block or length, length)

    def begin(self, walk: Walk, steps: int) -> tuple[Tensor, ...]:
        """Return the number of masks in the current block of each row before its first step, int64 [b]."""
        return (walk.masked.sum(1),)

    def advance(self, walk: Walk, kept: tuple[Tensor, ...], number: int, steps: int) -> tuple[Tensor, ...]:
        block = self._block(walk)
        index, step, share = _turn(number, steps, -(-walk.x.shape[1] // block))
        here = torch.zeros_like(walk.free)
        here[:, index * block : (index + 1) * block] = True
        masked = (walk.masked & here).sum(1) if step == 0 else kept[0]
        # the remainder goes to the first steps
        self._unmask(walk, here, masked // share + (step < masked % share))
        walk.end_step()
        return (masked,)

    def _unmask(self, walk: Walk, here: Tensor, count: Tensor) -> None:
        places = walk.masked & here
        t = walk.time(-torch.log1p(-(walk.masked.double().mean(1).clamp(1e-9, 1 - 1e-9))))
        outputs = walk.outputs_where_drawn(t, count > 0)
        move, clean = places.double(), walk.clean_at(outputs)
        if self.config.by == "random":
            drawn = walk.draw(move, clean, must=True)
            rank = walk.uniform(*walk.x.shape).neg().masked_fill(~places, torch.inf)
        else:
            confidence = torch.zeros(walk.x.shape, dtype=torch.float64, device=walk.x.device)
            drawn = _draw_measured(walk, move, clean, MEASURES[self.config.by], confidence)
            rank = in_order(confidence.neg().masked_fill(~places, torch.inf))
        commit(walk, drawn, rank, count)


def _turn(number: int, steps: int, count: int) -> tuple[int, int, int]:
    """Return where step ``number`` lies: the index of its block, its own index there, and the block's number of steps.

    The ``steps`` are divided among ``count`` blocks; the first ones take the remainder, and each takes at least one.
    """
    even, longer = divmod(steps, count)
    if number < longer * (even + 1):
        return *divmod(number, even + 1), even + 1
    index, step = divmod(number - longer * (even + 1), max(1, even))
    return longer + index, step, max(1, even)


class EntropyBound(Stepwise, Sampler, kind="sampler"):
    """Entropy-bounded unmasking: each step unmasks as many low-entropy positions as a bound allows (EB-sampler).

    Masked positions are sorted by the entropy of their predicted distributions, lowest first. A step unmasks the
    longest prefix in which the entropies of all but the last position sum to at most ``gamma`` nats, which bounds the
    error of drawing these positions independently (arXiv 2505.24857). Each step unmasks at least one position per row.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(SamplerConfig):
        gamma: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.1
        """Upper bound on the sum of entropies per step, nats, from 0 to 1e6. 0: one token per step."""

    config: Config

    def heuristic(self) -> str | None:
        return "which tokens are drawn together depends on the network's confidence"

    def walk(self, walk: Walk, steps: int) -> None:
        while self._unmask(walk):
            pass

    def begin(self, walk: Walk, steps: int) -> tuple[Tensor, ...]:
        return ()

    def advance(self, walk: Walk, kept: tuple[Tensor, ...], number: int, steps: int) -> tuple[Tensor, ...]:
        self._unmask(walk)
        return ()

    def _unmask(self, walk: Walk) -> bool:
        """Take one step, and return True; if no masks are left, return False."""
        masked = walk.masked
        t = walk.time(-torch.log1p(-(masked.double().mean(1).clamp(1e-9, 1 - 1e-9))))
        single = walk.clean_at(walk.outputs_where_drawn(t, masked.any(1)))

        def clean(where: Where) -> Tensor:
            return single(where).double()

        entropy = torch.zeros(walk.x.shape, dtype=torch.float64, device=walk.x.device)
        drawn = _draw_measured(walk, masked, clean, entropy_of, entropy)
        if drawn is walk.x:
            return False
        ordered = entropy.masked_fill(~masked, torch.inf).sort(-1).values
        before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(-1)[:, :-1]], -1)
        count = ((before <= self.config.gamma) & ordered.isfinite()).sum(-1).clamp(min=1)
        rank = in_order(log_of(entropy).masked_fill(~masked, torch.inf))
        commit(walk, drawn, rank, count)
        walk.end_step()
        return True
