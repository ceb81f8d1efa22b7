"""A string process of our own: noise takes tokens off the end, generation appends them.

Every token is lost at rate 1, always the last one first, so that a noisy string is a prefix of the clean one: of n tokens, k are
left with the binomial probability of exp(-sigma). The network says which token comes next, and how many are missing.
Axes: b rows, w = 1 + tokens of a noisy string (padded), v data tokens.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.plugin import (
    Batch,
    Check,
    Component,
    ComponentConfig,
    Context,
    Output,
    Randomness,
    Schedule,
    StringDraw,
    StringKernel,
    StringObjective,
    Strings,
    StringSampler,
    StringTable,
    StringWalk,
    rebuild,
)

LOG_NEXT = Output(
    "log_next", "float b l v", "log of the probability of the next token times the expected number missing"
)
ONLY_PREFIX = "the kernel prefix"


class Prefix(StringKernel, kind="string_kernel"):
    """Tokens are lost from the end; noise is the empty string."""

    class Config(ComponentConfig):
        pass

    config: Config

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_NEXT,),)

    def table(self, *, one_length: bool) -> StringTable:
        return PrefixTable(self, one_length=one_length)

    def refuses_prompts(self) -> str | None:
        return "generation only appends: text can be given by no hole"

    def weights(self, sigma: Tensor) -> Tensor:
        """[b, 1]: rate of appending one missing token, per unit of sigma."""
        return (1 / torch.expm1(sigma))[:, None]

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, 1]: probability that one missing token is appended on the way from ``sigma`` down."""
        return (torch.expm1(sigma - sigma_next) / torch.expm1(sigma))[:, None]

    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        tokens = torch.full((rows, 1), self.start, device=generator.device)
        return Strings(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def sample(self, batch: Batch, sigma: Tensor, *, random: Randomness) -> Strings:
        """Draw the prefixes that are left at total noise ``sigma`` [b]."""
        lost = random.rand(*batch.tokens.shape) < -torch.expm1(-sigma.float())[:, None]
        left = (batch.attend & ~lost).sum(-1, keepdim=True)
        place = torch.arange(batch.width + 1, device=batch.tokens.device)
        tokens = F.pad(batch.tokens, (1, 0), value=self.start)
        none = torch.zeros_like(tokens)
        return rebuild(tokens, place <= left, none, lambda at: at, start=self.start)


class NextTokenHead(Component, kind="head"):
    """The next token and how many are missing: log softmax plus log of a positive number, in float32."""

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.token, self.count = nn.Linear(self.axis("d"), self.axis("v")), nn.Linear(self.axis("d"), 1)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l v"]:
        return self.token(x).float().log_softmax(-1) + F.softplus(self.count(x).float()).clamp(min=1e-9).log()


@dataclasses.dataclass(frozen=True)
class PrefixDraw(StringDraw):
    """``missing`` float32 [b]: tokens that are lost; ``following`` int64 [b]: the first of them; ``weight`` float32 [b]."""

    missing: Tensor
    following: Tensor
    weight: Tensor


class PrefixLoss(StringObjective[Prefix, PrefixDraw], kind="string_objective"):
    """A bound on -log p, nats: of the rate u of appending each token and the true one r, the integral of u - r log u + r log r - r."""

    class Config(ComponentConfig):
        t_min: Annotated[float, pydantic.Field(gt=0, lt=0.1)] = 1e-4
        """Least time that is drawn."""

    config: Config

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, Prefix) else ONLY_PREFIX

    def corrupt(
        self, batch: Batch, kernel: Prefix, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> PrefixDraw:
        width = 1 - self.config.t_min
        if t is None:
            t = self.config.t_min + width * random.low_discrepancy(len(batch)).to(batch.tokens.device)
        return self._draw(batch, kernel, schedule.sigma(t), width * schedule.dsigma(t), random)

    def bound_draw(self, batch: Batch, kernel: Prefix, schedule: Schedule, *, random: Randomness) -> PrefixDraw:
        u = random.low_discrepancy(len(batch)).double().to(batch.tokens.device).clamp(min=1e-9)
        # a share of 1e-4 + u^3 of the tokens is lost: it dwells on little noise, where losses are rare and weigh much
        hit = 1e-4 + (1 - 1e-4) * u**3
        slope = 3 * (1 - 1e-4) * u**2 / (1 - hit)
        return self._draw(batch, kernel, -torch.log1p(-hit), slope, random)

    def _draw(self, batch: Batch, kernel: Prefix, sigma: Tensor, slope: Tensor, random: Randomness) -> PrefixDraw:
        """A draw at total noise ``sigma`` [b]; ``slope`` [b] is its derivative in what was drawn evenly."""
        strings = kernel.sample(batch, sigma, random=random)
        missing = batch.attend.sum(-1) - strings.lengths
        following = F.pad(batch.tokens, (0, 1)).gather(1, strings.lengths[:, None])[:, 0]
        weight = (slope * kernel.weights(sigma)[:, 0]).float()
        return PrefixDraw(strings.tokens, strings.attend, sigma.float(), missing.float(), following, weight)

    def loss(self, outputs: Mapping[str, Tensor], draw: PrefixDraw, kernel: Prefix) -> Tensor:
        last = (draw.attend.sum(-1) - 1)[:, None, None]
        log_u = outputs["log_next"].float().gather(1, last.expand(-1, -1, kernel.data_tokens))[:, 0]
        true = log_u.gather(1, draw.following.clamp(max=kernel.data_tokens - 1)[:, None])[:, 0]
        constant = torch.xlogy(draw.missing, draw.missing) - draw.missing
        return draw.weight * (log_u.exp().sum(-1) - draw.missing * true + constant)


class Append(StringSampler[Prefix], kind="string_sampler"):
    """Steps of even length in time; each appends at most one token."""

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 256
        """Number of steps."""

    config: Config

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if isinstance(kernel, Prefix) else ONLY_PREFIX

    def walk(self, walk: StringWalk[Prefix], steps: int) -> None:
        times = torch.linspace(1.0, 1e-5, steps + 1, device=walk.fixed.device, dtype=torch.float64)
        levels = torch.cat([walk.schedule.sigma(times), times.new_zeros(1)])[:, None].expand(-1, walk.rows)
        for now, after in itertools.pairwise(levels):
            weights = walk.outputs(now)["log_next"].double().exp()
            if walk.allowed is not None:
                weights = weights * walk.allowed
            last = torch.arange(weights.shape[1], device=weights.device) == walk.strings.lengths[:, None]
            chance = walk.kernel.leap(now, after) * weights.sum(-1) * last
            walk.edit(walk.rand(*chance.shape) < chance, weights, torch.zeros_like(last))
            walk.end_step()


class PrefixTable(StringTable):
    """All strings of at most three tokens, and the posterior of what is missing behind each."""

    kernel: Prefix

    def __init__(self, kernel: Prefix, *, one_length: bool) -> None:
        super().__init__(kernel, longest=3, clean=3, one_length=one_length)
        self.sizes = torch.tensor([len(s) for s in self.strings])
        self.follows = torch.zeros(len(self.strings), len(self.strings), 2, dtype=torch.float64)
        self.begins = torch.zeros(len(self.strings), len(self.strings), dtype=torch.float64)
        for (i, s), (j, x0) in itertools.product(enumerate(self.strings), repeat=2):
            if x0[: len(s)] == s:
                self.begins[i, j] = math.comb(len(x0), len(s))
                if len(x0) > len(s):
                    self.follows[i, j, x0[len(s)]] = len(x0) - len(s)

    def joint(self, sigma: Tensor) -> Tensor:
        """Probability of each noisy string (second) with each clean one (third), float64 [b, s, s]."""
        left, lost = torch.exp(-sigma.double())[:, None, None], -torch.expm1(-sigma.double())[:, None, None]
        noisy, gone = self.sizes[:, None], (self.sizes - self.sizes[:, None]).clamp(min=0)
        return left**noisy * lost**gone * self.begins * self.law

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        index = self.number(strings).clamp(max=len(self.strings) - 1)
        posterior = self.joint(sigma)[torch.arange(len(index)), index]
        posterior = posterior / posterior.sum(-1, keepdim=True).clamp(min=1e-300)
        u = torch.einsum("bx,bxv->bv", posterior, self.follows[index])
        return {"log_next": u.clamp(min=1e-30).log().float()[:, None].expand(-1, strings.tokens.shape[1], -1)}

    def check_kernel(self, end: float) -> list[Check]:
        draws, level = 20_000, torch.tensor([0.7])
        chosen = torch.multinomial(self.law, draws, replacement=True, generator=torch.Generator().manual_seed(1))
        random = Randomness(torch.Generator().manual_seed(2))
        noisy = self.number(self.kernel.sample(self.batch(chosen), level.expand(draws), random=random))
        found = torch.bincount(noisy, minlength=len(self.strings)).double() / draws
        gap = float((found - self.joint(level)[0].sum(-1)).abs().sum() / 2)
        claim = "draws of x_t are binomial prefixes"
        return [
            Check("prefix.sample", claim, gap < 0.03, f"{gap:.4f}", "total variation, 20,000 draws"),
            Check(
                "prefix.prior",
                "noise at t = 1 is empty",
                math.exp(-end) < 0.01,
                f"{math.exp(-end):.1e}",
                "exp(-sigma(1))",
            ),
        ]
