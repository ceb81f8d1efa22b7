"""The engine: a network and a process, composed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.engine.network import CompileMode, Network
from sedd_graph.engine.process import OnDraw, Process, SampleRequest, Samples
from sedd_graph.engine.regions import Model
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.store.files import disk_faults

__all__ = ["Bound", "Engine", "TrainedModule"]


class Bound(NamedTuple):
    """An upper bound on -log p in nats per sequence, and the standard error of its mean."""

    mean: float
    standard_error: float


class TrainedModule(nn.Module):
    """Network and loss in one: the module that is compiled, and that DDP wraps."""

    def __init__(self, model: Model, process: Process) -> None:
        super().__init__()
        self.model = model
        self._process = process

    def forward(self, draw: Any, batch: Any, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return nats [b] and the saved activations. ``key`` int32 [b] turns dropout on."""
        return self._process.loss(self.model, draw, batch, key)


class Engine:
    """A compiled training and sampling engine. Make one with :func:`sedd_graph.build`.

    ``network`` holds the module and how it is compiled, ``process`` what it is trained on and generates.
    """

    def __init__(self, network: Network, process: Process, *, on_save: Callable[[Path], None] | None = None) -> None:
        self.network, self.process, self._on_save = network, process, on_save
        for name, part in process.learned().items():
            self.model.add_module(name, part)
        self.trained = TrainedModule(self.model, process)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        name, device, mode = self.network.graph.name, self.network.device, self.network.compile_mode
        return f"Engine({name!r}, {self.process.describe()}, {count:,} parameters, {device}, compile={mode})"

    @property
    def model(self) -> Model:
        """The network's module."""
        return self.network.model

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def compile_mode(self) -> CompileMode:
        return self.network.compile_mode

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        """Compile as :meth:`Network.compile` does."""
        trained = self.trained if self.process.trains else None
        self.network.compile(mode if self.process.compiles else "off", trained, everywhere=everywhere)

    # -- training and evaluation ------------------------------------------------------------------------------------

    def draw(self, batch: Any, *, random: Randomness) -> Any:
        """Draw the noise of one training step for ``batch``."""
        return self.process.draw(batch, random=random)

    def loss(self, rows: Any, *, t: Tensor | None = None, xt: Tensor | None = None) -> Tensor:
        """Return the training loss of one draw, nats per row, float32 [b], with gradients.

        Args:
            rows: clean rows: int64 [b, l] of tokens, float32 [b, ...] of points, or a batch with roles.
            t: float32 [b]: the time; the value is then the integrand there.
            xt: int64 [b, l]: the noisy rows.

        Randomness comes from torch's global generator. Raises :class:`UserError` for rows that do not fit.
        """
        batch = self.process.batch(rows, self.device)
        random = Randomness(torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ()))))
        t, xt = (None if v is None else v.to(self.device) for v in (t, xt))
        draw = self.process.draw(batch, random=random, t=t, xt=xt)
        key = random.keys(len(batch)) if self.model.training else None
        loss: Tensor = self.trained(draw, batch, key)[0]
        return loss

    @torch.no_grad()
    def bound_rows(self, rows: Any, *, seed: int, draws: int = 1, on_draw: OnDraw | None = None) -> Tensor:
        """Return an upper bound on -log p of each row, nats, float64 [b] on the CPU, averaged over ``draws``; evaluation mode."""
        batch = self.process.batch(rows, self.device)
        with self.network.evaluating():
            seeds = [mix_seed(seed, number) for number in range(draws)]
            return self.process.bound_rows(self.network, batch, seeds=seeds, on_draw=on_draw)

    def bound(self, batches: Iterable[Any], *, draws: int = 1, seed: int = 0) -> Bound:
        """Bound -log p over all rows of ``batches``: mean nats per row and its standard error.

        The error is that of a mean over independent rows; more ``draws`` reduce the variance of each row's value.
        """
        found = [self.bound_rows(b, seed=mix_seed(seed, i), draws=draws) for i, b in enumerate(batches)]
        if not found:
            raise UserError("bound: there are no batches")
        values = torch.cat(found)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Bound(values.mean().item(), error)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(self, batch: int, length: int | None = None, **fields: Any) -> Tensor:
        """Draw ``batch`` rows on the CPU: int64 [b, l] of tokens, float32 [b, ...] of points.

        ``fields`` are those of :class:`SampleRequest`. Raises :class:`UserError` where the request cannot be met.
        """
        return self.generate(SampleRequest(batch=batch, length=length, **fields)).rows

    @torch.no_grad()
    def generate(self, request: SampleRequest) -> Samples:
        """Draw samples, with a record of how. Raises :class:`UserError` where the request cannot be met."""
        if request.batch < 1 or (request.length is not None and request.length < 1):
            raise UserError(f"sample: batch and length must be at least 1, not {request.batch} and {request.length}")
        if request.steps is not None and request.steps < 1:
            raise UserError(f"sample: steps must be at least 1, not {request.steps}")
        for name, reason in self.process.refuses.items():
            if getattr(request, name) is not None:
                raise UserError(f"sample: {reason}: leave {name} out")
        return self.process.sample(self.network, request)

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` and the other files that a run folder is built from. Refuses a folder with a model in it."""
        folder = Path(directory)
        target = folder / "model.safetensors"
        if target.exists():
            raise UserError(f"{target} exists already; choose another folder")
        part = folder / ".model.safetensors.part"
        with disk_faults(target.name, folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors({k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}, part)
            part.replace(target)
        if self._on_save is not None:
            self._on_save(folder)
