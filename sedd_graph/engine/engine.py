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
    """An upper bound on -log p: its mean over rows in nats per row, and the standard error of the mean."""

    mean: float
    standard_error: float


class TrainedModule(nn.Module):
    """Network and loss as one module, which ``torch.compile`` compiles and DistributedDataParallel wraps."""

    def __init__(self, model: Model, process: Process) -> None:
        super().__init__()
        self.model = model
        self._process = process

    def forward(self, draw: Any, batch: Any, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one draw; arguments and result are those of :meth:`Process.loss`."""
        return self._process.loss(self.model, draw, batch, key)


class Engine:
    """A network and the process that it is trained for. Make one with :func:`sedd_graph.build`.

    Args:
        network: The network on a device.
        process: The process, on the same device.
        on_save: Called with the folder after :meth:`save` has written the weights, to write further files.
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
        """The network's module, with the learned components of the process."""
        return self.network.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.device

    @property
    def compile_mode(self) -> CompileMode:
        """The mode of the last :meth:`compile`, ``off`` before it."""
        return self.network.compile_mode

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        """Compile the network in place; see :meth:`Network.compile`. Families that cannot be compiled stay eager."""
        trained = self.trained if self.process.trains else None
        self.network.compile(mode if self.process.compiles else "off", trained, everywhere=everywhere)

    # -- training and evaluation ------------------------------------------------------------------------------------

    def draw(self, batch: Any, *, random: Randomness) -> Any:
        """Draw the noise of one training step for ``batch``."""
        return self.process.draw(batch, random=random)

    def loss(self, rows: Any, *, t: Tensor | None = None, xt: Tensor | None = None) -> Tensor:
        """Compute the training loss of one noise draw, with gradients. Random numbers come from torch's global generator.

        Args:
            rows: Clean rows: int64 [b, l] of tokens, float32 [b, ...] of points, or a batch.
            t: float32 [b], times in [0, 1]; the loss is then the integrand at ``t``. Drawn if None.
            xt: int64 [b, l], the noised rows. Drawn if None.

        Returns:
            Nats per row, float32 [b].

        Raises:
            UserError: The rows do not fit the model.
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
        """Bound -log p of each row from above, in evaluation mode.

        Args:
            rows: Clean rows, as for :meth:`loss`.
            seed: Seed of the noise.
            draws: Number of noise draws per row that the bound is averaged over.
            on_draw: Observes each draw.

        Returns:
            Nats per row, float64 [b] on the CPU.
        """
        batch = self.process.batch(rows, self.device)
        with self.network.evaluating():
            seeds = [mix_seed(seed, number) for number in range(draws)]
            return self.process.bound_rows(self.network, batch, seeds=seeds, on_draw=on_draw)

    def bound(self, batches: Iterable[Any], *, draws: int = 1, seed: int = 0) -> Bound:
        """Bound the mean of -log p over all rows of ``batches`` from above, in nats per row.

        The standard error is that of a mean over independent rows. More noise ``draws`` reduce the variance of each row's bound.

        Raises:
            UserError: There are no batches.
        """
        found = [self.bound_rows(b, seed=mix_seed(seed, i), draws=draws) for i, b in enumerate(batches)]
        if not found:
            raise UserError("bound: there are no batches")
        values = torch.cat(found)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Bound(values.mean().item(), error)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(self, batch: int, length: int | None = None, **fields: Any) -> Tensor:
        """Draw ``batch`` rows, on the CPU: int64 [b, l] of tokens, float32 [b, ...] of points.

        Args:
            batch: Number of rows, b.
            length: Tokens per row, l.
            **fields: Further fields of :class:`SampleRequest`, such as ``steps``, ``seed`` and ``prompt``.

        Raises:
            UserError: The request cannot be met.
        """
        return self.generate(SampleRequest(batch=batch, length=length, **fields)).rows

    @torch.no_grad()
    def generate(self, request: SampleRequest) -> Samples:
        """Draw samples, with facts about how they were drawn. Raises :class:`UserError` where the request cannot be met."""
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
        """Write a folder that :func:`sedd_graph.build` opens: ``model.safetensors``, the lock file, and a tokenizer if any.

        Raises:
            UserError: The folder holds a model already.
        """
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
