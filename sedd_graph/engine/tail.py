"""The end of training: output head and loss of a few positions at a time, and only of those that the loss reads.

With a vocabulary of 50,257 tokens, the logits of one batch and their gradient take more memory than the rest of the
network, and most of the time. A loss that is a sum over positions does not need them all at once: this module evaluates the
trunk of the network at all positions, and then the position-wise end of the graph (norm, modulation, head) together with
the loss on chunks of the positions that are read. The gradient of a chunk is computed beside its loss, so that nothing of
the size of the vocabulary is kept and nothing is computed twice (as in Liger Kernel, arXiv 2410.10989, for one loss).

Axes: b batch, l length, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sedd_graph.diffusion.tokens.groups import Groups, group
from sedd_graph.engine.compiling import inductor
from sedd_graph.engine.host_number import HostNumber
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.engine.regions import Model
from sedd_graph.engine.split import Split, outputs_of

__all__ = ["Reading", "Tail", "tail_bytes"]

WORKING, WORKING_ON_GPU = 2**28, 2**30
"""Memory in which a chunk is evaluated, bytes; on a GPU larger chunks are faster."""
LARGEST = 4096
"""Largest number of positions of a chunk."""
PARTS = 8
"""A batch has at least this many chunks, so that little is computed where few positions are read."""
GENEROUS, USUAL = 32, 8
"""Numbers of float32 tensors of the end's width that a chunk takes: at most, and usually. A chunk is not measured if as many
as ``GENEROUS`` fit into its memory."""
COMPILED_WIDTH = 1024
"""Least number of values of a position for which compiled code repays the time of compiling it."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """The positions of a batch that a loss reads.

    Attributes:
        read: The positions, bool [b, l].
        blocks: Number of blocks of a row with noise levels of their own, k; 1 if there are none.
        rows_of: Function that returns the draw and the batch of groups of positions, as rows of m positions.
    """

    read: Tensor
    blocks: int
    rows_of: Callable[[Groups], tuple[Any, Any]]


class Tail:
    """Network and loss, evaluated as a trunk at all positions and an end at those that are read.

    Args:
        model: Module of the network.
        split: The network as a trunk and an end.
        terms: The loss of a few positions, a module: from network outputs by name, a draw and a batch to one loss per row.

    Attributes:
        model: As above.
        split: As above.
        terms: As above.
    """

    def __init__(self, model: Model, split: Split, terms: nn.Module) -> None:
        self.model, self.split, self.terms = model, split, terms
        self._end = _End(model, split, terms)
        # graphs may break: kernels and objectives may look at values
        self._end.compile(dynamic=False, backend=inductor)
        self._position_bytes: float | None = None

    @property
    def end(self) -> Callable[..., Tensor]:
        """Function from the tensors that the end reads, a draw and a batch to the loss of each row."""
        compiled = self.model.compiled and self.split.width >= COMPILED_WIDTH
        return self._end if compiled else self._end.forward

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the end and of the loss."""
        return [p for p in self._end.parameters() if p.requires_grad]

    def __call__(
        self, inputs: Mapping[str, Tensor], key: Tensor | None, reading: Reading
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate network and loss.

        Args:
            inputs: Input tensors of the network by name.
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            reading: The positions that are read.

        Returns:
            The sum of the losses of each row's positions, nats, [b], and the saved activations by dotted path.
        """
        groups, used = group(reading.read, reading.blocks)
        # on its way to the host while a GPU evaluates the trunk
        count = HostNumber(used)
        values = self.split.trunk(key, *[inputs[name] for name in self.model.input_names])
        own, saved = values[: len(self.split.layouts)], values[len(self.split.layouts) :]
        return self._sum(own, reading, groups, count), dict(zip(self.model.tap_names, saved, strict=True))

    def finish(self, values: Sequence[Tensor], reading: Reading) -> Tensor:
        """Evaluate end and loss on what the trunk has computed.

        Args:
            values: The tensors that the end reads.
            reading: The positions that are read.

        Returns:
            The sum of the losses of each row's positions, nats, [b].
        """
        groups, used = group(reading.read, reading.blocks)
        return self._sum(values, reading, groups, HostNumber(used))

    def _sum(self, values: Sequence[Tensor], reading: Reading, groups: Groups, count: HostNumber) -> Tensor:
        work = _Work(self, reading, groups, self._chunk(values, reading, groups), count)
        if torch.is_grad_enabled():
            loss: Tensor = _Loss.apply(work, *values, *work.parameters)
            return loss
        return work.run(values, [False] * (len(values) + len(work.parameters)))[0]

    def _chunk(self, values: Sequence[Tensor], reading: Reading, groups: Groups) -> int:
        """Return the number of groups that are evaluated at a time."""
        total, size = reading.read.numel(), groups.place.shape[1]
        most = min(LARGEST, -(-total // PARTS))
        room = WORKING_ON_GPU if reading.read.device.type == "cuda" else WORKING
        if most * self.split.width * 4 * GENEROUS > room:
            if self._position_bytes is None:
                small, large = (
                    _working_bytes(_Work(self, reading, groups.part(0, n), n, None), values) for n in (1, 3)
                )
                self._position_bytes = max(1.0, (large - small) / (2 * size))
            most = min(most, int(room / self._position_bytes))
        return max(1, most // size)


class _End(nn.Module):
    """Position-wise end of a network, and the loss of its outputs."""

    def __init__(self, model: Model, split: Split, terms: nn.Module) -> None:
        super().__init__()
        modules: dict[str, Any] = model.root._modules
        self.nodes = nn.ModuleList(modules[name] for name, _ in split.steps)
        self.terms = terms
        self._split = split

    def forward(self, values: Sequence[Tensor], draw: Any, batch: Any) -> Tensor:
        losses: Tensor = self.terms(outputs_of(self._split, list(self.nodes), values), draw, batch)
        return losses


@dataclasses.dataclass(eq=False)
class _Work:
    """Evaluation of the end on all groups of a batch, ``chunk`` at a time; ``count`` are in use (None: all)."""

    tail: Tail
    reading: Reading
    groups: Groups
    chunk: int
    count: HostNumber | None

    def __post_init__(self) -> None:
        self.parameters = self.tail.parameters
        self.end = self.tail.end
        kind = self.reading.read.device.type
        enabled = kind != "meta" and torch.is_autocast_enabled(kind)
        self.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else torch.bfloat16, enabled)

    def run(
        self, values: Sequence[Tensor], wanted: Sequence[bool], scale: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the losses of the rows, [b], and gradients of their sum, or of their sum with factors.

        Args:
            values: The tensors that the end reads.
            wanted: For each of them, and then for each parameter, whether its gradient is wanted.
            scale: Factors of the losses, [b]; None: 1.
        """
        layouts = self.tail.split.layouts
        found: list[Tensor | None] = [None] * len(wanted)
        for i, (layout, value) in enumerate(zip(layouts, values, strict=True)):
            if wanted[i]:
                found[i] = layout.zeros(value)
        total = torch.zeros(len(self.reading.read), dtype=torch.float64, device=self.reading.read.device)
        dtype = torch.float32
        count = len(self.groups.row) if self.count is None else max(1, int(self.count))
        for start in range(0, count, self.chunk):
            part = self.groups.part(start, self.chunk)
            leaves = [layout.take(v.detach(), part) for layout, v in zip(layouts, values, strict=True)]
            losses, made = self._losses(leaves, part, wanted, scale)
            total.index_add_(0, part.row, losses.detach().double())
            dtype = losses.dtype
            self._add(found, made, part)
        return total.to(dtype), found

    def _losses(
        self, leaves: list[Tensor], part: Groups, wanted: Sequence[bool], scale: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the losses of a chunk, and the gradients that are wanted, by index."""
        kind, dtype, enabled = self.autocast
        # one cast of a weight is of one graph, which the gradient frees: not to be cached for the next chunk
        with (
            torch.set_grad_enabled(any(wanted)),
            torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False),
        ):
            draw, batch = self.reading.rows_of(part)
            leaves = [x.requires_grad_() if want else x for x, want in zip(leaves, wanted, strict=False)]
            losses = self.end(leaves, draw, batch)
        made: list[Tensor | None] = [None] * len(wanted)
        if any(wanted) and losses.requires_grad:
            places = [i for i, want in enumerate(wanted) if want]
            every = [*leaves, *self.parameters]
            weights = torch.ones_like(losses) if scale is None else scale[part.row].to(losses.dtype)
            with torch.autocast(kind, dtype, enabled=False):  # products of the backward pass, as outside of autocast
                gradients = torch.autograd.grad(losses, [every[i] for i in places], weights, allow_unused=True)
            for i, gradient in zip(places, gradients, strict=True):
                made[i] = gradient
        return losses, made

    def _add(self, found: list[Tensor | None], made: list[Tensor | None], part: Groups) -> None:
        """Add the gradients of a chunk, ``made``, to those of all, ``found``, in place."""
        layouts, own = self.tail.split.layouts, set[int]()
        for i, gradient in enumerate(made):
            if gradient is None:
                continue
            before = found[i]
            if i < len(layouts) and before is not None:
                layouts[i].add(before, gradient, part)
            elif before is None:
                # two parameters may have one tensor as their gradients, which is not to be added to twice
                shared = gradient.data_ptr() in own or not gradient.is_contiguous()
                found[i] = gradient.clone(memory_format=torch.contiguous_format) if shared else gradient
                own.add(gradient.data_ptr())
            else:
                before.add_(gradient)


class _Loss(torch.autograd.Function):
    """Losses of the rows; the gradient of their sum is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Tensor:
        values = tensors[: len(work.tail.split.layouts)]
        loss, ctx.gradients = work.run(values, ctx.needs_input_grad[1:])
        ctx.work = work
        ctx.save_for_backward(*values)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found, ctx.gradients = ctx.gradients, None
        wanted = ctx.needs_input_grad[1:]
        if found is None or not _same(gradient):
            # rows with factors of their own: the gradients of parameters are sums over rows, and are computed again
            found = ctx.work.run(ctx.saved_tensors, wanted, gradient)[1]
        else:
            factor = gradient.reshape(-1)[0]
            found = [None if x is None else x.mul_(factor) for x in found]
        return (None, *found)


def _same(gradient: Tensor) -> bool:
    """Return whether all entries are known to be equal, as those of the gradient of a sum; a GPU is not waited for."""
    if gradient.numel() == 1 or not any(gradient.stride()):
        return True
    return gradient.device.type == "cpu" and bool((gradient == gradient[0]).all())


def tail_bytes(parts: Split, values: Sequence[Tensor], positions: int) -> tuple[int, int]:
    """Return the memory that a tail takes in a training step on a CPU, bytes: what it saves for backward, and one chunk.

    Args:
        parts: The split network.
        values: The tensors that the end reads.
        positions: Number of positions of a batch.
    """
    # the tensors, and the gradients that are computed beside the loss
    saved = sum(2 * v.numel() * v.element_size() for v in values if v.is_floating_point())
    return saved, min(WORKING, min(LARGEST, -(-positions // PARTS)) * parts.width * 4 * USUAL)


def _working_bytes(work: _Work, values: Sequence[Tensor]) -> int:
    """Return the largest memory in which one chunk is evaluated with its gradients, eagerly, bytes.

    Gradients of parameters are left out: their size does not depend on that of the chunk.
    """
    work.end = work.tail._end.forward
    wanted = [v.is_floating_point() for v in values] + [False] * len(work.parameters)
    peak = PeakMemory()
    with peak:
        work.run(values, wanted)
    return peak.peak
