"""The losses of a process on token rows: of whole rows, or the sum over the positions that the objective reads.

Axes: b batch, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from torch import Tensor, nn

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.groups import levels, rows_of
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.engine.regions import Model
from sedd_graph.engine.split import Split, split
from sedd_graph.engine.tail import Reading, Tail
from sedd_graph.graph.model import Graph

__all__ = ["TokenLoss", "Use"]

Use = Literal["loss", "bound", "reconstruction"]
"""What is evaluated: the loss in training, the loss in evaluation, or the reconstruction term of the bound."""


class _Terms(nn.Module):
    """Loss of rows of a few positions: from network outputs by name, a draw and a batch to nats, [g]."""

    def __init__(self, kernel: Kernel, schedule: Schedule, objective: Objective, use: Use) -> None:
        super().__init__()
        self.kernel, self.schedule, self.objective = kernel, schedule, objective
        self.reconstructs = use == "reconstruction"

    def forward(self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch) -> Tensor:
        with full_precision(draw.xt):
            found = self.kernel.translate(outputs, draw.xt, draw.sigma)
            method = self.objective.reconstruction if self.reconstructs else self.objective.loss
            return method(found, draw, batch, self.kernel, self.schedule)


class TokenLoss:
    """Losses of objectives, given the network.

    Args:
        kernel: The kernel that noises each token.
        schedule: Total noise as a function of time.
        graph: Typed graph of the network.
    """

    def __init__(self, kernel: Kernel, schedule: Schedule, graph: Graph) -> None:
        self.kernel, self.schedule, self._graph = kernel, schedule, graph
        self._tails: dict[Use, tuple[Model, Tail | None]] = {}
        self._split: tuple[Model, Split | None] | None = None

    def tail(self, model: Model, objective: Objective, use: Use = "loss") -> Tail | None:
        """Return the evaluation of an objective at the positions that it reads.

        None if the objective is no sum over positions, the kernel takes a table for each row, or the network computes no
        output position by position.

        Args:
            model: Module of the network.
            objective: The objective.
            use: What is evaluated.
        """
        if not objective.sums_positions or self.kernel.tabular:
            return None
        if use not in self._tails or self._tails[use][0] is not model:
            if self._split is None or self._split[0] is not model:
                self._split = model, split(self._graph, model)  # one trunk, which `whole` compiles, for all uses
            parts = self._split[1]
            terms = _Terms(self.kernel, self.schedule, objective.of_positions(), use)
            self._tails[use] = model, None if parts is None else Tail(model, parts, terms)
        tail = self._tails[use][1]
        if tail is not None:
            tail.terms.objective = objective.of_positions()  # evaluation may make a new one each time
        return tail

    def __call__(
        self,
        model: Model,
        objective: Objective,
        draw: Draw,
        batch: Batch,
        *,
        key: Tensor | None = None,
        use: Use = "loss",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate network and objective.

        Args:
            model: Module of the network.
            objective: The objective.
            draw: Its draw of noisy rows.
            batch: The clean rows.
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            use: What is evaluated.

        Returns:
            Nats, [b], and the saved activations by dotted path.
        """
        inputs, tail = objective.inputs(draw, batch), self.tail(model, objective, use)
        if tail is not None and len(draw.xt) == len(batch):
            read = objective.read_positions(draw, batch, self.kernel)
            return tail(inputs, key, Reading(read, levels(draw), partial(rows_of, draw, batch)))
        found, saved = model.run(inputs, key)
        with full_precision(draw.xt):
            outputs = self.kernel.translate(found, draw.xt, draw.sigma)
            method = objective.reconstruction if use == "reconstruction" else objective.loss
            return method(outputs, draw, batch, self.kernel, self.schedule), saved
