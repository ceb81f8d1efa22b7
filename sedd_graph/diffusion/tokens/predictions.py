"""What a sampling run computes from the network: outputs of the current rows, scores, predictions of the clean tokens.

The host waits for the device only in :meth:`Predictions.transfer`, which verifies all that has been computed so far. Axes:
b batch, l length, n states, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.diffusion.draws import Draws, NewStates, Where
from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.stage import Outputs, Rows, Stage, StagedDenoise, begin
from sedd_graph.diffusion.tokens.tweedie import INEXACT, needs_float64, too_long
from sedd_graph.diffusion.tokens.walk_settings import T_MIN, Denoise, WalkSettings

__all__ = ["Predictions"]


class Predictions:
    """The rows of a sampling run, and what the network says of them.

    Args:
        denoise: Evaluates the network.
        x: Initial rows, int64 [b, l].
        settings: The process, and the conditions on the rows.

    Attributes:
        x: The current rows, int64 [b, l].
        free: Positions that may change, bool [b, l].
        kernel: The forward process of one token.
        schedule: Total noise as a function of time.
        timeless: True if the network's outputs do not depend on time.
        draws: Random numbers of the run.
        generator: Its generator, for samplers that draw by other means than the methods of this class.
        evaluations: Number of rows evaluated by the network so far, summed over calls.
    """

    def __init__(self, denoise: Denoise, x: Tensor, settings: WalkSettings) -> None:
        self.x, self.free, self.kernel = x, settings.free, settings.kernel
        self.draws = Draws(settings.generator) if settings.draws is None else settings.draws
        self.schedule, self.generator, self.timeless = settings.schedule, self.draws.generator, settings.timeless
        self.evaluations = 0
        self._denoise = denoise
        self._check = OutputCheck(x.device)
        self._gap = torch.zeros(2, dtype=torch.float64, device=x.device)  # of Tweedie steps: the error, and the step
        self._grid: Tensor | None = None
        self._long: bool | None = None
        self._cached: Stage | None = None
        self._cached_x = torch.full_like(x, -1)
        self._waiting: Outputs | None = None
        self._stale: Rows | None = None  # the rows that changed since they were evaluated; None: not known to the host

    # -- the host -----------------------------------------------------------------------------------------------------

    def transfer(self, *values: Tensor) -> list[float]:
        """Copy values from the device to the host in one transfer, and verify what has been computed so far.

        Args:
            *values: Small tensors.

        Returns:
            Their values, one after another.

        Raises:
            UserError: An output of the network was not finite, a distribution did not sum to 1, or a step was too long for
                the kernel.
            ValueError: A distribution of new tokens was not finite.
        """
        *found, gap, longest, fault = self._check.read(*values, self._gap, self.draws.fault)
        if not gap <= INEXACT:
            raise too_long(self.kernel, gap, longest)
        if fault:
            raise ValueError("a row of weights of new tokens sums to zero or is not finite")
        return found

    def check_outputs(self) -> None:
        """Verify the network's outputs so far, which waits for the device; errors as of :meth:`transfer`."""
        self.transfer()

    def read(self, flag: Tensor) -> bool:
        """Copy a boolean scalar, bool [], from the device to the host and return it; errors as of :meth:`transfer`."""
        return bool(self.transfer(flag)[0])

    def report_rounding(self, gap: Tensor, longest: Tensor) -> None:
        """Note the rounding error of a Tweedie step, and its length: tensors [] that :meth:`transfer` verifies."""
        found = torch.stack([gap.double(), longest.double()])
        self._gap = torch.where(found[0] > self._gap[0], found, self._gap)

    def needs_float64(self, sigma: Tensor, below: Tensor) -> bool:
        """Return whether scores of a Tweedie step must be float64 (:func:`~sedd_graph.diffusion.tokens.tweedie.needs_float64`).

        The host waits for the device, unless no step of the grid that :meth:`set_grid` was given needs it.
        """
        if self.kernel.carries_over:
            return False
        if self._long is None and self._grid is not None:
            levels = self.schedule.sigma(self._grid)
            self._long = needs_float64(self.kernel, levels, torch.cat([levels[1:], torch.zeros_like(levels[:1])]))
        return self._long is not False and needs_float64(self.kernel, sigma, below)

    def set_grid(self, times: Tensor) -> None:
        """Note the times at which steps start, float32 [steps]; the last one ends at clean text."""
        self._grid, self._long = times, None

    # -- the network --------------------------------------------------------------------------------------------------

    def outputs(self, t: Tensor, need: Tensor | Rows | None = None) -> Outputs:
        """Return the network's outputs for the current rows, which are evaluated where they are read.

        Outputs that do not depend on time are cached: only rows that changed are evaluated.

        Args:
            t: Times, [b].
            need: Rows whose outputs are required, bool [b], or their mask and number; None: all.
        """
        found = self._unread(t, need.mask if isinstance(need, Rows) else need)
        found.ensure(need if isinstance(need, Rows) and not self.timeless else self._changed(found.need))
        self._waiting = None
        return found

    def outputs_where_drawn(self, t: Tensor, need: Tensor | None = None, *, places: bool = False) -> Outputs:
        """Return the network's outputs for the current rows, of which only those are read at which the next draw draws tokens.

        The network is evaluated when the host knows how many tokens are drawn.

        Args:
            t: Times, [b].
            need: Rows whose outputs are required, bool [b]; None: all.
            places: Whether functions without stages take the positions (``at`` of
                :class:`~sedd_graph.diffusion.tokens.walk_settings.Denoise`).
        """
        found = self._unread(t, need, places=places)
        if isinstance(self._denoise, StagedDenoise) and self._denoise.random:
            found.ensure(self._changed(need))
        self._waiting = None if found.ready else found
        return found

    def _unread(self, t: Tensor, need: Tensor | None, *, places: bool = False) -> Outputs:
        x = self.x

        def evaluate(rows: Rows | None, at: Tensor | None) -> Stage:
            return self._evaluated(x, t, rows, at)

        return Outputs(x, evaluate, self._check, need=need, places=places)

    def _changed(self, need: Tensor | None) -> Rows | None:
        """Return the rows of ``need``, bool [b], that must be evaluated; None: all, if it is not known that they are fewer."""
        if self.timeless and self._stale is not None:
            return self._stale
        if need is None:
            return None
        mask = need & self._unseen(self.x) if self.timeless else need
        return Rows(mask, int(self.transfer(mask.sum())[0]))

    def _unseen(self, x: Tensor) -> Tensor:
        """Return the rows of ``x``, int64 [b, l], for which there are no cached outputs, bool [b]."""
        return (x != self._cached_x).any(-1)

    def _evaluated(self, x: Tensor, t: Tensor, rows: Rows | None, at: Tensor | None) -> Stage:
        """Evaluate the first stage of the network for some rows; ``at``, [r, k], serves networks without stages."""
        count = len(x) if rows is None else rows.number
        self.evaluations += count
        if rows is None or count == len(x):
            stage = begin(self._denoise, x, t, torch.arange(len(x), device=x.device), at)
        elif count == 0 and self._cached is not None:
            stage = self._cached
        else:
            index = torch.nonzero_static(rows.mask, size=count)[:, 0]
            part = begin(self._denoise, x[index], t[index], index, at)
            stage = part.spread(index, len(x), self._cached if self.timeless and at is None else None)
        if self.timeless and at is None:
            self._cached = stage
            self._cached_x = x if rows is None else torch.where(rows.mask[:, None], x, self._cached_x)
            self._stale = Rows(torch.zeros_like(self._unseen(x)), 0)
        return stage

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
        level = self.schedule.sigma(t) if sigma is None else sigma.float()
        return self.score_of(self._everywhere(t, need), self.x, level, precise=precise)

    def _everywhere(self, t: Tensor, need: Tensor | None) -> Mapping[str, Tensor]:
        """Return the outputs at all positions by name, [b, l, n]; arguments as of :meth:`score`."""
        if self.timeless and need is None:
            need = torch.ones_like(self.free[:, 0])  # rows that have not changed are counted, not guessed
        return self.outputs(t, need).everywhere(self.free)

    def score_of(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor, *, precise: bool = False) -> Tensor:
        """Return the scores at some positions, as :meth:`score` does.

        Args:
            outputs: The network's outputs there, [g, m, n].
            x: The tokens, int64 [g, m].
            sigma: Total noise of the rows of these positions, [g].
            precise: True to compute in float64.

        Returns:
            float32 [g, m, n]; float64 if ``precise``.
        """
        dtype = torch.float64 if precise else torch.float32
        if "log_score" in outputs:
            return outputs["log_score"].to(dtype).exp()
        return self.kernel.log_score(outputs["log_x0"].to(dtype), x, sigma.to(dtype)).exp()

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
        return self.clean_of(self._everywhere(t, need), self.x)

    def clean_of(self, outputs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the predicted distribution of the clean token at some positions, as :meth:`clean` does.

        Args:
            outputs: The network's outputs there, [g, m, n].
            x: The tokens, int64 [g, m].

        Returns:
            Probabilities, [g, m, n].
        """
        if "log_x0" in outputs:
            return outputs["log_x0"].float().exp()
        states = torch.arange(self.kernel.states, device=x.device)
        mask = self.kernel.require_mask()
        law = outputs["log_score"].float().masked_fill(states == mask, -torch.inf).softmax(-1)
        return torch.where((x == mask)[..., None], law, (x[..., None] == states).to(law.dtype))

    def clean_at(self, outputs: Outputs) -> NewStates:
        """Return the function from positions to the predicted distributions of their clean tokens, [k, n]."""

        def law(where: Where) -> Tensor:
            row, place = where.row, where.place[:, None]
            found = outputs.at(Groups(row, row, place, torch.ones_like(place, dtype=torch.bool)))
            return self.clean_of(found, outputs.x[row[:, None], place])[:, 0]

        return law
