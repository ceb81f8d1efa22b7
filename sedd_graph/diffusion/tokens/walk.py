"""The state of a sampling run, and the operations on it that all samplers share.

A :class:`Walk` stores the rows between noise and text. It evaluates the network (only on rows that changed, if its
outputs do not depend on time), samples which positions change and then their new tokens, and enforces the conditions on
the text. Axes: b batch, l length, n states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.tokens.particles import ImportanceWeights
from sedd_graph.diffusion.tokens.walk_settings import ROUNDING, T_MIN, Denoise, OnStep, SamplerConfig, WalkSettings

__all__ = ["ROUNDING", "T_MIN", "Denoise", "OnStep", "SamplerConfig", "Walk", "WalkSettings"]


class Walk:
    """The state of a sampling run: rows between noise and text.

    Args:
        denoise: Evaluates the network.
        x: Initial rows, int64 [b, l].
        settings: The process, and the conditions on the rows.
        config: Temperature and nucleus truncation.

    Attributes:
        x: The current rows, int64 [b, l].
        draws: Random numbers of the run.
        generator: Its generator, for samplers that draw by other means than the methods of this class.
        evaluations: Number of rows evaluated by the network so far, summed over calls.
        clamped: Number of positions so far whose probabilities were outside [0, 1] and were clamped, summed over steps.
        weights: Importance weights of the rows; None without ``settings.unconditioned``.

    Raises:
        UserError: No completion of a row satisfies ``settings.matching``.
    """

    def __init__(self, denoise: Denoise, x: Tensor, settings: WalkSettings, config: SamplerConfig) -> None:
        kernel, matching = settings.kernel, settings.matching
        self.x, self.free, self.kernel = x, settings.free, kernel
        self.draws = Draws(settings.generator) if settings.draws is None else settings.draws
        self.schedule, self.generator, self.timeless = settings.schedule, self.draws.generator, settings.timeless
        self.evaluations = self.clamped = 0
        self._check = OutputCheck(x.device)
        self._denoise, self._config, self._on_step = denoise, config, settings.on_step
        data = torch.arange(kernel.states, device=x.device) != (-1 if kernel.mask is None else kernel.mask)
        self._allowed = data if settings.allowed is None else data & settings.allowed
        self.weights: ImportanceWeights | None = None
        if settings.unconditioned is not None:
            self.weights = ImportanceWeights(len(x), data & settings.unconditioned, config.temperature)
        self._matching = matching
        if matching is not None:
            matching.feasible(x, self.masked, self._allowed)
        if self._allowed.dim() > 1:
            self._replace_disallowed(self.free)  # the prior was drawn without conditions on positions
        self._cached: dict[str, Tensor] = {}
        self._cached_x = torch.full_like(x, -1)
        self._steps = 0
        self.end_step()

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    def masked(self) -> Tensor:
        """Positions that are free and masked, bool [b, l]; all False for a kernel without mask."""
        return torch.zeros_like(self.free) if self.kernel.mask is None else self.free & (self.x == self.kernel.mask)

    def put(self, x: Tensor) -> None:
        """Assign new tokens to the free positions of the rows; the others are unchanged.

        Args:
            x: New rows, int64 [b, l].
        """
        self.x = torch.where(self.free, x, self.x)

    def end_step(self, x: Tensor | None = None) -> None:
        """End a step: call the callback with the rows.

        Args:
            x: Rows to pass to the callback, int64 [b, l]; None: the current rows.
        """
        if self._on_step is not None:
            self._on_step(self._steps, self.x if x is None else x)
        self.draws.begin_step(self._steps, self.x)
        self._steps += 1

    def check_outputs(self) -> None:
        """Verify the network's outputs so far, which waits for the device.

        Raises:
            UserError: An output was not finite, or a distribution did not sum to 1.
        """
        self._check.read()

    # -- the network --------------------------------------------------------------------------------------------------

    def outputs(self, t: Tensor, need: Tensor | None = None) -> Mapping[str, Tensor]:
        """Return the network's outputs for the current rows.

        Outputs that do not depend on time are cached: only rows that changed are evaluated.

        Args:
            t: Times, [b].
            need: bool [b], rows whose outputs are required; entries of other rows are unspecified. None: all.

        Returns:
            ``log_score`` or ``log_x0`` by name, float32 [b, l, n].
        """
        stale = (self.x != self._cached_x).any(-1) if self.timeless else torch.ones_like(self.free[:, 0])
        if need is not None:
            stale = stale & need
        rows = stale.nonzero()[:, 0]
        self.evaluations += len(rows)
        if len(rows) == len(stale):
            self._cached = dict(self._denoise(self.x, t, rows))
            self._check.add(self._cached, self.free)
        elif len(rows):
            fresh = self._denoise(self.x[rows], t[rows], rows)
            self._check.add(fresh, self.free[rows])
            for name, value in fresh.items():
                old = self._cached.get(name)
                old = value.new_zeros(len(stale), *value.shape[1:]) if old is None else old
                self._cached[name] = old.index_copy(0, rows, value)
        self._cached_x = torch.where(stale[:, None], self.x, self._cached_x)
        return self._cached

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times at which total noise is ``sigma``, at least :data:`T_MIN`.

        Args:
            sigma: Total noise, [b].

        Returns:
            float32 [b]; :data:`T_MIN` for all rows if the network's outputs do not depend on time.
        """
        t = torch.full_like(sigma, T_MIN) if self.timeless else self.schedule.time(sigma.double())
        return t.clamp(min=T_MIN, max=1.0).float()

    def score(
        self, t: Tensor, sigma: Tensor | None = None, need: Tensor | None = None, *, precise: bool = False
    ) -> Tensor:
        """Return the scores p_t(z) / p_t(x) of all rows z that differ from the current row x in at most one position.

        Entry (i, y) is the score of the row z that has state y at position i; it is 1 if y is the state of x there.

        Args:
            t: Times, [b].
            sigma: Total noise at ``t``, [b], if known more precisely than by the schedule; None: by the schedule.
            need: bool [b], rows whose scores are required; entries of other rows are unspecified. None: all.
            precise: True to compute in float64. At high noise log-scores are small, and their exponentials in float32
                lose them.

        Returns:
            float32 [b, l, n]; float64 if ``precise``.
        """
        outputs, dtype = self.outputs(t, need), torch.float64 if precise else torch.float32
        if "log_score" in outputs:
            return outputs["log_score"].to(dtype).exp()
        sigma = self.schedule.sigma(t) if sigma is None else sigma.float()
        return self.kernel.log_score(outputs["log_x0"].to(dtype), self.x, sigma.to(dtype)).exp()

    def rounding(self) -> float:
        """Return the relative rounding error of the last outputs as log-scores; 0 if scores are computed from ``log_x0``."""
        found = self._cached.get("log_score")
        return 0.0 if found is None else torch.finfo(found.dtype).eps

    def clean(self, t: Tensor, need: Tensor | None = None) -> Tensor:
        """Return the predicted distribution of the clean token at each position given all other positions.

        At a masked position this is the normalised score. For a kernel without mask, the network must output
        ``log_x0``.

        Args:
            t: Times, [b].
            need: bool [b], rows whose predictions are required; entries of other rows are unspecified. None: all.

        Returns:
            Probabilities, [b, l, n].
        """
        return self._clean(self.outputs(t, need), self.x)

    def _clean(self, outputs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if "log_x0" in outputs:
            return outputs["log_x0"].float().exp()
        mask = self.kernel.require_mask()
        scores = outputs["log_score"].float().index_fill(-1, torch.tensor([mask], device=x.device), -torch.inf)
        carried = torch.nn.functional.one_hot(x, self.kernel.states).to(scores.dtype)
        return torch.where((x == mask)[..., None], scores.softmax(-1), carried)

    def reveal(self, chosen: Tensor, t: Tensor) -> None:
        """Replace the masks at chosen positions by sampled tokens.

        The network is evaluated only on the rows with a chosen position, and only at the chosen positions; if rows must
        match a regular expression (:attr:`WalkSettings.matching`), at all masks of these rows.

        Args:
            chosen: bool [b, l], masked positions.
            t: Times of the rows, [b].
        """
        chosen = chosen & self.free
        some = chosen.any(1)
        rows = some.nonzero()[:, 0]
        # if rows must match, the distributions of the remaining masks are needed too
        places = chosen if self._matching is None else self.masked & some[:, None]
        count = places.sum(1)
        # the chosen positions of each row in order, then others as padding
        at = places[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        real = torch.arange(at.shape[1], device=at.device) < count[rows, None]
        x = self.x[rows]
        self.evaluations += len(rows)
        outputs = self._denoise(x, t[rows], rows, at)
        self._check.add(outputs, real)
        clean = self._clean(outputs, x.gather(1, at))
        self.put(self.draw(chosen.double(), lambda _: clean[real], must=True))

    # -- moves --------------------------------------------------------------------------------------------------------

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1], float64 of shape ``[*shape]``."""
        return self.draws.uniform(*shape)

    def draw(self, move: Tensor, weights: Tensor | Callable[[Tensor], Tensor], *, must: bool = False) -> Tensor:
        """Sample new tokens at free positions that change, and return the resulting rows.

        :attr:`x` is unchanged. If rows must match a regular expression (:attr:`WalkSettings.matching`), only masks
        change. All masks of a row with at least one changing position are then sampled jointly given that the row
        matches, those that do not change remain masked in the result, and ``weights`` are required at all of them.

        Args:
            move: Probability that a position changes, [b, l].
            weights: Weights of the new token, not normalised, [b, l, n]; or a function ``weights(where)`` that returns
                them for the m positions ``where``, bool [b, l], as [m, n]. Weights of the mask and of disallowed tokens
                are ignored.
            must: True: where all allowed tokens have weight 0, the new token is uniform over the allowed ones. False:
                the old token remains there.

        Returns:
            The rows with new tokens, int64 [b, l].

        Raises:
            UserError: An output of the network was not finite, or a distribution did not sum to 1.
        """
        if self._matching is not None:
            return self._draw_matching(self._matching, move, weights, must=must)

        def new_tokens(moving: Tensor) -> Tensor:
            allowed, rows, permitted = self._weights(weights, moving)
            if self.weights is not None:
                self.weights.add(moving, permitted)
            stay = torch.nn.functional.one_hot(self.x[moving], self.kernel.states)
            return torch.where((rows.sum(-1, keepdim=True) > 0), rows, (allowed if must else stay).to(rows.dtype))

        return self.draws.jump(self.x, move.double() * self.free, new_tokens, read=self.read)

    def read(self, flag: Tensor) -> bool:
        """Copy a boolean scalar from the device to the host and return it, verifying the network's outputs so far.

        The result of this verification is on the device, too; one transfer copies both.

        Args:
            flag: bool [].

        Raises:
            UserError: An output was not finite, or a distribution did not sum to 1.
        """
        return bool(self._check.read(flag)[0])

    def _weights(self, weights: Tensor | Callable[[Tensor], Tensor], where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the allowed tokens and the sharpened weights at the m positions ``where``, bool [b, l].

        The allowed tokens are bool [n] or [m, n], the weights float64 [m, n]. The third tensor is the log of the share
        of each distribution that is allowed, [m]; it is empty without importance weights.
        """
        allowed = self._allowed.expand(*self.x.shape, -1)[where] if self._allowed.dim() > 1 else self._allowed
        rows = weights[where] if isinstance(weights, Tensor) else weights(where)
        permitted = rows.new_zeros(0) if self.weights is None else self.weights.permitted(rows, allowed)
        sharp = sharpen(rows * allowed, temperature=self._config.temperature, top_p=self._config.top_p)
        return allowed, sharp, permitted

    def _draw_matching(
        self, matching: Matching, move: Tensor, weights: Tensor | Callable[[Tensor], Tensor], *, must: bool
    ) -> Tensor:
        moving = self.draws.going(self.x, move.double() * self.masked)
        rows = moving.any(-1)
        if not self.read(rows.any()):
            return self.x
        hidden = self.masked & rows[:, None]
        allowed, drawn, permitted = self._weights(weights, hidden)
        allowed = allowed.expand(len(drawn), -1)
        possible = drawn.sum(-1) > 0
        drawn = torch.where(possible[:, None], drawn, allowed.to(drawn.dtype))
        if not must:
            moving[hidden] &= possible
        out = self.x.clone()
        out[moving] = self.draws.matched(matching, self.x, rows, hidden, drawn, allowed, moving)
        if self.weights is not None:
            left = hidden & ~moving
            before = matching.log_chance(self.x[rows], rows, hidden[rows], drawn)
            after = matching.log_chance(out[rows], rows, left[rows], drawn[left[hidden]])
            self.weights.add_rows(rows, before, after)
            self.weights.add(moving, permitted[moving[hidden]])
        return out

    def _replace_disallowed(self, where: Tensor) -> None:
        """Replace disallowed data tokens at ``where`` bool [b, l] by allowed ones, drawn uniformly."""
        allowed = self._allowed.expand(*self.x.shape, -1)
        wrong = where & ~take(allowed, self.x)
        if self.kernel.mask is not None:
            wrong &= self.x != self.kernel.mask
        if bool(wrong.any()):
            self.x = self.draws.replaced(self.x, wrong, allowed)

    def move(self, weights: Tensor, *, final: bool = False, only: Tensor | None = None) -> None:
        """Take one step with the given next-state probabilities.

        Negative probabilities, and probabilities of changing that sum to more than 1, are clamped and counted in
        ``clamped``.

        Args:
            weights: Next-state probabilities, normalised up to rounding, [b, l, n]; the entry of the current state is
                the probability of no change.
            final: True for noise removal: every masked position changes.
            only: bool [b, l], positions that may change; None: all free ones.
        """
        wrong = -weights.clamp(max=0).sum(-1) > ROUNDING
        weights = weights.clamp(min=0)
        stay = take(weights, self.x)
        elsewhere = weights.scatter(-1, self.x[..., None], 0.0)
        away = elsewhere.sum(-1)
        free = self.free if only is None else self.free & only
        self.clamped += int((((away > 1 + ROUNDING) | wrong) & free).sum())
        chance = away / (away + stay).clamp(min=1e-30)
        if final:
            chance = torch.where(self.masked, 1.0, chance)
        self.put(self.draw(chance * free, elsewhere, must=final))

    def remask(self, chance: Tensor) -> None:
        """Replace free positions by the mask, each independently with its own probability.

        Args:
            chance: Probability of masking each position, [b, l].
        """
        mask = self.kernel.require_mask()
        self.put(self.x.masked_fill(self.uniform(*self.x.shape) <= chance, mask))

    def noise(self, where: Tensor, sigma: Tensor) -> None:
        """Apply the forward process from clean text to total noise ``sigma`` at the positions ``where``.

        The tokens at these positions count as clean; disallowed tokens in the result are replaced by allowed ones,
        drawn uniformly.

        Args:
            where: bool [b, l], positions to noise; those that are not free are ignored.
            sigma: Total noise, [b].
        """
        where = where & self.free
        self.put(self.draws.noisy(self.kernel, self.x, sigma, corrupt=where))
        self._replace_disallowed(where)
