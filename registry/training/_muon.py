"""Muon optimizer for weight matrices, whole or sharded by rows. Axes: k matrices of one shape, m rows, n columns."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MuonOptimizer(torch.optim.Optimizer):
    """Muon optimizer (Jordan et al. 2024), with updates scaled to the root mean square of AdamW's updates.

    The scale is that of arXiv 2502.16982, eq. 4. ``torch.optim.Muon`` orthogonalises in bfloat16 on all hardware, which
    is hundreds of times slower on a CPU without bfloat16 instructions. This class orthogonalises in bfloat16 on GPUs
    and in float32 on CPUs, and all matrices of one shape as one batch. Matrices that are sharded over processes (DTensor,
    FSDP2) are orthogonalised by one process each: an all-to-all takes the shards there, and another takes the results back.

    Args:
        parameters: Weight matrices, each of two axes.
        lr: Learning rate.
        momentum: Decay rate of the moving average of the gradient; the momentum is Nesterov's.
        weight_decay: Decoupled weight decay.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    STEPS = 5

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonal(cls, matrices: Tensor) -> Tensor:
        """Orthogonalise matrices approximately by a Newton-Schulz iteration.

        Args:
            matrices: Matrices of one shape, [k, m, n].

        Returns:
            Matrices with the same singular vectors and with singular values of about 0.7 to 1.2, [k, m, n], in the
            dtype of ``matrices``.
        """
        dtype = torch.bfloat16 if matrices.device.type == "cuda" else torch.float32
        tall = matrices.shape[1] > matrices.shape[2]
        x = (matrices.transpose(1, 2) if tall else matrices).to(dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.STEPS):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.transpose(1, 2) if tall else x).to(matrices.dtype)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient, in place.

        Args:
            closure: Function that evaluates the model anew, with gradients enabled, and returns the loss; None: the
                gradients are those already computed.

        Returns:
            The loss that ``closure`` returned; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                self._update(matrices, group, scale=group["lr"] * 0.2 * math.sqrt(max(shape)))
        return loss

    def _update(self, matrices: list[nn.Parameter], group: dict[str, Any], *, scale: float) -> None:
        """Update matrices of one shape, in place."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        own, found = _local(matrices), _local(gradients)
        buffers = _local([self.state[p]["momentum_buffer"] for p in matrices])
        torch._foreach_lerp_(buffers, found, 1 - group["momentum"])
        updates = torch._foreach_lerp(found, buffers, group["momentum"])
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(own, self._orthogonal(matrices, updates), alpha=-scale)

    def _orthogonal(self, matrices: list[nn.Parameter], updates: Sequence[Tensor]) -> list[Tensor]:
        """Return the orthogonalised updates of matrices of one shape, of which this process has ``updates``."""
        if not hasattr(matrices[0], "device_mesh"):
            return list(self.orthogonal(torch.stack(list(updates))).unbind())
        return _by_owners(matrices, updates, self.orthogonal)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this process holds."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _by_owners(
    matrices: list[nn.Parameter], own: Sequence[Tensor], function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply a function of whole matrices to matrices that are sharded by rows, each in the process that owns it.

    Matrix i is owned by process i modulo their number, so that each has an equal share of the work.

    Args:
        matrices: Sharded tensors (DTensor), which determine the processes.
        own: This process's rows of each matrix.
        function: Function from matrices of one shape, [k, m, n], to matrices of that shape.

    Returns:
        This process's rows of each result.
    """
    mesh: Any = matrices[0].device_mesh  # type: ignore[attr-defined]  # a DTensor
    mesh = mesh if mesh.ndim == 1 else mesh["shard"]
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    m, n = matrices[0].shape
    each = -(-m // size)
    rows = [max(0, min(each, m - each * i)) for i in range(size)]
    counts = [len(range(i, len(matrices), size)) for i in range(size)]
    mine, theirs = rows[rank] * n, [r * n * counts[rank] for r in rows]
    order = [i for owner in range(size) for i in range(owner, len(matrices), size)]
    sent = torch.cat([own[i].reshape(-1) for i in order])
    received = sent.new_empty(sum(theirs))
    dist.all_to_all_single(received, sent, theirs, [mine * c for c in counts], group=group)
    if counts[rank]:
        parts = [part.view(counts[rank], -1, n) for part in received.split(theirs)]
        whole = function(torch.cat(parts, dim=1))
        received = torch.cat([part.reshape(-1) for part in whole.split(rows, dim=1)])
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, received, [mine * c for c in counts], theirs, group=group)
    made = back.view(len(matrices), rows[rank], n).unbind()
    places = {i: at for at, i in enumerate(order)}
    return [made[places[i]] for i in range(len(matrices))]
