"""Draws of objectives of strings in which noisy strings and noise levels are enumerated instead of drawn.

Axes: r selected cases, b noise levels, s strings of the table, w positions of a padded string.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringDraw, StringObjective
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.string_table import EnumeratedTable

__all__ = ["LAST", "Draw", "ForcedDraws", "Outputs", "Sums"]

LAST = 1 - 2**-24
"""Largest uniform number in single precision."""

Outputs = Mapping[str, Tensor]
"""Outputs of a network by name."""
Call = Callable[[Any, Batch, Randomness], StringDraw]
"""Type of the functions that draw noisy strings for training or for the bound, given a kernel."""


Draw = Callable[[Tensor, Tensor], tuple[StringDraw, Tensor]]
"""Type of the functions that draw cases [r] at uniform numbers or times [r], and also return total noise, [r]."""


class _Given(Randomness):
    """A source whose uniform numbers are given, where one is drawn for each row, and random elsewhere."""

    def __init__(self, u: Tensor) -> None:
        super().__init__(torch.Generator().manual_seed(5))
        self._u = u.float()

    def rand(self, rows: int, *shape: int) -> Tensor:
        return super().rand(rows, *shape) if shape or rows != len(self._u) else self._u

    def low_discrepancy(self, rows: int) -> Tensor:
        return self.rand(rows)


@dataclasses.dataclass(frozen=True)
class Sums:
    """The terms of mean losses at several noise levels: one row for each noise level and each case likely at it.

    A case is a clean string with one way to noise it. A mean loss is the sum over rows of ``chance`` times the loss.

    Attributes:
        level: Index of the noise level of each row, int64 [r].
        case: Index of the case of each row in the table's cases, int64 [r].
        chance: Probability of the case at the noise level, float64 [r].
        here: Index of the noisy string of the case in the table's strings, int64 [r].
        perfect: Outputs of a perfect network for every noise level and string, by name, float32 [b, s, w, ...].
    """

    level: Tensor
    case: Tensor
    chance: Tensor
    here: Tensor
    perfect: dict[str, Tensor]

    def only(self, which: Tensor) -> Sums:
        """Return the rows ``which``, bool [r]."""
        return Sums(self.level[which], self.case[which], self.chance[which], self.here[which], self.perfect)

    def gather(self, outputs: Outputs, width: int) -> dict[str, Tensor]:
        """Return the rows of ``outputs`` [b, s, w, ...], truncated to ``width`` positions."""
        return {name: value[self.level, self.here][:, :width] for name, value in outputs.items()}

    def mean(self, nats: Tensor, levels: int) -> Tensor:
        """Return the mean loss at each noise level, float64 [b], given the loss of each row."""
        return torch.zeros(levels, dtype=torch.float64).index_add(0, self.level, self.chance * nats.double())


class ForcedDraws:
    """Draws of an objective whose noisy strings are selected from a table instead of drawn at random.

    The kernel's ``sample`` is replaced by one that returns selected cases. A case is a clean string with one way to
    noise it.

    Args:
        table: Enumeration of all short strings and all cases.
        objective: The objective.
        schedule: Total noise as a function of time.

    Attributes:
        prompt: Number of tokens at the start of the clean string of each case that form a prompt, which is not
            corrupted, int64 [e]; None: no prompts.
    """

    prompt: Tensor | None = None

    def __init__(self, table: EnumeratedTable, objective: StringObjective[Any, Any], schedule: Schedule) -> None:
        self.table, self.objective, self.schedule = table, objective, schedule
        self.training_pairs, self.bound_pairs = (self._one_of_each_pair(draw) for draw in (self.at_times, self.bound))

    def _one_of_each_pair(self, make: Draw) -> bool:
        """Return whether a loss depends on the clean and the noisy string alone, in 300 cases."""
        first, pair = self.table.first_ways
        count = torch.bincount(pair)
        case = (count[pair] > 1).nonzero()[:, 0]
        if not len(case):
            return True
        case = case[torch.randperm(len(case), generator=torch.Generator().manual_seed(8))[:300]]
        case = torch.cat([case, first[pair[case]]])
        draw, sigma = make(case, torch.full((len(case),), 0.5, dtype=torch.float64))
        outputs = self.table.outputs(Strings(draw.xt, draw.attend), sigma)
        one, other = self.objective.loss(outputs, draw, self.table.kernel).chunk(2)
        return bool(((one - other).abs() <= 1e-5 * (1 + one.abs())).all())

    def sums(self, sigma: Tensor, shown: Tensor, *, pairs: bool, least: float | None = None) -> Sums:
        """Return the cases that are likely enough to enter a mean loss at each noise level, and the network's outputs.

        Args:
            sigma: Total noise at which cases have their probability, float64 [b].
            shown: Total noise that is passed to the network, [b], such as ``sigma`` in single precision.
            pairs: True to return one case of each pair of a clean and a noisy string, with the probability of the pair;
                right for a loss that depends on the pair alone.
            least: Probability up to which a case is omitted; None: ``table.least``.
        """
        table, count = self.table, len(self.table.strings)
        level, case, chance = table.likely(sigma, table.least if least is None else least, pairs=pairs)
        rows = table.rows(torch.arange(count))
        each = [table.outputs(rows, one.expand(count)) for one in shown]
        perfect = {name: torch.stack([found[name] for found in each]) for name in each[0]}
        return Sums(level, case, chance, table.cases.here[case], perfect)

    def training(self, case: Tensor, u: Tensor) -> tuple[StringDraw, Tensor]:
        """Draw for training, with the uniform numbers ``u`` [r] for times. Returns the draw and total noise, [r]."""
        return self._draw(case, _Given(u), lambda k, b, r: self.objective.corrupt(b, k, self.schedule, random=r))

    def at_times(self, case: Tensor, t: Tensor) -> tuple[StringDraw, Tensor]:
        """Draw for training at the times ``t``, float64 [r]. Returns the draw and total noise, [r]."""
        return self._draw(case, _Given(t), lambda k, b, r: self.objective.corrupt(b, k, self.schedule, random=r, t=t))

    def bound(self, case: Tensor, u: Tensor) -> tuple[StringDraw, Tensor]:
        """Draw for the bound, with the uniform numbers ``u`` [r]. Returns the draw and total noise, [r]."""
        return self._draw(case, _Given(u), lambda k, b, r: self.objective.bound_draw(b, k, self.schedule, random=r))

    def _draw(self, case: Tensor, random: Randomness, call: Call) -> tuple[StringDraw, Tensor]:
        kernel, seen = copy.copy(self.table.kernel), list[Tensor]()
        drawn: Callable[..., Any] = getattr(self.table.kernel, "sample")  # noqa: B009  # not of StringKernel

        def sample(batch: Batch, sigma: Tensor, **how: Any) -> Any:
            if seen:  # such as noise at t = 1
                return drawn(batch, sigma, **how)
            seen.append(sigma.double())
            return self.table.drawn(case)

        setattr(kernel, "sample", sample)  # noqa: B010  # as above
        batch = self.table.batch(self.table.cases.x0[case])
        if self.prompt is not None:
            free = batch.attend & (torch.arange(batch.width) >= self.prompt[case, None])
            batch = dataclasses.replace(batch, corrupt=free, loss=free)
        draw = call(kernel, batch, random)
        here = self.table.number(Strings(draw.xt, draw.attend))
        if not seen or not torch.equal(here, self.table.cases.here[case]):
            raise ValueError("the objective draws noisy strings in another way than by the kernel's sample()")
        return draw, seen[0]
