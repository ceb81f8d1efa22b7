"""Compatibility of conditions on sampled text with kernels."""

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["lacks"]


def lacks(conditions: Conditions, kernel: Kernel) -> str | None:
    """Return a description of the kind of kernel that ``conditions`` require; None if ``kernel`` is suitable."""
    if kernel.carries_over:
        if conditions.observed == "renoise":
            return "a kernel under which visible tokens change, for observed: renoise"
        return None
    if conditions.matching is not None:
        return "a kernel under which visible tokens stay, for matching"
    if conditions.guidance != 1:
        return "a kernel with a mask under which visible tokens stay, for guidance"
    return None
