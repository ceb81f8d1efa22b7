"""Samplers for masks: remasking (ReMDM), and decoding in an order that the network's confidence sets.

Axes: b batch, l length, n states.
"""

from itertools import pairwise
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.tokens.sampler import Sampler, StepsConfig
from sedd_graph.diffusion.tokens.walk import T_MIN, SamplerConfig, Walk

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class ReMDM(Sampler, kind="sampler"):
    """Ancestral steps that also mask tokens again, so that a mistake can be put right (ReMDM, arXiv 2503.00307, eq. 6).

    A step from alpha_t to alpha_s masks a token again with chance r, at most (1 - alpha_s) / alpha_t, and shows a masked one
    with chance (alpha_s - (1 - r) alpha_t) / (1 - alpha_t), which keeps the marginals of the noise process. ``remask`` says
    what r is: ``cap`` the smaller of eta and that bound; ``rescale`` eta of it; ``loop`` ancestral steps from t = 1 to
    ``t_on``, reaching ``alpha_on``, eta at that level until ``t_off``, ancestral steps from there; ``conf`` the bound shared out
    to the tokens by the softmax of minus the probabilities that they were drawn with (a heuristic).
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(StepsConfig):
        remask: Literal["cap", "rescale", "conf", "loop"] = "cap"
        eta: Share = 0.02
        t_on: Share = 0.55
        t_off: Share = 0.05
        alpha_on: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.9

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "ReMDM.Config":
            if not 0 < self.t_off < self.t_on < 1:
                raise ValueError(f"0 < t_off < t_on < 1 must hold, not t_off = {self.t_off:g}, t_on = {self.t_on:g}")
            return self

    def heuristic(self) -> str | None:
        if self.config.remask == "conf":
            return "what is masked again depends on what was drawn"
        return super().heuristic()

    def levels(self, walk: Walk, steps: int) -> list[tuple[float, float, float]]:
        """For each step alpha_t, alpha_s and eta, the last one down to clean text."""
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64)
        config = self.config
        if config.remask != "loop":
            alphas = [*torch.exp(-walk.schedule.sigma(times)).tolist(), 1.0]
            return [(a, b, config.eta) for a, b in pairwise(alphas)]
        # alpha is even in time on both sides of the plateau, whatever the schedule
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
        sure = torch.zeros(walk.x.shape, device=device)
        for now, below, eta in self.levels(walk, steps):
            sigma = -torch.full((rows,), now, device=device, dtype=torch.float64).log()
            law, masked = walk.clean(walk.time(sigma)), walk.masked
            bound = min(1.0, (1 - below) / now)
            seen = walk.free & ~masked
            if self.config.remask == "conf":
                shares = (-sure).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
                again, r = shares * bound, 0.0
            else:
                r = eta * bound if self.config.remask == "rescale" else min(eta, bound)
                again = seen * r
            show = 1.0 if below == 1 else (below - (1 - r) * now) / (1 - now)
            walk.remask(again)
            # only what was masked before the step
            walk.put(walk.draw(masked.double() * show, law, must=below == 1))
            sure = law.gather(-1, walk.x[..., None])[..., 0].where(masked, sure)
            walk.shown()


def commit(walk: Walk, drawn: Tensor, rank: Tensor, count: Tensor) -> None:
    """Keep the ``drawn`` [b, l] tokens of the ``count`` [b] positions whose ``rank`` [b, l] is least; the others stay masked."""
    place = rank.masked_fill(~walk.masked, torch.inf).argsort(-1).argsort(-1)
    walk.put(torch.where((place < count[:, None]) & walk.masked, drawn, walk.x))


class Confidence(Sampler, kind="sampler"):
    """All masks drawn, the surest kept, an even share each step (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992).

    ``by`` says what is sure: the ``probability`` of the token drawn, the ``margin`` between the two likeliest, a small
    ``entropy``, or chance (``random``). ``block`` fills in blocks of so many positions from left to right, with ``steps`` shared
    out among them.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(StepsConfig):
        by: Literal["probability", "margin", "entropy", "random"] = "probability"
        block: Annotated[int, pydantic.Field(ge=1)] | None = None

    def heuristic(self) -> str | None:
        if self.config.by != "random":
            return "the order in which tokens are kept depends on what the network is sure of"
        return super().heuristic()

    def walk(self, walk: Walk, steps: int) -> None:
        length = walk.x.shape[1]
        block = min(self.config.block or length, length)
        count = -(-length // block)
        for index in range(count):
            here = torch.zeros_like(walk.free)
            here[:, index * block : (index + 1) * block] = True
            share = max(1, steps // count + (index < steps % count))
            masked = (walk.masked & here).sum(1)
            for step in range(share):
                # as even as whole numbers allow, the first steps taking what is left over
                keep = masked // share + (step < masked % share)
                self._keep(walk, here, keep)
                walk.shown()

    def _keep(self, walk: Walk, here: Tensor, count: Tensor) -> None:
        places = walk.masked & here
        t = walk.time(-torch.log1p(-(walk.masked.double().mean(1).clamp(1e-9, 1 - 1e-9))))
        law = walk.clean(t, need=count > 0)
        drawn = walk.draw(places.double(), law, must=True)
        if self.config.by == "random":
            sure = walk.uniform(*walk.x.shape)
        elif self.config.by == "entropy":
            sure = torch.xlogy(law, law).sum(-1)
        elif self.config.by == "margin":
            best = law.topk(2, dim=-1).values
            sure = best[..., 0] - best[..., 1]
        else:
            sure = law.gather(-1, drawn[..., None])[..., 0]
        commit(walk, drawn, (-sure.double()).masked_fill(~places, torch.inf), count)


class EntropyBound(Sampler, kind="sampler"):
    """As many masks at once as the network knows nearly by themselves (EB-sampler, arXiv 2505.24857).

    In the order of their entropies, positions are drawn together while the entropies before the last sum to no more than
    ``gamma`` nats, which bounds what drawing them apart can lose. At least one falls each time; ``gamma`` = 0 takes one by one.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True

    class Config(SamplerConfig):
        gamma: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.1

    def heuristic(self) -> str | None:
        return "which tokens are drawn together depends on what the network is sure of"

    def walk(self, walk: Walk, steps: int) -> None:
        while bool((masked := walk.masked).any()):
            t = walk.time(-torch.log1p(-(masked.double().mean(1).clamp(1e-9, 1 - 1e-9))))
            law = walk.clean(t, need=masked.any(1)).double()
            entropy = -torch.xlogy(law, law).sum(-1)
            ordered = entropy.masked_fill(~masked, torch.inf).sort(-1).values
            before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(-1)[:, :-1]], -1)
            count = ((before <= self.config.gamma) & ordered.isfinite()).sum(-1).clamp(min=1)
            commit(walk, walk.draw(masked.double(), law, must=True), entropy, count)
            walk.shown()
