"""The interface of objectives: training losses of rows of tokens. Implementations are components.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
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

__all__ = ["FEEDS", "DrawRequest", "Objective", "for_each"]


FEEDS = (
    Input("tokens", "int b l", "noisy tokens x_t"),
    Input("sigma", "float b", "total noise at time t"),
    Input("t", "float b", "time, from 0 (clean) to 1 (noise)"),
    Input("attend", "bool b l", "positions that may be attended to; padding may not"),
)
"""Inputs of a graph that processes all positions of a row at one noise level."""


@dataclasses.dataclass(frozen=True)
class DrawRequest:
    """A request for one draw of the forward process.

    Attributes:
        batch: Clean rows.
        kernel: The forward process of a token.
        schedule: Total noise as a function of time.
        random: Source of all random numbers of the draw.
        t: Times [b] to use instead of random ones.
        xt: Noisy rows int64 [b, l] to use instead of random ones.
    """

    batch: Batch
    kernel: Kernel
    schedule: Schedule
    random: Randomness
    t: Tensor | None = None
    xt: Tensor | None = None

    def noised(self, sigma: Tensor) -> Tensor:
        """Return ``xt``, or else draw x_t given x_0 at total noise ``sigma`` [b], int64 [b, l]."""
        if self.xt is not None:
            return self.xt
        return self.kernel.sample(self.batch.tokens, sigma, random=self.random, corrupt=self.batch.corrupt)


class Objective(Component, ABC):
    """The training loss: a bound on -log p(x_0), nats per sequence."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the network outputs that the loss accepts, the preferred one first."""
    needs_mask: ClassVar[bool] = False
    """True if the objective requires :attr:`Kernel.masks_evenly`."""
    trains_noise: ClassVar[bool] = False
    """True if the gradient is also unbiased for parameters of the kernel, on which the distribution of the draws depends."""
    steady: ClassVar[bool] = False
    """True if times are uniform and the loss is ``dsigma`` times a function of total noise and of the draw at that noise alone.
    Learned schedules require it (:func:`sedd_graph.diffusion.tokens.schedule_loss.steadied`)."""
    over: ClassVar[str] = "time"
    """Meaning of ``t`` in a draw: ``time``, or ``masked``: the share of masked tokens."""
    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph that :meth:`inputs` returns."""

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """Return ``config`` reduced for a proof on a few positions."""
        return config

    @property
    def block(self) -> int | None:
        """Positions per block, for an objective that noises each block given the clean blocks before it; else None.

        The graph then gets :func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`, and samples are generated block by block.
        """
        return None

    def lacks(self, kernel: Kernel) -> str | None:
        """Return the kind of kernel that the objective needs, in words; None if ``kernel`` is suitable."""
        if kernel.learned and not self.trains_noise:
            return "a kernel without trained parameters (genmd4 trains those of a kernel)"
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def inputs(self, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """Return the inputs of the graph for a draw, by name."""
        return {"tokens": draw.xt, "sigma": draw.sigma, "t": draw.t, "attend": for_each(draw, batch.attend)}

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
        """Draw times and noisy rows for a batch: :meth:`draw` with the fields of a :class:`DrawRequest` as arguments."""
        return self.draw(DrawRequest(batch, kernel, schedule, random, t, xt))

    @abstractmethod
    def draw(self, request: DrawRequest) -> Draw:
        """Draw times and noisy rows. All randomness of training is here."""

    @abstractmethod
    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Return the loss of each sequence, nats, float32 [b]; its mean over draws is the bound. Pure tensor code that compiles.

        Args:
            outputs: The network's outputs for ``draw``, after :meth:`Kernel.translate`.
            draw: What :meth:`draw` returned.
            batch: The clean rows.
            kernel: The forward process of a token.
            schedule: Total noise as a function of time.
        """

    def bound(self) -> Objective:
        """Return the objective without loss terms that are not part of the bound; by default the objective itself."""
        return self

    def evaluated(self, kernel: Kernel) -> Objective:
        """Return the form of the bound that evaluation uses: :meth:`bound`, or the same bound with less variance."""
        return self.bound()

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        """Return the objective of :meth:`evaluated` and a draw for its loss."""
        objective = self.evaluated(kernel)
        return objective, objective.corrupt(batch, kernel, schedule, random=random)


def for_each(draw: Draw, rows: Tensor) -> Tensor:
    """Tile ``rows`` [b, ...] of a batch c times, to [c b, ...], for a draw with c noisy rows per clean row.

    The result is c copies of the whole batch, one after the other, in the order of the noisy rows.
    """
    copies = len(draw.xt) // len(rows)
    return rows if copies == 1 else torch.cat([rows] * copies)
