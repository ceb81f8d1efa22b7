"""The walk from noise to text: the rows on their way, and what all samplers share.

A :class:`Walk` holds the rows on their way and what all samplers share: asking the network (only for rows that changed,
where time does not matter to it), drawing in two stages, what may move and what may come out. Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Protocol

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, going, jump, sharpen
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["T_MIN", "Denoise", "OnStep", "SamplerConfig", "Walk", "WalkSettings"]


class Denoise(Protocol):
    """``denoise(x [r, l], t [r], rows [r])`` gives the model's outputs for some rows of the batch, whose indices are ``rows``:
    ``log_score`` or ``log_x0``, float32 [r, l, n]; with ``at`` int64 [r, k] for these positions alone, [r, k, n]."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None, /) -> Mapping[str, Tensor]: ...


OnStep = Callable[[int, Tensor], None]
"""Called with the number of the step and the rows after it."""


ROUNDING = 1e-4
"""What chances may miss 0 or 1 by without being counted as out of range."""


T_MIN = 1e-5
"""Where steps in time end and noise removal begins."""


class SamplerConfig(Conditions):
    """What every sampler can do to where a moving token goes. Whether it moves is left alone."""

    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Weights to the power 1/temperature; 0 takes the greatest."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """Only the fewest greatest weights that hold this share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """The process that a walk reverses, and the conditions on its rows.

    ``free`` bool [b, l] marks the positions that move; ``allowed`` bool [n], [l, n] or [b, l, n] the data tokens that may be
    drawn (None: all); ``matching`` is a condition on whole rows, for a kernel with carry-over unmasking. ``timeless`` says that
    the network's outputs do not depend on time. ``on_step`` is called after each step.
    """

    free: Tensor
    kernel: Kernel
    schedule: Schedule
    generator: torch.Generator
    allowed: Tensor | None = None
    matching: Matching | None = None
    timeless: bool = False
    on_step: OnStep | None = None


class Walk:
    """Rows on their way from noise to text: ``x`` int64 [b, l].

    ``evaluations`` counts rows evaluated by the network, ``clamped`` moves whose probabilities were out of range.
    """

    def __init__(self, denoise: Denoise, x: Tensor, settings: WalkSettings, config: SamplerConfig) -> None:
        kernel, matching = settings.kernel, settings.matching
        self.x, self.free, self.kernel = x, settings.free, kernel
        self.schedule, self.generator, self.timeless = settings.schedule, settings.generator, settings.timeless
        self.evaluations = self.clamped = 0
        self._denoise, self._config, self._on_step = denoise, config, settings.on_step
        data = torch.arange(kernel.states, device=x.device) != (-1 if kernel.mask is None else kernel.mask)
        self._may = data if settings.allowed is None else data & settings.allowed
        self._matching = matching
        if matching is not None:
            matching.feasible(x, self.masked, self._may)
        if self._may.dim() > 1:
            self._mend(self.free)  # noise knows nothing of positions
        self._kept: dict[str, Tensor] = {}
        self._seen = torch.full_like(x, -1)
        self._steps = 0
        self.shown()

    # -- where the rows are -----------------------------------------------------------------------------------------

    @property
    def masked(self) -> Tensor:
        """bool [b, l]: free positions that are still masked (none for a kernel without a mask)."""
        return torch.zeros_like(self.free) if self.kernel.mask is None else self.free & (self.x == self.kernel.mask)

    def put(self, x: Tensor) -> None:
        """Go on to the rows ``x``, free positions alone."""
        self.x = torch.where(self.free, x, self.x)

    def shown(self, x: Tensor | None = None) -> None:
        """A step is over, at ``x`` or where the rows are: tell who looks on."""
        if self._on_step is not None:
            self._on_step(self._steps, self.x if x is None else x)
        self._steps += 1

    # -- the network ------------------------------------------------------------------------------------------------

    def outputs(self, t: Tensor, need: Tensor | None = None) -> Mapping[str, Tensor]:
        """The network's outputs at ``x`` and times ``t`` [b]. Rows that ``need`` bool [b] leaves out may hold anything.

        A timeless network is asked only about rows that changed since it was last asked.
        """
        asked = (self.x != self._seen).any(-1) if self.timeless else torch.ones_like(self.free[:, 0])
        if need is not None:
            asked = asked & need
        rows = asked.nonzero()[:, 0]
        self.evaluations += len(rows)
        if len(rows) == len(asked):
            self._kept = dict(self._denoise(self.x, t, rows))
        elif len(rows):
            fresh = self._denoise(self.x[rows], t[rows], rows)
            for name, value in fresh.items():
                old = self._kept.get(name)
                old = value.new_zeros(len(asked), *value.shape[1:]) if old is None else old
                self._kept[name] = old.index_copy(0, rows, value)
        self._seen = torch.where(asked[:, None], self.x, self._seen)
        return self._kept

    def time(self, sigma: Tensor) -> Tensor:
        """The time, float32 [b], of total noise ``sigma`` [b]; a timeless network is spared the search."""
        t = torch.full_like(sigma, T_MIN) if self.timeless else self.schedule.time(sigma.double())
        return t.clamp(min=T_MIN, max=1.0).float()

    def score(self, t: Tensor, sigma: Tensor | None = None, need: Tensor | None = None) -> Tensor:
        """Scores p(x with another token at i) / p(x), float32 [b, l, n], 1 at x itself."""
        outputs = self.outputs(t, need)
        if "log_score" in outputs:
            return outputs["log_score"].float().exp()
        sigma = self.schedule.sigma(t) if sigma is None else sigma.float()
        return self.kernel.log_score(outputs["log_x0"].float(), self.x, sigma).exp()

    def clean(self, t: Tensor, need: Tensor | None = None) -> Tensor:
        """The law of the clean token given all other positions, [b, l, n].

        Under a mask a score is that law up to a factor; elsewhere a head that gives ``log_x0`` is needed.
        """
        return self._clean(self.outputs(t, need), self.x)

    def _clean(self, outputs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if "log_x0" in outputs:
            return outputs["log_x0"].float().exp()
        mask = self.kernel.mask
        assert mask is not None
        law = outputs["log_score"].float().index_fill(-1, torch.tensor([mask], device=x.device), -torch.inf)
        carried = torch.nn.functional.one_hot(x, self.kernel.states).to(law.dtype)
        return torch.where((x == mask)[..., None], law.softmax(-1), carried)

    def reveal(self, chosen: Tensor, t: Tensor) -> None:
        """The masks at ``chosen`` bool [b, l] fall at times ``t`` [b]: the network is asked about their rows and places alone."""
        chosen = chosen & self.free
        some = chosen.any(1)
        rows = some.nonzero()[:, 0]
        # where rows must match, what the other masks may become counts too
        places = chosen if self._matching is None else self.masked & some[:, None]
        count = places.sum(1)
        # these places of each row in their order, then others to fill up
        at = places[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        real = torch.arange(at.shape[1], device=at.device) < count[rows, None]
        x = self.x[rows]
        self.evaluations += len(rows)
        law = self._clean(self._denoise(x, t[rows], rows, at), x.gather(1, at))
        self.put(self.draw(chosen.double(), lambda _: law[real], must=True))

    # -- moving -----------------------------------------------------------------------------------------------------

    def uniform(self, *shape: int) -> Tensor:
        """float64 in (0, 1]."""
        return 1 - torch.rand(*shape, generator=self.generator, device=self.x.device, dtype=torch.float64)

    def draw(self, move: Tensor, weights: Tensor | Callable[[Tensor], Tensor], *, must: bool = False) -> Tensor:
        """Rows like ``x`` in which each free position has moved with chance ``move`` [b, l] to a token drawn from ``weights``
        [b, l, n] (what they say of the mask and of tokens that are not allowed is passed over). Weights may be a function
        of the positions that move, bool [b, l], which gives their rows, [moving, n].

        Where nothing that is allowed has any weight, a position stays, or (``must``) takes any allowed token. Where rows must
        match, ``weights`` speak for (and a function is asked about) masks that stay as well: all masks of rows in which some
        move are drawn together so that the row matches, and those that move are told.
        """
        if self._matching is not None:
            return self._draw_matching(self._matching, move, weights, must=must)

        def going_to(going: Tensor) -> Tensor:
            may = self._may.expand(*self.x.shape, -1)[going] if self._may.dim() > 1 else self._may
            rows = weights[going] if isinstance(weights, Tensor) else weights(going)
            rows = sharpen(rows * may, temperature=self._config.temperature, top_p=self._config.top_p)
            stay = torch.nn.functional.one_hot(self.x[going], self.kernel.states)
            return torch.where((rows.sum(-1, keepdim=True) > 0), rows, (may if must else stay).to(rows.dtype))

        return jump(self.x, move.double() * self.free, going_to, generator=self.generator)

    def _draw_matching(
        self, matching: Matching, move: Tensor, weights: Tensor | Callable[[Tensor], Tensor], *, must: bool
    ) -> Tensor:
        moving = going(move.double() * self.masked, generator=self.generator)
        rows = moving.any(-1)
        if not bool(rows.any()):
            return self.x
        hidden = self.masked & rows[:, None]
        may = self._may.expand(*self.x.shape, -1)[hidden]
        told = weights[hidden] if isinstance(weights, Tensor) else weights(hidden)
        told = sharpen(told * may, temperature=self._config.temperature, top_p=self._config.top_p)
        known = told.sum(-1) > 0
        told = torch.where(known[:, None], told, may.to(told.dtype))
        if not must:
            moving[hidden] &= known
        out = self.x.clone()
        out[moving] = matching.draw(self.x[rows], rows, hidden[rows], told, may, moving[rows], generator=self.generator)
        return out

    def _mend(self, where: Tensor) -> None:
        """A token that may not come out, at the positions ``where`` bool [b, l], is put right by one that may, drawn evenly."""
        may = self._may.expand(*self.x.shape, -1)
        wrong = where & ~may.gather(-1, self.x[..., None])[..., 0]
        if self.kernel.mask is not None:
            wrong &= self.x != self.kernel.mask
        if bool(wrong.any()):
            self.x = self.x.clone()
            self.x[wrong] = categorical(may[wrong].double(), generator=self.generator)

    def move(self, weights: Tensor, *, final: bool = False, only: Tensor | None = None) -> None:
        """A step whose probabilities are ``weights`` [b, l, n]: at x itself the chance to stay.

        Negative ones, and chances to move that sum to more than 1, are put right and counted. ``final`` is noise removal:
        whatever is still masked must go. ``only`` bool [b, l] holds all other positions.
        """
        wrong = -weights.clamp(max=0).sum(-1) > ROUNDING
        weights = weights.clamp(min=0)
        stay = weights.gather(-1, self.x[..., None])[..., 0]
        elsewhere = weights.scatter(-1, self.x[..., None], 0.0)
        away = elsewhere.sum(-1)
        free = self.free if only is None else self.free & only
        self.clamped += int((((away > 1 + ROUNDING) | wrong) & free).sum())
        chance = away / (away + stay).clamp(min=1e-30)
        if final:
            chance = torch.where(self.masked, 1.0, chance)
        self.put(self.draw(chance * free, elsewhere, must=final))

    def remask(self, chance: Tensor) -> None:
        """Free positions fall to the mask, each with its ``chance`` [b, l]."""
        mask = self.kernel.mask
        assert mask is not None
        self.put(self.x.masked_fill(self.uniform(*self.x.shape) <= chance, mask))

    def noise(self, where: Tensor, sigma: Tensor) -> None:
        """Noise the positions ``where`` bool [b, l] as if they were clean, up to total noise ``sigma`` [b], with allowed tokens."""
        where = where & self.free
        self.put(self.kernel.sample(self.x, sigma, random=Randomness(self.generator), corrupt=where))
        self._mend(where)
