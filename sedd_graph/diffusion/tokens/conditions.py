"""Compatibility of conditions on sampled text with kernels and samplers."""

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler

__all__ = ["lacks"]


def lacks(conditions: Conditions, kernel: Kernel, sampler: Sampler) -> str | None:
    """Return a description of the kernel or sampler that the conditions on sampled text require; None if both suit.

    Args:
        conditions: Keys of the blueprint's ``sample`` section that restrict or guide the text, such as ``matching``,
            ``guidance`` and ``particles``.
        kernel: The kernel of the process.
        sampler: The sampler, with its temperature and ``top_p``.
    """
    if conditions.particles > 1:
        if not sampler.takes_all:
            return "a sampler that keeps every token it draws, such as first_hitting or ancestral, for particles"
        if sampler.config.temperature == 0 or sampler.config.top_p != 1:
            return "temperature above 0 and top_p 1, for particles"
        if not kernel.carries_over:
            return "a kernel under which visible tokens stay, for particles"
    if kernel.carries_over:
        if conditions.observed == "renoise":
            return "a kernel under which visible tokens change, for observed: renoise"
        return None
    if conditions.matching is not None:
        return "a kernel under which visible tokens stay, for matching"
    if conditions.guidance != 1:
        return "a kernel with a mask under which visible tokens stay, for guidance"
    return None
