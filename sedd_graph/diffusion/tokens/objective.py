"""The interface of objectives, the training losses of rows of tokens. Implementations are components.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import ONLY_MASKS, Kernel

__all__ = ["FEEDS", "Objective", "for_each"]


FEEDS = (
    Input("tokens", "int b l", "noisy tokens x_t"),
    Input("sigma", "float b", "total noise at time t"),
    Input("t", "float b", "time, from 0 (clean) to 1 (noise)"),
    Input("attend", "bool b l", "positions that may be attended to; padding may not"),
)
"""Inputs of a graph that looks at rows as a whole."""


class Objective(Component, ABC):
    """What training minimises: a bound on -log p(x_0) in nats per sequence."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of model outputs that it can take, the preferred one first."""
    needs_mask: ClassVar[bool] = False
    """Whether it works only with a kernel that masks all tokens at one rate, and does nothing else."""
    trains_noise: ClassVar[bool] = False
    """Whether its gradient is right for a kernel's parameters, too, on which the draws depend."""
    steady: ClassVar[bool] = False
    """Whether its times are drawn evenly and its loss is ``dsigma`` times what depends on total noise and the draw at it alone: what
    a schedule that learns asks for (:func:`sedd_graph.diffusion.tokens.schedule_loss.steadied`)."""
    over: ClassVar[str] = "time"
    """What ``t`` of its draws is: ``time``, or ``masked``, the share of masked tokens, a sum over which is exact."""
    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph that :meth:`inputs` gives."""

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """``config`` cut down for a proof on a few positions."""
        return config

    @property
    def block(self) -> int | None:
        """How many positions are noised by themselves, given all before them in full; None for a row as a whole.

        It says how the network is fed (:func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`) and how text is written.
        """
        return None

    def lacks(self, kernel: Kernel) -> str | None:
        """What kind of kernel it needs, where ``kernel`` is not one of them."""
        if kernel.learned and not self.trains_noise:
            return "a kernel that learns nothing (one that does goes with genmd4)"
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def inputs(self, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """Return the inputs of the graph for a draw, by name."""
        return {"tokens": draw.xt, "sigma": draw.sigma, "t": draw.t, "attend": for_each(draw, batch.attend)}

    @abstractmethod
    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        """Draw times and corrupted rows; ``t`` and ``xt``, where given, are taken instead. All randomness is here."""

    @abstractmethod
    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Nats per sequence, float32 [b]: its mean over draws is the bound. Pure tensor code that compiles."""

    def bound(self) -> Objective:
        """What of it is a bound: itself, unless it also trains by something else."""
        return self

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        """The draw (and the loss to hold it to) for evaluation: of the bound itself, or of a form of less variance."""
        bound = self.bound()
        return bound, bound.corrupt(batch, kernel, schedule, random=random)


def for_each(draw: Draw, rows: Tensor) -> Tensor:
    """Repeat ``rows`` [b, ...] of a batch as often as the draw has rows for each, [c b, ...]."""
    copies = len(draw.xt) // len(rows)
    return rows if copies == 1 else torch.cat([rows] * copies)
