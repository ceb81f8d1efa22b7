"""Normalizing flows on rows of real numbers (the family ``points``), with exact likelihood, sampled by the inverse.

The layers of the graph run one by one, without ``torch.compile``. All activations are saved for backward, whatever the
setting ``memory`` of a block, since the log-determinant needs them.

Axes: b batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import PointBatch, Randomness
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import OnDraw, Process, Setup
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import SampleRequest, Samples, Stored
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import UserError
from sedd_graph.families.points_plan import PointsPlan

__all__ = ["PointProcess"]


class PointProcess(Process):
    """Normalizing flow z = f(x), f being the network, with ``-log p(x) = -log base(z) - log |det dz/dx|``.

    Args:
        plan: Validated description of the flow.
        setup: Graph, registry and device of the process.

    Attributes:
        base: Base density of z.
    """

    family = "points"
    batch_type = PointBatch
    compiles = False
    autocasts = False
    text = False
    exact = True
    _WHOLE = "a flow draws whole rows by its inverse"
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "length",
            "steps",
            "prompt",
            "attend",
            "conditions",
            "allowed",
            "classifier",
            "seeds",
            "tape",
            "on_step",
            "on_confidence",
        ),
        _WHOLE,
    )

    def __init__(self, plan: PointsPlan, setup: Setup) -> None:
        super().__init__(plan, setup)
        self.base: Likelihood = setup.registry.component(plan.contract.op)(plan.config, Context({})).to(setup.device)
        self._layout = Layout(setup.graph.root, ())

    # -- training and evaluation ------------------------------------------------------------------------------------

    def batch(self, rows: Tensor | PointBatch, device: torch.device) -> PointBatch:
        batch = (rows if isinstance(rows, PointBatch) else PointBatch(rows)).to(device)
        if not batch.x.is_floating_point() or tuple(batch.x.shape[1:]) != self.plan.shape:
            shape = ", ".join(map(str, ("batch", *self.plan.shape)))
            raise UserError(f"rows must be floats [{shape}], not {batch.x.dtype} {list(batch.x.shape)}")
        return batch

    def draw(self, batch: PointBatch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> None:
        """Return None, since a flow has no noise to draw. Raises :class:`UserError` if ``t`` or ``xt`` is given."""
        if t is not None or xt is not None:
            raise UserError("loss: a flow has no noise: leave t and xt out")

    def loss(self, model: Model, draw: None, batch: PointBatch, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return -log p of each row, nats, which is the training loss.

        Args:
            model: The network's module.
            draw: None, since a flow has no noise.
            batch: The rows x, float [b, ...].
            key: Dropout key, int32 [b]; None without dropout.

        Returns:
            -log p, float32 [b], and an empty dict, since a flow offers no activations to store.
        """
        return self._nats(model, batch, key), {}

    def _nats(
        self, model: Model, batch: PointBatch, key: Tensor | None, part: range | None = None, total: int | None = None
    ) -> Tensor:
        """Return -log p of each row, nats, float32 [b]; arguments as of :meth:`loss` and :func:`forward_with_log_det`."""
        run = LayerRun(self._layout, model, key)
        run.put(self._layout.inputs.values(), [batch.x])
        with full_precision(batch.x):
            log_det = forward_with_log_det(run, len(batch), part=part, total=total)
            (z,) = run.take(self._layout.outputs.values())
            return self.base.nats(z) - log_det

    def inverse(self, model: Model, z: Tensor) -> Tensor:
        """Return x with f(x) = ``z``, f being the network ``model``; ``z`` and x are float [b, ...]."""
        run = LayerRun(self._layout, model)
        run.put(self._layout.outputs.values(), [z])
        run.invert()
        (x,) = run.take(self._layout.inputs.values())
        return x

    def bound_rows(
        self,
        network: Network,
        batch: PointBatch,
        parts: Sequence[range],
        *,
        seeds: Sequence[int],
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        """Return -log p of each row, nats, float64 [m].

        Args:
            network: The network.
            batch: The rows x, float [b, ...].
            parts: The rows that are evaluated at a time, m in all.
            seeds: The result is a mean over one evaluation per seed. Evaluations differ only if the network has
                contractive layers whose log-determinant is estimated at random.
            on_draw: Ignored, since a flow has no noise draws.
        """
        total = torch.zeros(sum(map(len, parts)), dtype=torch.float64, device=network.device)
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                found = []
                for part in parts:
                    torch.manual_seed(seed)
                    found.append(self._nats(network.model, batch.part(part), None, part, len(batch)))
                total += torch.cat(found).double()
        return total / len(seeds)

    def example(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, *self.plan.shape)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw z from the base density and map it to data, x = f^-1(z), f being the network.

        Args:
            network: The network.
            request: Number of rows (``batch``) and seed.

        Returns:
            The rows x, float32 [b, ...], with -log p of each row, nats, float64 [b].
        """
        generator = request.generator(network.device)
        z = self.base.draw((request.batch, *self.plan.out), generator=generator)
        with network.evaluating():
            rows = self.inverse(network.model, z)
            seed = mix_seed(request.seed or 0, 0)
            nats = self.bound_rows(network, PointBatch(rows), [range(len(rows))], seeds=[seed])
        return Samples(rows.cpu(), {}, nats.cpu())

    def texts(self, rows: Tensor, tokenizer: Tokenizer | None) -> list[str]:
        """Format each of the first 16 rows as text: its numbers with four decimals, separated by spaces."""
        return [" ".join(f"{value:.4f}" for value in row.flatten().tolist()) for row in rows[:16]]

    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        arrays = {"x": samples.rows.numpy()}
        return Stored(arrays if samples.nats is None else arrays | {"nats": samples.nats.numpy()}, None)

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        if not isinstance(data, PointsConfig):
            yield "data", "a flow learns from real numbers: give data.points, such as {op: two_moons}"

    def conditions(self, changes: Mapping[str, Any]) -> None:
        if changes:
            raise UserError("a flow draws no text: --forbid, --allow and --matching are for language models")
