"""The set of components that define a diffusion process over strings."""

from __future__ import annotations

from typing import Any, NamedTuple

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringKernel, StringObjective
from sedd_graph.diffusion.strings.sampler import StringSampler

__all__ = ["StringParts"]


class StringParts(NamedTuple):
    """The components of a diffusion process over strings: kernel, schedule, objective and sampler.

    Attributes:
        kernel: The forward process.
        schedule: Total noise as a function of time.
        objective: The training loss.
        sampler: Generates strings.
    """

    kernel: StringKernel
    schedule: Schedule
    objective: StringObjective[Any, Any]
    sampler: StringSampler[Any]
