"""The components of a process of strings, together."""

from __future__ import annotations

from typing import Any, NamedTuple

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringKernel, StringObjective
from sedd_graph.diffusion.strings.sampler import StringSampler

__all__ = ["StringParts"]


class StringParts(NamedTuple):
    """Kernel, schedule, objective and sampler of strings."""

    kernel: StringKernel
    schedule: Schedule
    objective: StringObjective[Any, Any]
    sampler: StringSampler[Any]
