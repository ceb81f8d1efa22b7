"""The engine: a network together with the diffusion process or flow that it is trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sedd_graph.component.base import Component
from sedd_graph.component.check import Check
from sedd_graph.component.counter_rng import fold
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.engine.network import CompileMode, Network
from sedd_graph.engine.noise_draws import NoiseDraws
from sedd_graph.engine.process import OnDraw, Process
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import SampleRequest, Samples
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.store.durable import make_folder, rename
from sedd_graph.store.files import disk_faults

__all__ = ["Bound", "Engine", "Losses", "TrainedModule"]


class Bound(NamedTuple):
    """Monte Carlo estimate of an upper bound on -log p of a row under the model, in nats.

    Attributes:
        mean: Mean of the bound over the evaluated rows, nats per row.
        standard_error: Standard error of ``mean``, nats per row; nan for a single row.
    """

    mean: float
    standard_error: float


class Losses(Protocol):
    """Computes the training loss of a network: a process, or a distillation."""

    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss for one noise draw, as :meth:`Process.loss` does."""


class TrainedModule(nn.Module):
    """Network and training loss as one module, for ``torch.compile`` and DistributedDataParallel to wrap.

    The training loss is that of the process, plus the auxiliary losses of components (:meth:`Component.penalty`).

    Args:
        model: Module of the network.
        process: Process that computes the loss, or what takes its place.
        helpers: Networks beside the network, see :attr:`Engine.helpers`.
    """

    def __init__(self, model: Model, process: Losses, helpers: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.helpers = model, helpers
        self._process = process
        parts = [part for part in model.modules() if isinstance(part, Component)]
        self._penalised = [part for part in parts if type(part).penalty is not Component.penalty]

    def forward(self, draw: Any, batch: Any, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss for one noise draw, as :meth:`Process.loss` does.

        Args:
            draw: Noise draw returned by :meth:`Process.draw`.
            batch: Batch of clean rows.
            key: Dropout key of each row, int32 [b]; None turns dropout off.

        Returns:
            The loss in nats per row, float32 [b], with the penalties of components in training, and the saved activations
            of the network by dotted path.
        """
        loss, saved = self._process.loss(self.model, draw, batch, key)
        if self.model.training and key is not None:
            for place, part in enumerate(self._penalised):
                penalty = part.penalty(fold(key, place))
                if penalty is not None:
                    loss = loss + penalty * batch.width
        return loss, saved


class Engine:
    """A network and the process that it is trained for: loss, likelihood bound, sampling and saving.

    Created by :func:`sedd_graph.build`.

    Args:
        network: Network on its device.
        process: Process on the same device.
        on_save: Callback of :meth:`save`, called with the folder after the weights are written; it writes the lock file
            and the tokenizer. None: only the weights are written.

    Attributes:
        trained: Network and loss as one module, for training loops.
        helpers: Networks that are trained or frozen beside the network, and that checkpoints store; None for none.
        checks: Results of the checks, if the engine was built with ``prove=True``; else empty.
    """

    checks: Sequence[Check] = ()
    helpers: nn.Module | None = None

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
        """Module of the network, which also contains the trainable components of the process."""
        return self.network.model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.network.device

    @property
    def compile_mode(self) -> CompileMode:
        """Compile mode that :meth:`compile` chose last; ``off`` before the first call."""
        return self.network.compile_mode

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        """Compile the network in place.

        Args:
            mode: Scope of compilation, see :meth:`Network.compile`. Ignored for a family that cannot be compiled; it
                stays eager.
            everywhere: Whether evaluation and sampling run compiled code too. None: only on a GPU.
        """
        tail = self.process.tail(self.model)
        trained = None if not self.process.trains else self.trained if tail is None else tail.split.trunk
        self.network.compile(mode if self.process.compiles else "off", trained, everywhere=everywhere)

    # -- training and evaluation ------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        """Unit of the training loss, see :attr:`Process.loss_unit`."""
        return self.process.loss_unit

    def begin_step(self, share: float, averaged: Callable[[], AbstractContextManager[None]]) -> str | None:
        """Prepare a training step; by default, do nothing.

        Args:
            share: Share of the run that is done, in [0, 1].
            averaged: Makes a context within which the network has its averaged weights.

        Returns:
            A line for the user; None for none.
        """
        return None

    def draw(self, batch: Any, *, random: Randomness) -> Any:
        """Draw the noise of one training step.

        Args:
            batch: Batch of clean rows, on the engine's device.
            random: Source of random numbers.

        Returns:
            The noise draw, in the form that :meth:`Process.loss` takes.
        """
        return self.process.draw(batch, random=random)

    def loss(self, rows: Any, *, t: Tensor | None = None, xt: Tensor | None = None) -> Tensor:
        """Compute the training loss for one noise draw, with gradients.

        The noise and the dropout keys (in training mode) come from torch's global random generator.

        Args:
            rows: Clean rows: tokens, int64 [b, l]; points, float32 [b, ...]; or a batch of the process's
                ``batch_type``.
            t: Diffusion times in [0, 1], float32 [b]; drawn if None. The training objective is an integral over t; with
                ``t`` the loss is its integrand at ``t``.
            xt: Noised rows x_t, int64 [b, l]; drawn if None.

        Returns:
            The loss in nats per row, float32 [b].

        Raises:
            UserError: The rows do not have the model's shape or dtype, or the family does not support ``t`` or ``xt``.
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
        """Estimate an upper bound on -log p of each row, with the network in evaluation mode and without gradients.

        Args:
            rows: Clean rows: tokens, int64 [b, l]; points, float32 [b, ...]; or a batch of the process's
                ``batch_type``.
            seed: Seed of the noise.
            draws: Number of noise draws per row over which the bound is averaged.
            on_draw: Callback for each noise draw, see :data:`sedd_graph.engine.process.OnDraw`.

        Returns:
            The bound in nats per row, float64 [b], on the CPU.

        Raises:
            UserError: The rows do not have the model's shape or dtype.
        """
        batch = self.process.batch(rows, self.device)
        with self.network.evaluating():
            seeds = [mix_seed(seed, number) for number in range(draws)]
            found = self.process.bound_rows(self.network, batch, [range(len(batch))], seeds=seeds, on_draw=on_draw)
            return found.cpu()

    @torch.no_grad()
    def measures(self, rows: Any, *, seed: int) -> Mapping[str, Tensor]:
        """Return further measures of each row by name, see :meth:`Process.measures`.

        Args:
            rows: Clean rows, as for :meth:`bound_rows`.
            seed: Seed of the noise.
        """
        batch = self.process.batch(rows, self.device)
        with self.network.evaluating():
            return self.process.measures(self.network, batch, range(len(batch)), seed=mix_seed(seed, 0))

    def bound(self, batches: Iterable[Any], *, draws: int = 1, seed: int = 0) -> Bound:
        """Estimate an upper bound on the mean of -log p over the rows of ``batches``, in nats per row.

        The standard error treats rows as independent. It takes into account that noise levels are stratified over each
        batch, which reduces the error (:meth:`sedd_graph.engine.noise_draws.NoiseDraws.standard_error`).

        Args:
            batches: Batches of clean rows, each in a form that :meth:`loss` takes.
            draws: Number of noise draws per row over which the bound is averaged; more reduce the variance of each
                row's estimate.
            seed: Seed of the noise.

        Raises:
            UserError: ``batches`` is empty, or rows do not have the model's shape or dtype.
        """
        found, drawn = [], NoiseDraws()
        for index, batch in enumerate(batches):
            found.append(self.bound_rows(batch, seed=mix_seed(seed, index), draws=draws, on_draw=drawn.add))
            drawn.first += len(found[-1])
        if not found:
            raise UserError("bound: there are no batches")
        values = torch.cat(found)
        return Bound(values.mean().item(), drawn.standard_error(values.numpy(), np.ones(len(values))))

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(self, batch: int, length: int | None = None, **fields: Any) -> Tensor:
        """Draw samples and return them as a tensor.

        Args:
            batch: Number of rows, b.
            length: Tokens per row, l; the largest number of tokens where the model chooses lengths. Required for
                tokens; None where rows are points.
            **fields: Further fields of :class:`SampleRequest`, such as ``steps``, ``seed`` and ``prompt``.

        Returns:
            Tokens, int64 [b, l], or points, float32 [b, ...], on the CPU.

        Raises:
            UserError: A field is invalid, or the family does not support it.
        """
        return self.generate(SampleRequest(batch=batch, length=length, **fields)).rows

    @torch.no_grad()
    def generate(self, request: SampleRequest) -> Samples:
        """Draw samples and return them with metadata about how they were drawn.

        Args:
            request: Number of rows, length, seed, prompt and conditions.

        Raises:
            UserError: A field of ``request`` is invalid, or the family does not support it.
        """
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
        """Write a model folder that :func:`sedd_graph.build` opens.

        The folder contains the weights (``model.safetensors``), the lock file of the blueprint, and the tokenizer if
        there is one.

        Args:
            directory: The folder, created if it does not exist.

        Raises:
            UserError: The folder already contains ``model.safetensors``.
        """
        folder = Path(directory)
        target = folder / "model.safetensors"
        if target.exists():
            raise UserError(f"{target} exists already; choose another folder")
        part = folder / ".model.safetensors.part"
        with disk_faults(target.name, folder):
            make_folder(folder)
            save_tensors({k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}, part)
            rename(part, target)
        if self._on_save is not None:
            self._on_save(folder)
