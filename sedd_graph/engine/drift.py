"""Drift guard: the error of inputs that a backward pass reconstructs, and what follows from one beyond the tolerance.

The inputs of the first layer are compared element by element with the original ones, which are saved. Of the inputs of
each later layer the forward pass saves a checksum, one number per position (:func:`checksum`). It is compared with that
of the reconstructed inputs before a gradient of that layer is given out. So no gradient is computed from inputs whose
error exceeds the tolerance, and none has to be taken back.

On a CPU the host reads the error of a layer at once. On other devices that would wait for the device: the largest error
of a backward pass is read two steps later, and the steps between have been taken.

Axes: b batch, d channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.grid import magnitude
from sedd_graph.engine.host_number import LateNumbers

__all__ = ["DRIFT", "DriftGuard", "DriftWarning", "checksum", "checksum_error", "drift_limit", "relative_error"]

DRIFT = 1e-3
"""Largest relative error of the reconstructed inputs before a block falls back to checkpointing (:func:`drift_limit`).

The error of an input is the larger of two: the Euclidean norm of the difference relative to the norm of the input, and
the largest magnitude of an element of the difference relative to the largest magnitude of an element of the input.
"""

_OUTLIER = 64.0
"""Square of an error relative to the mean square of the errors of all positions, from which it is not one of many alike."""
_SHAPES = 16
"""Largest number of shapes whose weights are retained."""
_SLACK = 0.5
"""Share of the tolerance that the error of a layer may take where a checksum estimates it."""


class DriftWarning(UserWarning):
    """Warning: inputs reconstructed in the backward pass differ from the original inputs by more than the tolerance."""


def drift_limit(autocast: torch.dtype | None) -> float:
    """Return the largest relative error of reconstructed inputs at which a block is still run reversibly.

    It is the larger of :data:`DRIFT` (1e-3) and the machine epsilon of the autocast dtype, such as 2^-7 for bfloat16.

    Args:
        autocast: Autocast dtype of the forward pass; None without autocast.
    """
    return DRIFT if autocast is None else max(DRIFT, torch.finfo(autocast).eps)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Return the largest relative error of the tensors, as :data:`DRIFT` defines it, float32 [].

    It is inf where an element is not finite. Integers and booleans must be equal: the error is inf where one is not.
    """
    errors = []
    for a, b in zip(found, expected, strict=True):
        if not b.is_floating_point():
            errors.append(_unequal(a, b))
        elif b.numel():
            difference = a - b
            pairs = zip(_sizes(difference), _sizes(b), strict=True)
            errors += [(error / size.clamp(min=1e-30)).float() for error, size in pairs]
    return _largest(errors, expected)


def checksum(x: Tensor, weights: Tensor) -> Tensor:
    """Return one number per position, float32 or float64 [b, ...], or int64 for integers, from x [b, ..., d].

    Args:
        x: A stream of a layer.
        weights: Random weights with mean square 1, [..., d] (:meth:`DriftGuard.weights`). The mean square of the checksum
            of an error is then that of the error.
    """
    if not x.is_floating_point():
        return (x.long() * weights).sum(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.detach().to(wide) * weights.to(wide)).sum(-1)


def checksum_error(found: Sequence[Tensor], expected: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Estimate the largest relative error of tensors, as :data:`DRIFT` defines it, from the checksums of the right ones.

    Args:
        found: The tensors.
        expected: Checksums of the right ones.
        weights: Weights of the checksums.

    Returns:
        The estimate, float32 []; inf where an element is not finite, or an integer differs.
    """
    errors = []
    for a, b, w in zip(found, expected, weights, strict=True):
        difference = checksum(a, w) - b
        if not a.is_floating_point():
            errors.append(_unequal(difference, torch.zeros_like(difference)))
        elif a.numel():
            norm, peak = _sizes(difference)
            size, top = (own.clamp(min=1e-30) for own in _sizes(a))
            # the error of a position is a sum over channels: it bounds that of an element only where it stands out
            positions = difference.numel()
            stands_out = peak.square() * positions > norm.square() * min(_OUTLIER, positions / 4)
            errors.append(torch.maximum(norm / size, torch.where(stands_out, peak / top, norm / size)).float())
    return _largest(errors, found)


def _sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean norm and the largest magnitude of an element, scalar tensors."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide), magnitude(x).to(wide)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Return 0 if the tensors are equal, otherwise inf, float32 []."""
    return torch.zeros((), device=a.device).masked_fill((a != b).any(), torch.inf)


def _largest(errors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    if not errors:
        return torch.zeros((), device=like[0].device if like else None)
    return torch.stack(list(errors)).nan_to_num(torch.inf, posinf=torch.inf).max()


class DriftGuard:
    """Errors of the inputs that a block reconstructs, and the decision to checkpoint the block from then on.

    Args:
        label: Name of the block.

    Attributes:
        fallback: Relative error above the tolerance, at which the block fell back to checkpointing; None if it did not.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.fallback: float | None = None
        self._drift: float | None = None
        self._late, self._limit = LateNumbers(), DRIFT
        self._weights: dict[tuple[object, ...], Tensor] = {}

    @property
    def drift(self) -> float | None:
        """Relative error of the inputs that the last backward pass reconstructed; None before. May wait for a device."""
        self._read(0)
        return self._drift

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights of the checksum of a stream x [b, ..., d]: random, [..., d]; odd for integers.

        They have random signs, mean square 1, and magnitudes from 0.69 to 1.29, so that no two elements weigh the same and
        none weighs little.
        """
        shape = x.shape[1:] if x.dim() > 1 else x.shape
        key = (shape, x.is_floating_point(), x.device)
        if key not in self._weights:
            generator = torch.Generator().manual_seed(20)
            if x.is_floating_point():
                drawn = torch.rand(shape, generator=generator) * 0.6 + 0.7
                drawn *= torch.randint(2, shape, generator=generator) * 2 - 1
                drawn /= (1 + 0.6**2 / 12) ** 0.5
            else:
                drawn = 2 * torch.randint(2**61, shape, generator=generator) + 1
            if len(self._weights) >= _SHAPES:
                self._weights.clear()
            self._weights[key] = drawn.to(x.device)
        return self._weights[key]

    def exceeded(self, error: Tensor, limit: float, *, estimated: bool, shared: bool) -> bool:
        """Record the error of a layer's reconstructed inputs, and return whether it exceeds the tolerance.

        Called where the host may read numbers (:func:`~sedd_graph.engine.host_number.reads`). At the first error above the tolerance a warning is
        raised, and :attr:`fallback` is set.

        Args:
            error: The relative error, float32 [].
            limit: The tolerance.
            estimated: Whether the error is estimated, so that half the tolerance is taken as the limit.
            shared: Whether processes share the weights (FSDP), so that all of them must decide alike.
        """
        if shared:
            torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX)
        found = float(error)
        within = found <= limit * (_SLACK if estimated else 1)
        if not (estimated and within):
            self._record(
                found, within, limit, "the gradients of this step are recomputed from the original inputs, and "
            )
        return not within

    def put(self, error: Tensor, limit: float, *, shared: bool) -> None:
        """Record the largest error of a backward pass on a device that the host does not wait for."""
        if shared:
            torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX)
        self._limit = limit
        self._late.put(error)

    def read_late(self) -> None:
        """Read the errors of earlier backward passes, two steps late. Called once per forward pass in training."""
        self._read(1)

    def _read(self, leave: int) -> None:
        for found in self._late.take(leave=leave):
            self._record(
                found, found <= self._limit, self._limit, "that is known now, after steps with its gradients; "
            )

    def _record(self, drift: float, within: bool, limit: float, consequence: str) -> None:
        self._drift = drift
        if within or self.fallback is not None:
            return
        self.fallback = drift
        warnings.warn(
            f"block {self.label!r}: inputs reconstructed in the backward pass are off by {drift:.1e} of their size "
            f"(tolerance {limit:g}); {consequence}from now on the block is checkpointed. Fewer layers, 'arithmetic: exact' "
            "or float32 streams keep it reversible",
            DriftWarning,
            stacklevel=2,
        )
