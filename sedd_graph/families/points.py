"""The engine of a flow: exact likelihood forward, samples by the derived inverse.

It has the methods that training and evaluation call on any engine. Units of the graph are evaluated one by one, eagerly:
a flow keeps its activations, whatever a block's ``memory`` says, since its log-determinant needs them.

Axes: b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.batch import PointBatch, Randomness
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.tokens.process import Likelihood
from sedd_graph.engine.engine import Bound, CompileMode, Engine, mean_and_error, mix_seed
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import Model
from sedd_graph.errors import UserError
from sedd_graph.families.points_plan import FlowPlan
from sedd_graph.graph.model import Graph

__all__ = ["FlowEngine", "FlowModule"]


class FlowModule(nn.Module):
    """Network and likelihood in one: what DDP wraps."""

    def __init__(self, model: Model, layout: Layout, base: Likelihood, plan: FlowPlan) -> None:
        super().__init__()
        self.model, self.base = model, base
        self._layout, self._plan = layout, plan

    def forward(self, draw: None, batch: PointBatch, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats of each row, [b]: -log p(x), exact. ``key`` int32 [b] turns dropout on. (No port is saved: {}.)"""
        run = LayerRun(self._layout, self.model, key)
        run.put(self._layout.inputs.values(), [batch.x])
        with full_precision(batch.x):
            log_det = forward_with_log_det(run, len(batch))
            (z,) = run.take(self._layout.outputs.values())
            return self.base.nats(z) - log_det, {}

    def inverse(self, z: Tensor) -> Tensor:
        """The rows [b, ...] that the flow sends to ``z``."""
        run = LayerRun(self._layout, self.model)
        run.put(self._layout.outputs.values(), [z])
        run.invert()
        (x,) = run.take(self._layout.inputs.values())
        return x


class FlowEngine(Engine):
    """An exact-likelihood engine. Make one with :func:`sedd_graph.build`."""

    def __init__(
        self,
        graph: Graph,
        registry: Registry,
        plan: FlowPlan,
        *,
        device: torch.device,
        on_save: Callable[[Path], None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(graph, registry, None, device=device, compile="off", on_save=on_save, seed=seed)
        self.plan = plan
        base: Likelihood = registry.component(plan.contract.op)(plan.config, Context({}))
        self.flow = FlowModule(self.model, Layout(graph.root, ()), base.to(device), plan)

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        """A flow runs eagerly in every mode."""
        self.compile_mode = "off"

    # -- training and evaluation ------------------------------------------------------------------------------------

    @property
    def trained(self) -> nn.Module:
        return self.flow

    def draw(self, batch: PointBatch, *, random: Randomness) -> None:  # type: ignore[override]
        """Nothing: the likelihood is exact."""

    def loss(self, x: Tensor | PointBatch) -> Tensor:  # type: ignore[override]
        """-log p of each row of ``x`` float32 [b, ...], nats, [b], with gradients."""
        batch = self._batch(x)
        keys = torch.randint(-(2**31), 2**31, (len(batch),), device=self.device).int() if self.model.training else None
        loss: Tensor = self.flow(None, batch, keys)[0]
        return loss

    def _batch(self, x: Tensor | PointBatch) -> PointBatch:
        batch = (x if isinstance(x, PointBatch) else PointBatch(x)).to(self.device)
        if not batch.x.is_floating_point() or tuple(batch.x.shape[1:]) != self.plan.shape:
            shape = ", ".join(map(str, ("batch", *self.plan.shape)))
            raise UserError(f"rows must be floats [{shape}], not {batch.x.dtype} {list(batch.x.shape)}")
        return batch

    @torch.no_grad()
    def bound_rows(self, batch: PointBatch | Tensor, *, seed: int, draws: int = 1) -> Tensor:  # type: ignore[override]
        """-log p of each row, nats, float64 [b] on the CPU; evaluation mode. Exact, so that one draw is enough: ``draws``
        counts only where a contraction's log-determinant is an estimate, which ``seed`` fixes."""
        rows = self._batch(batch)
        total = torch.zeros(len(rows), dtype=torch.float64)
        with self._evaluating(), torch.random.fork_rng(devices=[]):
            for number in range(draws):
                torch.manual_seed(mix_seed(seed, number))
                total += self.flow(None, rows)[0].double().cpu()
        return total / draws

    def bound(self, batches: Iterable[Tensor | PointBatch], *, draws: int = 1, seed: int = 0) -> Bound:  # type: ignore[override]
        """-log p over all rows of ``batches``: mean nats per row and its standard error."""
        return mean_and_error([self.bound_rows(b, seed=mix_seed(seed, i), draws=draws) for i, b in enumerate(batches)])

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, batch: int, *, seed: int | None = None) -> Tensor:  # type: ignore[override]
        """Draw ``batch`` rows, float32 [b, ...] on the CPU: the base density, undone. The same ``seed`` gives the same rows
        on the same device."""
        if batch < 1:
            raise UserError(f"sample: batch must be at least 1, not {batch}")
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator(self.device).manual_seed(mix_seed(chosen))
        z = self.flow.base.draw((batch, *self.plan.out), generator=generator)
        with self._evaluating():
            return self.flow.inverse(z).cpu()
