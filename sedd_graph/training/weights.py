"""Checks of tensors that were read from files against those that a model expects, before anything uses them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from sedd_graph.store.manifest import DamagedError

__all__ = ["all_finite", "check_finite", "check_tensors", "load_weights"]


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str, finite: Container[str] | None = None
) -> None:
    """Check names, shapes, dtypes and values of tensors.

    Args:
        found: Tensors by name.
        expected: Tensors of the expected shapes and dtypes by name, such as ``meta`` tensors.
        where: Name of the file that they come from, for messages.
        finite: Names of the tensors whose values must be finite; None for all.

    Raises:
        DamagedError: They differ. The message lists the first five differences of each sort.
    """
    wrong = []
    for text, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            wrong.append(f"{text}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    both = sorted(expected.keys() & found.keys())
    shapes = [k for k in both if expected[k].shape != found[k].shape]
    wrong += [f"{k}: {list(found[k].shape)}, not {list(expected[k].shape)}" for k in shapes[:5]]
    dtypes = [k for k in both if expected[k].dtype != found[k].dtype]
    wrong += [f"{k}: {found[k].dtype}, not {expected[k].dtype}" for k in dtypes[:5]]
    if wrong:
        raise DamagedError(f"{where} does not fit this model: {'; '.join(wrong)}")
    check_finite({k: found[k] for k in both}, where=where, finite=finite)


def check_finite(found: Mapping[str, Tensor], *, where: str, finite: Container[str] | None = None) -> None:
    """Check that the values of tensors are finite. Of a sharded tensor (DTensor), this process's part is checked.

    Args:
        found: Tensors by name.
        where: Name of the file that they come from, for messages.
        finite: Names of the tensors whose values must be finite; None for all.

    Raises:
        DamagedError: Values are NaN or infinite. The message lists the first five such tensors.
    """
    parts = {k: t.to_local() if hasattr(t, "to_local") else t for k, t in found.items()}
    broken = [k for k, t in parts.items() if (finite is None or k in finite) and not _is_finite(t)]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DamagedError(f"{where} has values that are NaN or infinite: {', '.join(broken[:5])}{more}")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all values of tensors on one device are finite, with one wait for the device if they are."""
    if not tensors:
        return True
    with torch.no_grad():
        sums = torch.stack([tensor.sum().isfinite() for tensor in tensors])
    return bool(sums.all()) or all(map(_is_finite, tensors))


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Their sum is, in a twentieth of the time, unless it overflows."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load parameters and buffers into a module by name.

    Args:
        model: The module to load into.
        weights: Parameters and buffers by name, as in a state dict.
        where: Name of the file that they come from, for messages.

    Raises:
        DamagedError: Names, shapes or dtypes differ from those of ``model``, or a parameter is not finite.
    """
    check_tensors(weights, model.state_dict(), where=where, finite={name for name, _ in model.named_parameters()})
    model.load_state_dict(weights)
