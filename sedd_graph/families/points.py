"""Points: a flow with exact likelihood, sampled by its derived inverse.

Units of the graph are evaluated one by one, eagerly: a flow keeps its activations, whatever a block's ``memory`` says, since
its log-determinant needs them. Axes: b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import PointBatch, Randomness
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import DataFacts, OnDraw, Process, SampleRequest, Samples, Stored, Text
from sedd_graph.engine.regions import Model
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import UserError
from sedd_graph.families.points_plan import PointsPlan
from sedd_graph.graph.model import Graph

__all__ = ["PointProcess"]


class PointProcess(Process):
    """The likelihood of a flow. By the change of variables -log p(x) = -log base(z) - log |det dz/dx|: exact, no bound."""

    family = "points"
    batch_type = PointBatch
    compiles = False
    _WHOLE = "a flow draws whole rows by its inverse"
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("length", "steps", "prompt", "attend", "conditions", "allowed", "classifier", "on_step"), _WHOLE
    )

    def __init__(self, plan: PointsPlan, base: Likelihood, graph: Graph, *, device: torch.device) -> None:
        self.plan, self.base = plan, base.to(device)
        self._layout = Layout(graph.root, ())

    @classmethod
    def make(
        cls,
        plan: PointsPlan,
        registry: Registry,
        *,
        graph: Graph,
        device: torch.device,
        forbidden: Sequence[int] = (),
        pieces: Callable[[], Sequence[bytes | None]] | None = None,
    ) -> PointProcess:
        """Make the process that ``plan`` declares."""
        base: Likelihood = registry.component(plan.contract.op)(plan.config, Context({}))
        return cls(plan, base, graph, device=device)

    def describe(self) -> str:
        return self.plan.describe()

    # -- training and evaluation ------------------------------------------------------------------------------------

    def batch(self, rows: Tensor | PointBatch, device: torch.device) -> PointBatch:
        batch = (rows if isinstance(rows, PointBatch) else PointBatch(rows)).to(device)
        if not batch.x.is_floating_point() or tuple(batch.x.shape[1:]) != self.plan.shape:
            shape = ", ".join(map(str, ("batch", *self.plan.shape)))
            raise UserError(f"rows must be floats [{shape}], not {batch.x.dtype} {list(batch.x.shape)}")
        return batch

    def draw(self, batch: PointBatch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> None:
        """No noise is drawn: the likelihood is exact."""
        if t is not None or xt is not None:
            raise UserError("loss: a flow has no noise: leave t and xt out")

    def loss(self, model: Model, draw: None, batch: PointBatch, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """-log p of each row, nats [b]. No activation is saved."""
        run = LayerRun(self._layout, model, key)
        run.put(self._layout.inputs.values(), [batch.x])
        with full_precision(batch.x):
            log_det = forward_with_log_det(run, len(batch))
            (z,) = run.take(self._layout.outputs.values())
            return self.base.nats(z) - log_det, {}

    def inverse(self, model: Model, z: Tensor) -> Tensor:
        """Return the rows [b, ...] that the flow maps to ``z``."""
        run = LayerRun(self._layout, model)
        run.put(self._layout.outputs.values(), [z])
        run.invert()
        (x,) = run.take(self._layout.inputs.values())
        return x

    def bound_rows(
        self, network: Network, batch: PointBatch, *, seeds: Sequence[int], on_draw: OnDraw | None = None
    ) -> Tensor:
        """-log p of each row, exact but where a contraction's log-determinant is estimated, which the seeds determine."""
        total = torch.zeros(len(batch), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                total += self.loss(network.model, None, batch, None)[0].double().cpu()
        return total / len(seeds)

    def example(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, *self.plan.shape)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Rows float32 [b, ...]: the inverse of the flow at draws of the base density."""
        generator = request.generator(network.device)
        z = self.base.draw((request.batch, *self.plan.out), generator=generator)
        with network.evaluating():
            rows = self.inverse(network.model, z)
            seed = mix_seed(request.seed or 0, 0)
            nats = self.bound_rows(network, PointBatch(rows), seeds=[seed])
        return Samples(rows.cpu(), {}, nats)

    def texts(self, rows: Tensor, tokenizer: Text | None) -> list[str]:
        """The first rows as numbers."""
        return [" ".join(f"{value:.4f}" for value in row.flatten().tolist()) for row in rows[:16]]

    def stored(self, samples: Samples, tokenizer: Text | None) -> Stored:
        arrays = {"x": samples.rows.numpy()}
        return Stored(arrays if samples.nats is None else arrays | {"nats": samples.nats.numpy()}, None)

    def check_data(self, data: DataFacts) -> Iterator[tuple[str, str]]:
        """The plan has refused text already."""
        return iter(())

    def conditions(self, changes: Mapping[str, Any]) -> None:
        if changes:
            raise UserError("a flow draws no text: --forbid, --allow and --matching are for language models")
